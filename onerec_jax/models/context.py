"""What is known of a user, position by position.

The plain history is read here; pathways.py makes the same `ContextInputs` of
the four user pathways.
"""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from onerec_jax.data import batch as batch_lib
from onerec_jax.models import attention, id_table, layers
from onerec_jax.models import codes as codes_lib

SID_EMBEDDINGS = ("own", "shared", "none")
"""What `sid_embedding` may be."""

FeatureSizes = tuple[tuple[str, int], ...]
"""(name, number of values with 0) of each feature, sorted by name."""


@struct.dataclass
class ContextInputs:
  """What a generator makes its context of.

  Attributes:
    features: [B, S, C] what is known of each position.
    segment: [B, S] 1, 2, … for the users of a row; 0 where there is nothing.
    static: [B, S] positions without a time.
    kept: [B, S] False at what dropout hides.
    visible: [B, T, S] what each target sees.
    distance: [B, T, S] from the last position a target sees back to each; None
      where positions have embeddings.
  """

  features: Any
  segment: Any
  static: Any
  kept: Any
  visible: Any
  distance: Any

  def between(
    self, causal: bool
  ) -> tuple[Int[Array, "B S S"] | None, Bool[Array, "B S S"]]:
    """Distances among positions, and which attend to which."""
    distance, mask = between_positions(self.segment, causal)
    mask = mask & self.kept[:, None, :]
    return (None if self.distance is None else distance), mask


def plain(
  batch: batch_lib.Batch,
  features: Float[Array, "B S C"],
  kept: Bool[Array, "B S"],
) -> ContextInputs:
  """The plain history: targets see a stretch of it, at distances.

  Args:
    batch: rows of users.
    features: of its positions.
    kept: by `EventDropout`.
  """
  return ContextInputs(
    features=features,
    segment=batch.segment,
    static=batch_lib.static(batch),
    kept=kept,
    visible=batch_lib.visible(batch) & kept[:, None, :],
    distance=attention.distances(batch.visible_until, batch.items.shape[1]),
  )


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

  V1's Table 5 compares events read by id with events read by semantic IDs "that
  share embeddings with the output side". INFERRED: shared are the tables that
  the decoder reads its codes from; the last level, which it never reads, gets
  one too. The heads, the output's other matrices, take no part in it.

  Attributes:
    codebook_sizes: K of each level.
    num_items: I.
    sid_embed_dim: width of one level's embedding; 0: none.
    shared: the decoder's codes, whose tables are read instead.
    item_embed_dim: width of the item-id embedding; 0: none.
    item_table_rows: rows that ids are hashed into; 0: one an item.
    feature_embed_dim: width of one feature's embedding.
    features: event and user features of the batch.
    item_features: item features of the catalogue.
  """

  codebook_sizes: tuple[int, ...]
  num_items: int
  sid_embed_dim: int
  shared: codes_lib.Codes | None
  item_embed_dim: int
  item_table_rows: int
  feature_embed_dim: int
  features: FeatureSizes
  item_features: FeatureSizes

  @nn.compact
  def __call__(
    self, batch: batch_lib.Batch, catalogue: batch_lib.Catalogue
  ) -> Float[Array, "B S D"]:
    """Concatenated embeddings; the width depends on what the tables have."""
    parts = self._codes(batch, catalogue)
    if self.item_embed_dim:
      parts.append(
        id_table.ItemTable(
          self.num_items,
          self.item_embed_dim,
          self.item_table_rows,
          name="item",
        )(batch.items)
      )
    for name, size in self.item_features:
      values = jnp.take(catalogue.features[name], batch.items, axis=0)
      parts.append(self._feature(f"item_{name}", size, values))
    for name, size in self.features:
      parts.append(self._feature(name, size, batch.features[name]))
    if self.feature_embed_dim:
      # Tells a user token from an event, and gives an empty history a key.
      token = batch_lib.static(batch).astype(jnp.int32)
      parts.append(self._feature("user_token", 2, token))
    return jnp.concatenate(parts, axis=-1)

  def _codes(self, batch, catalogue):
    """One embedding a level; zeros at user tokens and padding."""
    if not (self.sid_embed_dim or self.shared):
      return []
    is_item = (batch.items > 0)[..., None]
    codes = jnp.take(catalogue.codes, batch.items, axis=0)
    parts = []
    for level, size in enumerate(self.codebook_sizes):
      if self.shared:
        rows = self.shared.embed(level, codes[..., level])
      else:
        rows = layers.Embedding(
          size, self.sid_embed_dim, zero_padding=False, name=f"codes_{level}"
        )(codes[..., level])
      parts.append(jnp.where(is_item, rows, 0.0))
    return parts

  def _feature(self, name, size, values):
    return layers.Embedding(
      size, self.feature_embed_dim, name=f"feature_{name}"
    )(values)


def make_codes(model: nn.Module) -> codes_lib.Codes:
  """A generator's codes, with the tables that its context needs."""
  shares = model.sid_embedding == "shared"
  return codes_lib.Codes(
    model.codebook_sizes, model.d_model, model.dtype, shares
  )


def make_embedding(
  model: nn.Module, codes: codes_lib.Codes
) -> ContextEmbedding:
  """A generator's context embedding, from its fields and its `make_codes`."""
  return ContextEmbedding(
    codebook_sizes=model.codebook_sizes,
    num_items=model.num_items,
    sid_embed_dim=model.sid_embed_dim * (model.sid_embedding == "own"),
    shared=codes if model.sid_embedding == "shared" else None,
    item_embed_dim=_item_width(model),
    item_table_rows=model.item_table_rows,
    feature_embed_dim=model.feature_embed_dim,
    features=model.features,
    item_features=model.item_features,
  )


def _item_width(model: nn.Module) -> int:
  return (model.item_embed_dim or model.d_model) * model.item_embedding


def width(model: nn.Module) -> int:
  """Width of a generator's concatenated context embedding."""
  features = len(model.features) + len(model.item_features) + 1
  of_level = {"own": model.sid_embed_dim, "shared": model.d_model, "none": 0}
  return (
    len(model.codebook_sizes) * of_level[model.sid_embedding]
    + _item_width(model)
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
    attend: attention of positions to positions.
  """

  num_heads: int
  feed_forward: Callable[..., nn.Module]
  dropout: float
  attend: Callable[..., Array] = attention.cross_attention

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
    h = self.attend(q[:, :, None], k, v, bias)
    h = layers.Linear(D, ("heads", "embed"), name="out")(h.reshape(z.shape))
    z = z + drop(h)
    h = layers.RMSNorm(name="ffn_norm")(z)
    return z + drop(self.feed_forward(name="ffn")(h, real))
