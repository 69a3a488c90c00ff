"""User pathways → context: what is known of a user, position by position."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from onerec_jax.data import batch as batch_lib
from onerec_jax.models import attention, layers

FeatureSizes = tuple[tuple[str, int], ...]
"""(name, number of values with 0) of each feature, sorted by name."""


class EventDropout(nn.Module):
  """Which positions stay visible; active iff a `dropout` key is given.

  Attributes:
    rate: share of the events hidden; user tokens always stay.
  """

  rate: float

  @nn.compact
  def __call__(self, batch: batch_lib.Batch) -> Bool[Array, "B S"]:
    """True at what stays."""
    if self.rate == 0.0 or not self.has_rng("dropout"):
      return jnp.ones(batch.items.shape, bool)
    key = self.make_rng("dropout")
    keep = layers.dropout_mask(key, batch.items.shape, self.rate)
    return keep | batch_lib.static(batch)


class ContextEmbedding(nn.Module):
  """Embeds each context position; V2 §3.2, V1 §2.2.

  Concatenates the embeddings of the event's L codes, of its item id, of its
  item's features, of the event's own features and, at user tokens, of the
  user's features; the caller projects. INFERRED from V2's Tables 3-4: three
  semantic-ID embeddings of `sid_embed_dim` and one linear layer.

  Attributes:
    codebook_sizes: K of each level.
    num_items: I.
    sid_embed_dim: width of one level's embedding.
    item_embed_dim: width of the item-id embedding; 0: none.
    feature_embed_dim: width of one feature's embedding.
    features: event and user features of the batch.
    item_features: item features of the catalogue.
  """

  codebook_sizes: tuple[int, ...]
  num_items: int
  sid_embed_dim: int
  item_embed_dim: int
  feature_embed_dim: int
  features: FeatureSizes
  item_features: FeatureSizes

  @nn.compact
  def __call__(
    self, batch: batch_lib.Batch, catalogue: batch_lib.Catalogue
  ) -> Float[Array, "B S D"]:
    """Concatenated embeddings; the width depends on what the tables have."""
    is_item = (batch.items > 0)[..., None]
    parts = []
    codes = jnp.take(catalogue.codes, batch.items, axis=0)
    for level, size in enumerate(self.codebook_sizes):
      rows = layers.Embedding(
        size, self.sid_embed_dim, zero_padding=False, name=f"codes_{level}"
      )(codes[..., level])
      parts.append(jnp.where(is_item, rows, 0.0))
    if self.item_embed_dim:
      parts.append(
        layers.Embedding(
          layers.table_rows(self.num_items),
          self.item_embed_dim,
          ("items", "table"),
          name="item",
        )(batch.items)
      )
    for name, size in self.item_features:
      values = jnp.take(catalogue.features[name], batch.items, axis=0)
      parts.append(self._feature(f"item_{name}", size, values))
    for name, size in self.features:
      parts.append(self._feature(name, size, batch.features[name]))
    # Tells a user token from an event, and gives an empty history a key.
    token = batch_lib.static(batch).astype(jnp.int32)
    parts.append(self._feature("user_token", 2, token))
    return jnp.concatenate(parts, axis=-1)

  def _feature(self, name, size, values):
    return layers.Embedding(
      size, self.feature_embed_dim, name=f"feature_{name}"
    )(values)


def width(model: nn.Module) -> int:
  """Width of a generator's concatenated context embedding."""
  features = len(model.features) + len(model.item_features) + 1
  return (
    len(model.codebook_sizes) * model.sid_embed_dim
    + model.d_model * model.item_embedding
    + features * model.feature_embed_dim
  )


def between_positions(
  segment: Int[Array, "B S"], causal: bool
) -> tuple[Int[Array, "B S S"], Bool[Array, "B S S"]]:
  """How far apart context positions are, and which attend to which.

  Args:
    segment: of the batch; positions attend within their own.
    causal: a position attends to itself and what came before it.

  Returns:
    Distances from the row's position to the column's, and the mask.
  """
  position = jnp.arange(segment.shape[1])
  distance = (position[:, None] - position[None, :])[None]
  mask = (segment[:, :, None] == segment[:, None, :]) & (segment > 0)[..., None]
  if causal:
    mask = mask & (distance >= 0)
  distance = jnp.broadcast_to(jnp.abs(distance), mask.shape)
  return distance, mask


class ContextBlock(nn.Module):
  """Self-attention among context positions, then a feed-forward.

    z ← z + SelfAttn(RMSNorm(z));  z ← z + FFN(RMSNorm(z))

  Attributes:
    num_heads: H.
    feed_forward: makes the feed-forward, given a name.
    dropout: rate.
  """

  num_heads: int
  feed_forward: Callable[..., nn.Module]
  dropout: float

  @nn.compact
  def __call__(
    self,
    z: Float[Array, "B S D"],
    bias: Float[Array, "B H S S"],
    real: Float[Array, "B S"],
  ) -> Float[Array, "B S D"]:
    """Runs the block over every context position."""
    B, S, D = z.shape
    heads = (B, S, self.num_heads, D // self.num_heads)
    drop = layers.Dropout(self.dropout)
    h = layers.RMSNorm(name="norm")(z)
    qkv = layers.Linear(3 * D, ("embed", "heads"), name="qkv")(h)
    q, k, v = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
    h = attention.cross_attention(q[:, :, None], k, v, bias)
    h = layers.Linear(D, ("heads", "embed"), name="out")(h.reshape(z.shape))
    z = z + drop(h)
    h = layers.RMSNorm(name="ffn_norm")(z)
    return z + drop(self.feed_forward(name="ffn")(h, real))
