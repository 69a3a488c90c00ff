"""Residual k-means: each level codes what the levels before it left over."""

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from onerec_jax import balanced_kmeans, files, kmeans, semantic_ids
from onerec_jax import config as config_lib
from onerec_jax.tokenizer import collisions

ITEMS_PER_CODE = 3
"""A small catalogue gets fewer codes, so that codes are shared (INFERRED)."""
_BALANCES = ("none", "equal", "capped")
_COLLISIONS = ("keep", "extra", "assign")


@dataclasses.dataclass(frozen=True)
class Coding:
  """What `fit` learns.

  Attributes:
    codes: int32 [I, L], without a padding row; with an extra level L + 1.
    codebook_sizes: K of each level.
    codebooks: float32 [K_l, D] of each fitted level.
  """

  codes: Int[np.ndarray, "I L"]
  codebook_sizes: tuple[int, ...]
  codebooks: list[Float[np.ndarray, "_ D"]]


def num_codes(num_items: int, config: config_lib.TokenizerConfig) -> int:
  """K: the config's, or fewer for a small catalogue.

  At least three items share a first code on average (INFERRED), but K^L
  always reaches the number of items where the config's K allows it.
  """
  enough = math.ceil(num_items ** (1 / config.num_levels) - 1e-9)
  shared = math.ceil(num_items / ITEMS_PER_CODE)
  return min(config.num_codes, num_items, max(2, shared, enough))


def _check(
  vectors: Float[np.ndarray, "I D"], config: config_lib.TokenizerConfig
) -> None:
  if config.balance not in _BALANCES:
    raise ValueError(
      f"tokenizer.balance is {config.balance!r}; known: {_BALANCES}"
    )
  if config.collisions not in _COLLISIONS:
    raise ValueError(
      f"tokenizer.collisions is {config.collisions!r}; known: {_COLLISIONS}"
    )
  for name in ("num_levels", "num_codes", "iterations"):
    if getattr(config, name) < 1:
      raise ValueError(f"tokenizer.{name} must be at least 1")
  if config.slack < 1:
    raise ValueError(
      f"tokenizer.slack is {config.slack}; below 1 the clusters cannot hold "
      "all items"
    )
  if len(vectors) == 0:
    raise ValueError("there are no items to tokenize")
  if not np.isfinite(vectors).all():
    row = np.argwhere(~np.isfinite(vectors))[0][0]
    raise ValueError(f"the vector of item {row + 1} is not finite")
  size = num_codes(len(vectors), config)
  if config.collisions == "assign" and len(vectors) > size**config.num_levels:
    raise ValueError(
      f"{len(vectors)} items do not fit into {size}^{config.num_levels} "
      "semantic IDs; raise tokenizer.num_codes or tokenizer.num_levels, or "
      "set tokenizer.collisions to keep or extra"
    )


def fit(
  vectors: Float[np.ndarray, "I D"],
  config: config_lib.TokenizerConfig,
  mesh: jax.sharding.Mesh | None = None,
  on_level: Callable[[int], None] = lambda level: None,
) -> Coding:
  """Learns codebooks and codes, level by level (OneRec §1.2, OneRec-V1 §2.1).

  r¹ = e; s^l = the cluster of r^l; r^{l+1} = r^l − c^l_{s^l}. INFERRED: with
  `assign` the last level's codebook comes from plain k-means, whatever
  `balance` says, since its codes are then assigned within prefix groups.

  Args:
    vectors: [I, D], row i = item i + 1.
    config: levels, sizes, balance, collisions, seed.
    mesh: shards the points over its `data` axis; none: one device.
    on_level: called with each level (from 0) before it is fitted.

  Raises:
    ValueError: a bad setting, non-finite vectors, or more items than IDs.
  """
  _check(vectors, config)
  items, size = len(vectors), num_codes(len(vectors), config)
  if mesh is None:
    residual = jnp.asarray(vectors)
    valid = jnp.ones((items,), bool)
  else:
    residual, valid = kmeans.shard(vectors, mesh)
  codes, codebooks = [], []
  for level in range(config.num_levels):
    on_level(level)
    is_last = level == config.num_levels - 1
    if level and config.collisions == "assign":
      prefixes = np.stack(codes, axis=1)
      # Under a prefix the levels to come have so many IDs.
      room = size ** (config.num_levels - level)
      moved = collisions.cap_prefixes(vectors, prefixes, codebooks, room)
      # The last level's residual is rounded anew in any case, as it was when
      # the IDs that there are were made.
      if moved is not prefixes or is_last:
        codes = list(moved.T)
        left = vectors - decode(moved, codebooks)
        residual = (
          jnp.asarray(left) if mesh is None else kmeans.shard(left, mesh)[0]
        )
    balance = config.balance
    if is_last and config.collisions == "assign":
      balance = "none"
    clusters = _fit_level(residual, valid, size, level, balance, config)
    residual = residual - clusters.centroids[clusters.codes]
    codes.append(np.asarray(clusters.codes)[:items])
    codebooks.append(np.asarray(clusters.centroids))
  coded = np.stack(codes, axis=1)
  sizes = (size,) * config.num_levels
  if config.collisions == "assign":
    coded = collisions.assign_last_level(vectors, coded, codebooks)
  elif config.collisions == "extra":
    coded = collisions.add_rank_level(coded)
    sizes += (int(coded[:, -1].max()) + 1,)
  return Coding(coded, sizes, codebooks)


