"""What the reward models do alike: read a user, then look at candidates.

A reward model reads the context as generators do (the plain history, or the
user pathways), and a candidate by the very embedding that reads an event of
it, without an event's own features. Blocks of target attention make a
candidate's vector v aware of the user:

  x ← x + CrossAttn(RMSNorm(x), z, z);  x ← x + SwiGLU(RMSNorm(x)),  x_0 = v

with z the positions of the context. Queries and keys are made by one matrix:
attention is similarity from the first step on, and a candidate finds what the
user did with items like it. Candidates do not see each other here.
Keys and values are made once a row, whatever the number of candidates.

INFERRED: OneRec (arXiv 2502.18965 §3.4) says "target-aware, e.g. by target
attention", OneRec-V1 (arXiv 2506.13695 §2.5) "a SIM-style backbone"; neither
prints a block. With a matrix each for queries and keys the session model found
a planted taste more slowly (docs/rewards.md).
"""

from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from onerec_jax import config as config_lib
from onerec_jax.data import batch as batch_lib
from onerec_jax.models import attention, layers
from onerec_jax.models import context as context_lib
from onerec_jax.models import pathways as pathways_lib
from onerec_jax.partitioning import constrain


class Term(NamedTuple):
  """One binary cross-entropy of the loss.

  Attributes:
    head: whose logit.
    objective: whose label.
    weight: of the term.
  """

  head: str
  objective: str
  weight: float = 1.0


class TargetAttention(nn.Module):
  """One block; see the module docstring."""

  num_heads: int
  d_ff: int
  dropout: float

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B R N D"],
    z: Float[Array, "B S D"],
    bias: Float[Array, "B H #R S"],
  ) -> Float[Array, "B R N D"]:
    """R groups of N candidates each; a group has one view of the context."""
    D, heads = x.shape[-1], self.num_heads
    drop = layers.Dropout(self.dropout)
    h = layers.RMSNorm(name="norm")(x)
    look = layers.Linear(D, ("embed", "heads"), name="look")
    values = layers.Linear(D, ("embed", "heads"), name="values")(z)
    q, k, v = (
      y.reshape(*y.shape[:-1], heads, -1) for y in (look(h), look(z), values)
    )
    h = attention.cross_attention(q, k, v, bias).reshape(x.shape)
    x = x + drop(layers.Linear(D, ("heads", "embed"), name="out")(h))
    h = layers.RMSNorm(name="ffn_norm")(x)
    x = x + drop(layers.SwiGLU(self.d_ff, name="ffn")(h))
    return constrain(x, ("batch", None, None, None))


class Towers(nn.Module):
  """One MLP an objective, all first layers in one product.

    logit = w · gelu(W x) + b

  The bias, which nothing else in the house has, is the objective's rate: a
  follow is far rarer than a click.

  Attributes:
    number: of towers.
    d_ff: F, width of each.
    names: logical axes of W.
  """

  number: int
  d_ff: int
  names: tuple[str, str] = ("embed", "mlp")

  @nn.compact
  def __call__(
    self, x: Float[Array, "*batch D"]
  ) -> tuple[Float[Array, "*batch X"], Float[Array, "*batch X F"]]:
    """Logits in float32, and the hidden states."""
    h = layers.Linear(self.number * self.d_ff, self.names, name="in")(x)
    h = nn.gelu(h).reshape(*x.shape[:-1], self.number, self.d_ff)
    # Without it, gradients of all below came out wrong on a mesh of data 2 ×
    # fsdp 2 × tensor 2 (jax 0.10.2; tests/test_partitioning.py).
    h = constrain(h, ("batch", *(None,) * (h.ndim - 1)))
    out = self.param(
      "out",
      layers.boxed(
        nn.initializers.normal(self.d_ff**-0.5), (None, self.names[1])
      ),
      (self.number, self.d_ff),
    )
    bias = self.param(
      "bias", layers.boxed(nn.initializers.zeros, ("norm",)), (self.number,)
    )
    wide = h.astype(jnp.float32)  # rewards compare small differences
    flat = jnp.einsum("...xf,xf->...x", wide, out)
    return flat + bias.reshape((1,) * (flat.ndim - 1) + (-1,)), h


