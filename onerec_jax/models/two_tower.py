"""Two towers: retrieval by one dot product, the first stage of a cascade.

A user's vector u and an item's vector v have unit length; an item's score is
u · v / τ. The item tower reads the item's id and features. The user tower looks
at the history by attention, asked by its latest event:

  x ← x_last + Attn(RMSNorm(x_last), RMSNorm(x_1 … x_last))
  u = unit(x + SwiGLU(RMSNorm(x)))

Trained by a softmax over the items of the batch, each logit less log q of its
item, q the item's share of training events: in-batch negatives come up as often
as they are popular, and without the correction popular items would be pushed
down for it (Yi et al., RecSys 2019, doi 10.1145/3298689.3346996). INFERRED: q
is counted once (that paper estimates it in the stream), and smoothed by one
event an item. Retrieval is exact: every item is scored.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Float, Float32, Int

from onerec_jax.data import batch as batch_lib
from onerec_jax.models import attention, layers
from onerec_jax.models import context as context_lib
from onerec_jax.partitioning import constrain


class TwoTower(nn.Module):
  """The model; fields in model_configs.TwoTowerConfig.

  Attributes:
    num_items: I.
    features: (name, size) of event and user features.
    item_features: (name, size) of item features.
    dtype: compute dtype of matrix products.
  """

  num_items: int
  features: context_lib.FeatureSizes
  item_features: context_lib.FeatureSizes
  d_model: int
  num_heads: int
  d_ff: int
  dropout: float
  temperature: float
  dtype: Any

  def setup(self):
    D = self.d_model
    rows = layers.table_rows(self.num_items)
    self.item = layers.Embedding(rows, D, ("items", "table"))
    self.of_items, self.of_events = (
      {name: layers.Embedding(size, D) for name, size in sizes}
      for sizes in (self.item_features, (*self.features, ("user_token", 2)))
    )
    self.distance_bias = attention.DistanceBias(self.num_heads)
    self.drop = layers.Dropout(self.dropout)
    self.norm = layers.RMSNorm()
    self.query = layers.Linear(D, ("embed", "heads"))
    self.key_value = layers.Linear(2 * D, ("embed", "heads"))
    self.out = layers.Linear(D, ("heads", "embed"))
    self.user_norm, self.item_norm = layers.RMSNorm(), layers.RMSNorm()
    self.user_ffn = layers.SwiGLU(self.d_ff)
    self.item_ffn = layers.SwiGLU(self.d_ff)

  def __call__(
    self, batch: batch_lib.Batch, catalogue: batch_lib.Catalogue
  ) -> Float[Array, "B T I_1"]:
    """Same as `item_scores`."""
    return self.item_scores(batch, catalogue)

  def users(
    self, batch: batch_lib.Batch, catalogue: batch_lib.Catalogue
  ) -> Float[Array, "B T D"]:
    """The user's vector at each target, float32 and of unit length."""
    static = batch_lib.static(batch)
    values = dict(batch.features, user_token=static.astype(jnp.int32))
    x = self._read(batch.items, catalogue)
    for name, embed in self.of_events.items():
      x = x + embed(values[name])
    x = self.drop(x).astype(self.dtype)
    bias = self.distance_bias(
      attention.distances(batch.visible_until, batch.items.shape[1]),
      batch_lib.visible(batch),
      static,
    )
    last = jnp.maximum(batch.visible_until - 1, 0)[..., None]
    asks = jnp.take_along_axis(x, last, axis=1)
    heads = self.num_heads, self.d_model // self.num_heads
    q = self.query(self.norm(asks)).reshape(*asks.shape[:2], 1, *heads)
    k, v = (
      part.reshape(*x.shape[:2], *heads)
      for part in jnp.split(self.key_value(self.norm(x)), 2, axis=-1)
    )
    seen = attention.cross_attention(q, k, v, bias).reshape(asks.shape)
    u = asks + self.drop(self.out(seen))
    u = u + self.drop(self.user_ffn(self.user_norm(u)))
    return constrain(_unit(u), ("batch", None, None))

  def items(
    self, ids: Int[Array, "*batch"], catalogue: batch_lib.Catalogue
  ) -> Float[Array, "*batch D"]:
    """Vectors of items, float32 and of unit length."""
    v = self.drop(self._read(ids, catalogue)).astype(self.dtype)
    return _unit(v + self.drop(self.item_ffn(self.item_norm(v))))

  def item_scores(
    self, batch: batch_lib.Batch, catalogue: batch_lib.Catalogue
  ) -> Float[Array, "B T I_1"]:
    """Scores of all items in float32; column 0 (padding) is −inf."""
    every = jnp.arange(self.num_items + 1)
    scores = self.users(batch, catalogue) @ self.items(every, catalogue).T
    scores = scores / self.temperature
    return jnp.where(every[None, None] > 0, scores, -jnp.inf)

  def _read(self, ids, catalogue):
    """Id and features of items; zeros at 0."""
    x = self.item(ids)
    for name, embed in self.of_items.items():
      x = x + embed(jnp.take(catalogue.features[name], ids, axis=0))
    return x * (self.d_model**0.5)


def _unit(x: Array) -> Array:
  """Of unit length, in float32: a score is a difference of near numbers."""
  x = x.astype(jnp.float32)
  return x / jnp.sqrt(jnp.sum(x**2, axis=-1, keepdims=True) + 1e-12)


def log_frequency(
  counts: Int[np.ndarray, "I_1"],
) -> Float32[np.ndarray, "I_1"]:
  """Logarithm of q from training events; see the module docstring."""
  smoothed = counts.astype(np.float64) + 1
  smoothed[0] = 0  # padding
  with np.errstate(divide="ignore"):
    return np.log(smoothed / smoothed.sum()).astype(np.float32)


def forward_flops(
  model: TwoTower, rows: int, positions: int, targets: int
) -> float:
  """Multiply-adds ×2 of one forward pass with the in-batch softmax."""
  D, ffn = model.d_model, 3 * model.d_model * model.d_ff
  of_target = 2 * D**2 + 2 * positions * D + 2 * ffn + rows * targets * D
  return 2.0 * rows * (positions * 2 * D**2 + targets * of_target)


def block_parameters(model: TwoTower) -> int:
  """Parameters of both towers' matrices."""
  return 4 * model.d_model**2 + 6 * model.d_model * model.d_ff
