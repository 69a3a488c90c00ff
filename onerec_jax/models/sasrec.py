"""SASRec (Kang & McAuley 2018), the sequential baseline.

A causal Transformer over the user's events; an item's score is the product of
the state after the last visible event with the item's embedding. Differences
from the 2018 code, all to make the baseline stronger: pre-RMSNorm, a learned
bias by distance instead of absolute positions, full softmax by default.

While training, a position sees all of its segment before it, also beyond
`max_history` events (pipeline.py cuts segments, not each position's window);
in evaluation it sees the last `max_history`.
"""

import functools
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from onerec_jax.data import batch as batch_lib
from onerec_jax.models import attention, layers
from onerec_jax.models import context as context_lib
from onerec_jax.partitioning import constrain


class SASRec(nn.Module):
  """The model; fields in config.SASRecConfig.

  Attributes:
    num_items: I.
    features: (name, size) of event and user features, embedded and added.
    loss: `softmax` or `bce`; read by training/losses.py.
    dtype: compute dtype of matrix products.
  """

  num_items: int
  features: context_lib.FeatureSizes
  num_layers: int
  d_model: int
  num_heads: int
  d_ff: int
  dropout: float
  loss: str
  dtype: Any

  def setup(self):
    self.item = layers.Embedding(
      layers.table_rows(self.num_items), self.d_model, ("items", "table")
    )
    self.feature_embeddings = {
      name: layers.Embedding(size, self.d_model)
      for name, size in (*self.features, ("user_token", 2))
    }
    self.distance_bias = attention.DistanceBias(self.num_heads)
    self.drop = layers.Dropout(self.dropout)
    feed_forward = functools.partial(layers.SwiGLU, self.d_ff)
    self.blocks = [
      context_lib.ContextBlock(self.num_heads, feed_forward, self.dropout)
      for _ in range(self.num_layers)
    ]
    self.norm = layers.RMSNorm()

  def states(self, batch: batch_lib.Batch) -> Float[Array, "B T D"]:
    """The state each target is predicted from."""
    static = batch_lib.static(batch)
    values = dict(batch.features, user_token=static.astype(jnp.int32))
    x = self.item(batch.items) * (self.d_model**0.5)
    for name, embed in self.feature_embeddings.items():
      x = x + embed(values[name])
    x = self.drop(x).astype(self.dtype)
    distance, mask = context_lib.between_positions(batch.segment, causal=True)
    bias = self.distance_bias(distance, mask, static)
    for block in self.blocks:
      x = block(x, bias, (batch.segment > 0).astype(jnp.float32))
    x = constrain(self.norm(x), ("batch", None, None))
    last = jnp.maximum(batch.visible_until - 1, 0)[..., None]
    return jnp.take_along_axis(x, last, axis=1)

  def __call__(
    self,
    batch: batch_lib.Batch,
    catalogue: batch_lib.Catalogue,
  ) -> Float[Array, "B T I_1"]:
    """Same as `item_scores`."""
    return self.item_scores(batch, catalogue)

  def item_scores(
    self,
    batch: batch_lib.Batch,
    catalogue: batch_lib.Catalogue,
  ) -> Float[Array, "B T I_1"]:
    """Scores of all items in float32; column 0 (padding) is −inf."""
    del catalogue
    x = self.states(batch)
    table = self.item.table[: self.num_items + 1]
    scores = x @ table.astype(self.dtype).T
    scores = scores.astype(jnp.float32)  # softmax over I sums small terms
    return jnp.where(jnp.arange(self.num_items + 1)[None, None] > 0,
                     scores, -jnp.inf)  # fmt: skip

  def pair_scores(
    self,
    batch: batch_lib.Batch,
    items: Int[Array, "B T C"],
  ) -> Float[Array, "B T C"]:
    """Scores of the given candidates of each target, in float32."""
    x = self.states(batch)[:, :, None]
    rows = self.item(items).astype(self.dtype)
    return jnp.sum(x * rows, axis=-1).astype(jnp.float32)


def forward_flops(
  model: SASRec, rows: int, positions: int, targets: int
) -> float:
  """Multiply-adds ×2 of one forward pass with the full softmax."""
  D = model.d_model
  block = 4 * D**2 + 3 * D * model.d_ff + 2 * positions * D
  scores = targets * D * (model.num_items + 1)
  return 2.0 * rows * (positions * model.num_layers * block + scores)


def block_parameters(model: SASRec) -> int:
  """Parameters of the blocks' matrices."""
  return model.num_layers * (
    4 * model.d_model**2 + 3 * model.d_model * model.d_ff
  )