class RewardModel(nn.Module):
  """The base; letters in dims.py, fields those of RewardConfig.

  Attributes:
    codebook_sizes: K of each level of the semantic IDs.
    num_items: I.
    features: (name, size) of event and user features.
    item_features: (name, size) of item features.
    pathways: lengths of the user pathways; all 0: the plain history.
    objectives: what users do, a tower each.
    dtype: compute dtype of matrix products.
  """

  codebook_sizes: tuple[int, ...]
  num_items: int
  features: context_lib.FeatureSizes
  item_features: context_lib.FeatureSizes
  pathways: config_lib.PathwaysConfig
  d_model: int
  num_heads: int
  d_ff: int
  num_layers: int
  sid_embed_dim: int
  item_embed_dim: int
  item_table_rows: int
  feature_embed_dim: int
  dropout: float
  context_dropout: float
  lifelong_queries: int
  lifelong_layers: int
  objectives: tuple[str, ...]
  dtype: Any

  # What context.width asks of a model.
  sid_embedding: ClassVar[str] = "own"
  item_embedding: ClassVar[bool] = True

  value_weights: ClassVar[Mapping[str, float]] = {}
  """Head → its weight in the reward (`value`), where nothing else is asked."""

  def setup(self):
    D = self.d_model
    self.embedding = context_lib.ContextEmbedding(
      codebook_sizes=self.codebook_sizes,
      num_items=self.num_items,
      sid_embed_dim=self.sid_embed_dim,
      shared=None,
      item_embed_dim=self.item_embed_dim or D,
      item_table_rows=self.item_table_rows,
      feature_embed_dim=self.feature_embed_dim,
      features=self.features,
      item_features=self.item_features,
    )
    if self.pathways.on:
      self.reader = pathways_lib.make(self)
    else:
      self.project = layers.Linear(D, ("context", "projected"))
    self.context_norm = layers.RMSNorm()
    self.item_project = layers.Linear(D, ("context", "projected"))
    self.item_norm = layers.RMSNorm()
    self.drop_events = context_lib.EventDropout(self.context_dropout)
    self.distance_bias = attention.DistanceBias(self.num_heads)
    self.drop = layers.Dropout(self.dropout)
    self.layers = [
      TargetAttention(self.num_heads, self.d_ff, self.dropout)
      for _ in range(self.num_layers)
    ]
    self.norm = layers.RMSNorm()

  @property
  def terms(self) -> tuple[Term, ...]:
    """What the loss adds up."""
    raise NotImplementedError

  def labels(self, batch: batch_lib.Batch) -> dict[str, Float[Array, "B G"]]:
    """Objective → labels in [0, 1] of the batch's answers; NaN: unknown."""
    raise NotImplementedError

  def scores(
    self,
    batch: batch_lib.Batch,
    catalogue: batch_lib.Catalogue,
    candidates: Int[Array, "B R *m"],
  ) -> dict[str, Float[Array, "B R"]]:
    """Head → logits of answers the user might be given.

    Args:
      batch: contexts; one target a row, which all answers share, or one an
        answer.
      catalogue: of the items.
      candidates: dense items, or sessions of m of them; 0 is no item.
    """
    raise NotImplementedError

  def aware(
    self,
    batch: batch_lib.Batch,
    catalogue: batch_lib.Catalogue,
    candidates: Int[Array, "#B R N"],
  ) -> tuple[Float[Array, "B R N D"], Float[Array, "#B R N D"]]:
    """Candidates as the user sees them, and as they are.

    Args:
      batch: T is 1 or R.
      catalogue: of the items.
      candidates: items; the same for every row where they are given once.

    Raises:
      ValueError: T is neither.
    """
    T, R = batch.targets.shape[1], candidates.shape[1]
    if T not in (1, R):
      raise ValueError(
        f"{T} targets a row and {R} candidates: give contexts of one target, "
        "or one for each candidate"
      )
    inputs = self._read(batch, catalogue)
    bias = self.distance_bias(inputs.distance, inputs.visible, inputs.static)
    z = self.context_norm(inputs.features)
    v = self._items(catalogue, candidates)
    x = jnp.broadcast_to(v, (len(z), *v.shape[1:]))
    # Without it, sharded forwards with dropout came out wrong in some rows
    # (jax 0.10.2; tests/test_partitioning.py).
    x = constrain(x, ("batch", None, None, None))
    for layer in self.layers:
      x = layer(x, z, bias)
    return self.norm(x), v

  def item_scores(
    self, batch: batch_lib.Batch, catalogue: batch_lib.Catalogue
  ) -> Float[Array, "B 1 I_1"]:
    """What every item would earn alone; column 0 (padding) is −inf.

    So a reward model can be asked for recommendations like any model.

    Args:
      batch: one target a row.
      catalogue: of the items.
    """
    items = jnp.arange(1, self.num_items + 1)[None]
    earned = value(self.scores(batch, catalogue, items), self.value_weights)
    padding = ((0, 0), (1, 0))
    return jnp.pad(earned, padding, constant_values=-jnp.inf)[:, None]

  def _read(self, batch, catalogue) -> context_lib.ContextInputs:
    """Embeds and projects every context position."""
    kept = self.drop_events(batch)
    x = self.drop(self.embedding(batch, catalogue)).astype(self.dtype)
    if self.pathways.on:
      return self.reader.read(batch, x, kept)
    return context_lib.plain(batch, self.project(x), kept)

  def _items(self, catalogue, candidates):
    """Candidates [B, R, N] by the embedding of events: v."""
    flat = candidates.reshape(len(candidates), -1)
    none = jnp.zeros_like(flat)
    row = batch_lib.Batch(
      items=flat,
      segment=none,
      features={name: none for name, _ in self.features},
      targets=none,
      visible_from=none,
      visible_until=none,
    )
    x = self.drop(self.embedding(row, catalogue)).astype(self.dtype)
    v = self.item_norm(self.item_project(x))
    return v.reshape(*candidates.shape, self.d_model)


