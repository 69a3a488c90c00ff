"""Models of a few thousand parameters and a batch laid out by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util

from onerec_jax import config as config_lib
from onerec_jax import model_configs
from onerec_jax.data import rows as rows_lib
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.inference import assemble
from onerec_jax.models import registry

NUM_ITEMS = 60
CODEBOOK_SIZES = (6, 4, 8)
FEATURES = {"rating": 7, "user_age": 4}
ITEM_FEATURES = {"category": 5}
SHAPE = (2, 12, 5)
"""B, S, T of `batch`."""

SEES = {
  # (row, target): (user token, events), the positions it sees.
  (0, 0): (0, [1, 2, 3, 4, 5, 6]),
  (0, 1): (0, [3, 4, 5]),
  (0, 2): (7, []),
  (0, 3): (7, [9, 10]),
  (1, 0): (0, []),
  (1, 1): (1, [2, 3, 4, 5, 6, 7, 8]),
  (1, 2): (1, [5, 6]),
}
"""What each target of `batch` sees; the others are padding."""

_GENERATOR = {
  "d_model": 16,
  "num_heads": 4,
  "d_ff": 24,
  "sid_embed_dim": 6,
  "feature_embed_dim": 4,
  "dropout": 0.0,
}
_SASREC = {
  "num_layers": 2,
  "d_model": 16,
  "num_heads": 2,
  "d_ff": 24,
  "dropout": 0.0,
}


def lazy_decoder(**changes) -> registry.Model:
  values = {**_GENERATOR, "num_layers": 2, "num_kv_heads": 2}
  return _model(model_configs.LazyDecoderConfig, {**values, **changes})


def encoder_decoder(**changes) -> registry.Model:
  values = {**_GENERATOR, "encoder_layers": 1, "decoder_layers": 2}
  return _model(model_configs.EncoderDecoderConfig, {**values, **changes})


def session_decoder(**changes) -> registry.Model:
  values = {**_GENERATOR, "encoder_layers": 1, "decoder_layers": 2}
  values |= {"session_items": 2, "moe": experts(router="softmax")}
  return _model(model_configs.SessionDecoderConfig, {**values, **changes})


def decoder_only(**changes) -> registry.Model:
  values = {**_GENERATOR, "num_layers": 2}
  return _model(model_configs.DecoderOnlyConfig, {**values, **changes})


def experts(**changes) -> model_configs.MoEConfig:
  values = {"num_experts": 4, "experts_per_token": 2, "d_ff": 6}
  return model_configs.MoEConfig(**{**values, **changes})


def sasrec(**changes) -> registry.Model:
  return _model(model_configs.SASRecConfig, {**_SASREC, **changes})


def two_tower(**changes) -> registry.Model:
  values = {"d_model": 16, "num_heads": 2, "d_ff": 24, "dropout": 0.0}
  return _model(model_configs.TwoTowerConfig, {**values, **changes})


_REWARD = {
  "d_model": 16,
  "num_heads": 2,
  "d_ff": 24,
  "sid_embed_dim": 6,
  "feature_embed_dim": 4,
  "dropout": 0.0,
}


def session_reward(**changes) -> registry.Model:
  values = {**_REWARD, "session_size": 2, **changes}
  return _model(model_configs.SessionRewardConfig, values)


def p_score(**changes) -> registry.Model:
  return _model(model_configs.PScoreConfig, {**_REWARD, **changes})


def labelled(plain: Batch) -> Batch:
  """The batch with random feedback on its targets, a quarter of it unknown."""
  rng = np.random.default_rng(4)
  shape, real = plain.targets.shape, np.asarray(plain.targets) > 0
  labels = {}
  for name in (
    "click", "long_view", "like", "follow", "comment", "forward"
  ):  # fmt: skip
    labels[name] = (rng.random(shape) < 0.4).astype(np.float32)
  labels["play_time_ms"] = rng.integers(0, 90_000, shape).astype(np.float32)
  for values in labels.values():
    values[rng.random(shape) < 0.25] = np.nan
    values[~real] = 0
  return plain.replace(labels={k: jnp.asarray(v) for k, v in labels.items()})


def _model(config, values):
  pathways = values.pop("pathways", None)
  return registry.create(
    config(**values),
    NUM_ITEMS,
    CODEBOOK_SIZES,
    FEATURES,
    ITEM_FEATURES,
    pathways,
  )


def batch() -> Batch:
  """Two rows of two users each; no item twice among events and targets."""
  B, S, T = SHAPE
  rng = np.random.default_rng(0)
  segment = np.zeros((B, S), np.int32)
  segment[0, :7], segment[0, 7:11] = 1, 2
  segment[1, :1], segment[1, 1:9] = 1, 2
  token = np.zeros((B, S), bool)
  for (row, _), (position, _) in SEES.items():
    token[row, position] = True
  event = (segment > 0) & ~token
  items = rng.permutation(np.arange(1, NUM_ITEMS + 1)).astype(np.int32)
  contexts, wanted = items[: B * S].reshape(B, S), items[B * S :]
  targets, first, until = np.zeros((3, B, T), np.int32)
  for (row, target), (position, events) in SEES.items():
    targets[row, target] = wanted[row * T + target]
    # Bounds within the segment; the first may lie before its events.
    first[row, target] = min(events, default=position + 1)
    until[row, target] = max(events, default=position) + 1
  return Batch(
    items=jnp.asarray(np.where(event, contexts, 0)),
    segment=jnp.asarray(segment),
    features={
      "rating": jnp.asarray(
        np.where(event, rng.integers(0, 7, (B, S)), 0), jnp.int32
      ),
      "user_age": jnp.asarray(
        np.where(token, rng.integers(1, 4, (B, S)), 0), jnp.int32
      ),
    },
    targets=jnp.asarray(targets),
    visible_from=jnp.asarray(first),
    visible_until=jnp.asarray(until),
  )


def session_batch(m: int) -> Batch:
  """`batch`, each of its targets the first of a session of m items."""
  first = batch()
  real = np.repeat(np.asarray(first.targets) > 0, m, axis=1)
  used = {*np.asarray(first.items).ravel(), *np.asarray(first.targets).ravel()}
  free = [item for item in range(1, NUM_ITEMS + 1) if item not in used]
  later = np.random.default_rng(3).choice(free, real.shape)
  starts = np.arange(real.shape[1]) % m == 0
  targets = np.where(starts, np.repeat(first.targets, m, axis=1), later)
  return first.replace(
    targets=jnp.asarray(np.where(real, targets, 0), jnp.int32),
    visible_from=jnp.repeat(first.visible_from, m, axis=1),
    visible_until=jnp.repeat(first.visible_until, m, axis=1),
  )


PATHWAYS = config_lib.PathwaysConfig(short=3, positive=4, lifelong=5)
PATHWAY_SEES = (
  [0, 2, 3, 4, 5, 6, 7, 9, 10, 11, 12],
  [0],
  [0, 1, 2, 3, 7],
  [*range(13)],
)
"""Positions of `pathway_batch` that there are: all kinds; a newcomer; a user
whose history was never compressed; pathways that are full."""


def pathway_batch() -> Batch:
  """Four requests of one target and one of padding; no item twice."""
  B, S = len(PATHWAY_SEES), PATHWAYS.positions
  rng = np.random.default_rng(7)
  there = np.zeros((B, S), bool)
  for row, positions in enumerate(PATHWAY_SEES):
    there[row, positions] = True
  token = there & (np.arange(S) == 0)
  event = there & ~token
  items = rng.permutation(np.arange(1, NUM_ITEMS + 1))
  targets = np.stack([items[B * S : B * S + B], np.zeros(B)], axis=1)
  columns = {
    "items": np.where(event, items[: B * S].reshape(B, S), 0),
    "segment": there,
    "rating": np.where(event, rng.integers(0, 7, (B, S)), 0),
    "user_age": np.where(token, rng.integers(1, 4, (B, S)), 0),
    "targets": targets,
    "visible_from": np.zeros((B, 2)),
    "visible_until": np.where(targets > 0, S, 0),
  }
  columns = {k: jnp.asarray(v, jnp.int32) for k, v in columns.items()}
  features = {name: columns.pop(name) for name in FEATURES}
  return Batch(features=features, **columns)


def batch_of(model: registry.Model) -> Batch:
  """The batch whose targets are what a model generates."""
  if getattr(model, "pathways", None) and model.pathways.on:
    return pathway_batch()
  size = getattr(model, "session_size", getattr(model, "session_items", 1))
  return session_batch(size)


def catalogue() -> Catalogue:
  """Random codes and categories."""
  rng = np.random.default_rng(1)
  codes = np.stack(
    [rng.integers(0, size, NUM_ITEMS + 1) for size in CODEBOOK_SIZES], axis=1
  )
  category = rng.integers(0, 5, NUM_ITEMS + 1)
  codes[0], category[0] = 0, 0
  return Catalogue(
    codes=jnp.asarray(codes, jnp.int32),
    features={"category": jnp.asarray(category, jnp.int32)},
  )


@functools.cache
def params(model: registry.Model):
  """Random parameters of a tiny model."""
  return random_params(model, batch_of(model), catalogue(), 2)


def asking(system: assemble.System, histories: list[rows_lib.History]) -> Batch:
  """A batch that asks the system's model after a history, or after none."""
  names = sorted(rows_lib.feature_sizes(system.prepared))
  return rows_lib.request_batch(histories, names, system.config.pipeline, 1)


