"""User pathways → context: what is known of a user, position by position."""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from onerec_jax.data import batch as batch_lib
from onerec_jax.models import layers

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
