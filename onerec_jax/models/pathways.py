"""The four user pathways (OneRec-V1 §2.2; V2 §3.2 reads the same).

  static      the user token                                1 position
  short       the latest events                    20, as they are
  positive    the latest events of positive feedback       256, as they are
  lifelong    representatives of the whole history  2,000 → 128 by a Q-Former

Each pathway has an MLP of its own, h = Dense(LeakyReLU(Dense(f))), where f
concatenates the embeddings of a position's features; the context is

  z = [h_static; h_short; h_positive; QFormer(h_lifelong)] + e_pos

with one learned embedding a position: 1 + 20 + 256 + 128 = 405 of them.

INFERRED: pathways share the tables their features are embedded by; the hidden
width is d_model; there are no biases, as nowhere in the house; events stand
oldest first and end at the last position of their pathway, so that a position
always means the same recency; all targets of a row, being of one request, see
all of it.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from onerec_jax import config as config_lib
from onerec_jax.data import batch as batch_lib
from onerec_jax.models import context as context_lib
from onerec_jax.models import layers
from onerec_jax.models import qformer as qformer_lib


class Pathways(nn.Module):
  """Features of a request's positions → positions of the context.

  Attributes:
    lengths: of the pathways.
    d_model: D.
    qformer: reads the lifelong pathway.
  """

  lengths: config_lib.PathwaysConfig
  d_model: int
  qformer: qformer_lib.QFormer

  @nn.compact
  def __call__(
    self, features: Float[Array, "B S C"], seen: Bool[Array, "B S"]
  ) -> tuple[Float[Array, "B S2 D"], Bool[Array, "B S2"]]:
    """Positions of the context, and which of them there are.

    Args:
      features: of the batch's positions, in the order of data/rows.py.
      seen: positions that hold something and are not hidden by dropout.
    """
    D, start, parts, there = self.d_model, 0, [], []
    for name, length in slots(self.lengths):
      stop = start + length
      h = layers.Linear(D, ("context", "projected"), name=f"{name}_in")(
        features[:, start:stop]
      )
      h = layers.Linear(D, ("embed", "mlp"), name=f"{name}_out")(
        nn.leaky_relu(h)
      )
      own = seen[:, start:stop]
      if name == "lifelong":
        h = self.qformer(h, own)
        own = jnp.broadcast_to(jnp.any(own, axis=1, keepdims=True), h.shape[:2])
      parts.append(h)
      there.append(own)
      start = stop
    z = jnp.concatenate(parts, axis=1)
    places = self.param(
      "positions",
      layers.boxed(nn.initializers.normal(0.02), ("vocab", "table")),
      z.shape[1:],
    )
    return z + places.astype(z.dtype)[None], jnp.concatenate(there, axis=1)

  def read(
    self,
    batch: batch_lib.Batch,
    features: Float[Array, "B S C"],
    kept: Bool[Array, "B S"],
  ) -> context_lib.ContextInputs:
    """What `context.plain` gives, of pathways.

    Args:
      batch: one request a row.
      features: of its positions.
      kept: by `context.EventDropout`.

    Raises:
      ValueError: the batch has rows of another length.
    """
    if batch.items.shape[1] != self.lengths.positions:
      raise ValueError(
        f"rows of {batch.items.shape[1]} positions are none of "
        f"{self.lengths}, which have {self.lengths.positions}; make model and "
        "batches from one pipeline.pathways"
      )
    z, there = self(features, (batch.segment > 0) & kept)
    real = batch.visible_until > 0
    return context_lib.ContextInputs(
      features=z,
      segment=there.astype(jnp.int32),
      static=jnp.broadcast_to(jnp.arange(z.shape[1]) == 0, there.shape),
      kept=there,
      visible=real[:, :, None] & there[:, None, :],
      distance=None,
    )


def slots(lengths: config_lib.PathwaysConfig) -> list[tuple[str, int]]:
  """The pathways that are on and their lengths, in the order of a row."""
  given = [("static", 1), *((n, getattr(lengths, n)) for n in EVENTS)]
  return [(name, length) for name, length in given if length]


EVENTS = ("short", "positive", "lifelong")
"""Pathways of events."""


def cost(model: nn.Module) -> tuple[int, int]:
  """Multiply-adds of a request's pathways, and positions they come to.

  Args:
    model: a generator.
  """
  D, lengths = model.d_model, model.pathways
  mlp = context_lib.width(model) * D + D**2
  total, positions = lengths.positions * mlp, lengths.positions
  if lengths.lifelong:
    total += qformer_lib.flops(make(model).qformer, lengths.lifelong, D)
    positions += model.lifelong_queries - lengths.lifelong
  return total, positions


def make(model: nn.Module) -> Pathways:
  """A generator's pathways, from its fields."""
  qformer = qformer_lib.QFormer(
    model.lifelong_queries,
    model.lifelong_layers,
    model.num_heads,
    model.d_ff,
    model.dropout,
    parent=None,
  )
  return Pathways(model.pathways, model.d_model, qformer)