def value(
  logits: Mapping[str, Float[Array, "B R"]], weights: Mapping[str, float]
) -> Float[Array, "B R"]:
  """The reward: Σ w · σ(logit) over heads.

  Raises:
    ValueError: a weight of a head there is not.
  """
  unknown = sorted(set(weights) - set(logits))
  if unknown or not weights:
    raise ValueError(
      f"weights of {unknown or 'no head at all'}; this reward model has "
      f"{sorted(logits)}"
    )
  return sum(w * jax.nn.sigmoid(logits[head]) for head, w in weights.items())


def known_label(batch: batch_lib.Batch, *names: str) -> Float[Array, "B T"]:
  """The first of these labels that the batch has.

  Raises:
    ValueError: it has none of them.
  """
  for name in names:
    if name in batch.labels:
      return batch.labels[name]
  have = f"the data have {sorted(batch.labels)}"
  if not batch.labels:
    have = "the batch has none: set --config.pipeline.labels=True"
  raise ValueError(
    f"no label {' or '.join(names)}, a flag of the events; {have}, or leave "
    "the objective out of --config.model.objectives"
  )


def backbone_parameters(model: RewardModel) -> int:
  """Parameters of the target-attention blocks' matrices."""
  D = model.d_model
  return model.num_layers * (3 * D**2 + 3 * D * model.d_ff)


def backbone_cost(model: RewardModel, positions: int, candidates: int) -> int:
  """Multiply-adds of `RewardModel.aware` for one row.

  Args:
    model: the model.
    positions: S.
    candidates: items looked at, R · N.
  """
  D = model.d_model
  if model.pathways.on:
    reading, positions = pathways_lib.cost(model)
  else:
    reading = positions * context_lib.width(model) * D
  of_item = 2 * D**2 + 3 * D * model.d_ff + 2 * positions * D
  blocks = positions * 2 * D**2 + candidates * of_item
  items = candidates * context_lib.width(model) * D
  return reading + items + model.num_layers * blocks
