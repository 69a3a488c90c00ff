"""The Q-Former that reads a lifelong history (OneRec-V1 §2.2).

  h ← h + CrossAttn(RMSNorm(h), v, v);  h ← h + FFN(RMSNorm(h))

N queries, learned and the same for every user, take what they want of the
history's positions v. INFERRED: the report prints neither the residuals nor
the first norm; without them a second block would see nothing of the first's
queries. The feed-forward is SwiGLU, as in the rest of the house.
"""

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float

from onerec_jax.models import attention, layers


class Block(nn.Module):
  """One block; see the module docstring."""

  num_heads: int
  d_ff: int
  dropout: float

  @nn.compact
  def __call__(
    self,
    h: Float[Array, "B N D"],
    v: Float[Array, "B S D"],
    bias: Float[Array, "B H 1 S"],
  ) -> Float[Array, "B N D"]:
    """Queries after the block."""
    D, heads = h.shape[-1], self.num_heads
    drop = layers.Dropout(self.dropout)
    x = layers.RMSNorm(name="norm")(h)
    q = layers.Linear(D, ("embed", "heads"), name="q")(x)
    k, values = jnp.split(
      layers.Linear(2 * D, ("embed", "heads"), name="kv")(v), 2, axis=-1
    )
    q, k, values = (x.reshape(*x.shape[:2], heads, -1) for x in (q, k, values))
    x = attention.cross_attention(q[:, None], k, values, bias)
    x = layers.Linear(D, ("heads", "embed"), name="out")(x.reshape(h.shape))
    h = h + drop(x)
    x = layers.RMSNorm(name="ffn_norm")(h)
    return h + drop(layers.SwiGLU(self.d_ff, name="ffn")(x))


class QFormer(nn.Module):
  """A history of any length → a fixed number of positions.

  Attributes:
    num_queries: N; the report has 128.
    num_layers: the report has 2.
    num_heads: H.
    d_ff: F.
    dropout: rate.
  """

  num_queries: int
  num_layers: int
  num_heads: int
  d_ff: int
  dropout: float

  @nn.compact
  def __call__(
    self, v: Float[Array, "B S D"], seen: Bool[Array, "B S"]
  ) -> Float[Array, "B N D"]:
    """The queries' answers.

    Args:
      v: positions of the history.
      seen: which of them there are. Where there is none, the answers are what
        the queries are without a history.
    """
    B, S, D = v.shape
    queries = self.param(
      "queries",
      layers.boxed(nn.initializers.normal(0.02), ("vocab", "table")),
      (self.num_queries, D),
    )
    h = jnp.broadcast_to(queries.astype(v.dtype), (B, *queries.shape))
    bias = jnp.where(seen, 0.0, attention.MASKED)[:, None, None]
    bias = jnp.broadcast_to(bias, (B, self.num_heads, 1, S))
    for layer in range(self.num_layers):
      block = Block(
        self.num_heads, self.d_ff, self.dropout, name=f"layers_{layer}"
      )
      h = block(h, v, bias)
    return h


def flops(model: QFormer, positions: int, width: int) -> int:
  """Multiply-adds of one history of so many positions, D wide."""
  N, D = model.num_queries, width
  queries = N * (2 * D**2 + 3 * D * model.d_ff)
  scores = 2 * N * positions * D
  return model.num_layers * (queries + positions * 2 * D**2 + scores)
