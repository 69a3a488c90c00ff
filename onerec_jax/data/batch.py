"""The batch: what the pipeline gives and every model takes.

A row of S context positions holds one or more *segments*. A segment is one
user: a *user token* (item 0; carries the user's static features) followed by
that user's events, oldest first. A target sees a range of its own segment's
events and always the segment's user token, so one layout serves next-item
prediction over a whole history, the targets of one request, packing of
several users into one row, and evaluation (one segment, one target a row).
An empty history is a segment of the user token alone.
"""

from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

# Fields hold arrays of the shapes below, but also shapes and shardings inside
# tree maps, so the fields themselves are not checked; functions are.
Leaf = Any


@struct.dataclass
class Batch:
  """One batch of token rows; all int32, 0 is padding.

  Attributes:
    items: [B, S] dense item ids; 0 at user tokens and padding.
    segment: [B, S] 1, 2, … for the users of a row; 0 is padding.
    features: name → [B, S] bucketed feature values; event features at event
      positions, user features at user tokens, 0 elsewhere.
    targets: [B, T] dense item ids to predict; 0 is padding.
    visible_from: [B, T] first event position the target sees.
    visible_until: [B, T] one past the last position it sees; 0 for padding
      targets. Position visible_until - 1 lies in the target's segment.
    labels: name → [B, T] float32, what came of showing a target: flags as 0
      and 1, signals (data/shards.py), `positive`; NaN unknown, 0 at padding.
      `weight`, if there, is the target's in the next-token loss.
  """

  items: Leaf
  segment: Leaf
  features: dict[str, Leaf]
  targets: Leaf
  visible_from: Leaf
  visible_until: Leaf
  labels: dict[str, Leaf] = struct.field(default_factory=dict)


@struct.dataclass
class Catalogue:
  """What is known of the items, on device; row 0 is padding.

  Attributes:
    codes: [I + 1, L] semantic IDs (zeros where a system needs none).
    features: name → [I + 1] bucketed item features (category, author, …).
  """

  codes: Leaf
  features: dict[str, Leaf]


def target_weights(batch: Batch) -> Float[Array, "B T"]:
  """Weights of the next-token loss; 0 at padding."""
  real = (batch.targets > 0).astype(jnp.float32)
  return real * batch.labels.get("weight", 1.0)


def target_segments(batch: Batch) -> Int[Array, "B T"]:
  """Whose target each is; no meaning at padding."""
  # The position before visible_until is in the target's segment by contract.
  last = jnp.maximum(batch.visible_until - 1, 0)
  return jnp.take_along_axis(batch.segment, last, axis=1)


def static(batch: Batch) -> Bool[Array, "B S"]:
  """Which context positions are user tokens: they have no time."""
  return (batch.items == 0) & (batch.segment > 0)


def visible(batch: Batch) -> Bool[Array, "B T S"]:
  """Which context positions each target sees."""
  position = jnp.arange(batch.items.shape[1])[None, None, :]
  own = target_segments(batch)
  same = batch.segment[:, None, :] == own[:, :, None]
  # Padding targets (visible_until = 0) see nothing by this.
  before = position < batch.visible_until[:, :, None]
  recent = position >= batch.visible_from[:, :, None]
  user_token = (batch.items == 0)[:, None, :]
  return same & before & (recent | user_token)