def _fit_level(
  residual: jax.Array,
  valid: jax.Array,
  size: int,
  level: int,
  balance: str,
  config: config_lib.TokenizerConfig,
) -> kmeans.Clusters:
  key = jax.random.fold_in(jax.random.key(config.seed), level)
  iterations = config.iterations
  if balance == "none":
    return kmeans.fit(residual, size, key, valid, iterations=iterations)
  if balance == "equal":
    return balanced_kmeans.balanced_fit(
      residual, size, key, valid, iterations=iterations
    )
  capacity = math.ceil(config.slack * int(valid.sum()) / size)
  return balanced_kmeans.capped_fit(
    residual, size, key, capacity, valid, iterations=iterations
  )


def encode(
  vectors: Float[np.ndarray, "I D"],
  codebooks: list[Float[np.ndarray, "_ D"]],
) -> Int[np.ndarray, "I L"]:
  """Plain arg-min at each level with frozen codebooks.

  Args:
    vectors: [I, D].
    codebooks: [K_l, D] of each level.
  """
  residual = jnp.asarray(vectors)
  codes = []
  for codebook in codebooks:
    code, _ = kmeans.assign(residual, jnp.asarray(codebook))
    residual = residual - jnp.asarray(codebook)[code]
    codes.append(np.asarray(code))
  return np.stack(codes, axis=1)


def decode(
  codes: Int[np.ndarray, "I L"],
  codebooks: list[Float[np.ndarray, "_ D"]],
) -> Float[np.ndarray, "I D"]:
  """The sum of the chosen centroids; an extra level adds nothing."""
  return sum(book[code] for code, book in zip(codes.T, codebooks))


def encode_new(
  vectors: Float[np.ndarray, "I D"], known: semantic_ids.SemanticIds
) -> semantic_ids.SemanticIds:
  """Adds items with frozen codebooks; IDs that exist do not change.

  `keep`: plain arg-min. `assign`: the nearest prefix, and in it the nearest
  last code that is free. `extra`: the nearest ID whose group has room, and in
  it the next rank. Sizes never grow, so a trained model still fits.

  Args:
    vectors: [new items, D], in the space the codebooks were fitted in.
    known: the IDs so far.

  Returns:
    IDs of the old items, then of the new ones in order.

  Raises:
    ValueError: another width, or no free ID near an item.
  """
  width = known.codebooks[0].shape[1]
  if vectors.shape[1] != width:
    raise ValueError(
      f"new vectors have width {vectors.shape[1]}, the codebooks {width}"
    )
  new = encode(vectors, known.codebooks)
  if known.collisions == "assign":
    new = collisions.place_new(vectors, new, known.codes[1:], known.codebooks)
  elif known.collisions == "extra":
    new = collisions.rank_new(
      vectors,
      new,
      known.codes[1:],
      known.codebooks,
      known.codebook_sizes[-1],
    )
  codes = np.concatenate([known.codes, new])
  report = semantic_ids.quality_report(codes[1:], known.codebook_sizes)
  return dataclasses.replace(
    known,
    codes=codes,
    fingerprint=files.fingerprint(known.fingerprint, vectors),
    report=report,
  )