def with_params(system: assemble.System, seed: int):
  """A system and random parameters of its model."""
  example = asking(system, [])
  return system, random_params(system.model, example, system.catalogue, seed)


def random_params(
  model: registry.Model, example: Batch, items: Catalogue, seed: int
):
  """Random parameters, without compiling `init`: no zeros, no ones."""
  shapes = jax.eval_shape(
    lambda *args: nn.unbox(model.init(*args)["params"]),
    jax.random.key(0), example, items,
  )  # fmt: skip
  rng = np.random.default_rng(seed)

  def draw(path, leaf):
    x = rng.normal(size=leaf.shape)
    if path[-1].key == "scale":
      x = 1 + 0.3 * x
    elif path[-1].key == "kernel":
      x = x / leaf.shape[-2] ** 0.5
    elif path[-1].key == "balance_bias":
      x = 0.1 * x  # near enough to affinities that tokens choose differently
    else:
      x = 0.5 * x
    return jnp.asarray(x, leaf.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def block_matrices(model: registry.Model) -> dict[str, int]:
  """Sizes of all matrices in a generator's blocks, without making them.

  Args:
    model: over data without features.
  """
  column = jax.ShapeDtypeStruct((1, 4), jnp.int32)
  empty = Batch(column, column, {}, column, column, column)
  rows = model.num_items + 1, len(model.codebook_sizes)
  items = Catalogue(jax.ShapeDtypeStruct(rows, jnp.int32), {})
  shapes = jax.eval_shape(
    lambda *args: nn.unbox(model.init(*args)["params"]),
    jax.random.key(0), empty, items,
  )  # fmt: skip
  # Blocks are numbered, or stacked by the scan.
  parts = ("scanned", "layers_", "encoder_", "decoder_", "blocks_")
  return {
    "/".join(path): leaf.size
    for path, leaf in traverse_util.flatten_dict(shapes).items()
    if path[0].startswith(parts) and path[-1] == "kernel"
  }


def shapes_of(batch: Batch, rows: int, positions: int, targets: int) -> Batch:
  """The batch's leaves as shapes of another size."""

  def resized(x, n):
    return jax.ShapeDtypeStruct((rows, n), x.dtype)

  return batch.replace(
    items=resized(batch.items, positions),
    segment=resized(batch.segment, positions),
    features={k: resized(v, positions) for k, v in batch.features.items()},
    targets=resized(batch.targets, targets),
    visible_from=resized(batch.visible_from, targets),
    visible_until=resized(batch.visible_until, targets),
  )


def separate(whole: Batch) -> tuple[Batch, list[tuple[int, int]]]:
  """A row of its own for every target: the positions it sees, packed left.

  Returns:
    The batch, with one target a row, and where each target came from.
  """
  S = whole.items.shape[1]
  columns = {"items": [], "segment": [], "rating": [], "user_age": []}
  targets, until = [], []
  for (row, target), (token, events) in SEES.items():
    positions = [token, *events]
    space = [0] * (S - len(positions))
    sources = dict(whole.features, items=whole.items)
    for name in ("items", "rating", "user_age"):
      values = np.asarray(sources[name])[row, positions].tolist()
      columns[name].append(values + space)
    columns["segment"].append([1] * len(positions) + space)
    targets.append([int(whole.targets[row, target])])
    until.append([len(positions)])
  arrays = {k: jnp.asarray(v, jnp.int32) for k, v in columns.items()}
  return Batch(
    items=arrays["items"],
    segment=arrays["segment"],
    features={name: arrays[name] for name in FEATURES},
    targets=jnp.asarray(targets, jnp.int32),
    visible_from=jnp.ones((len(targets), 1), jnp.int32),
    visible_until=jnp.asarray(until, jnp.int32),
  ), list(SEES)
