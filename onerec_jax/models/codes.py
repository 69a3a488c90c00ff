"""Codes in, codes out: what every generator of semantic IDs shares.

The first code's input is BOS; code l's input is the embedding of code l − 1
from a table of its own level, which also tells the position (INFERRED: the
papers give the slots no positions). Every level has a norm and a head of its
own (V2 §3.3).
"""

from typing import Any

import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from onerec_jax.models import layers


class Codes(nn.Module):
  """BOS, the code tables, and the heads.

  Attributes:
    sizes: K of each level.
    d_model: D.
    dtype: compute dtype of the decoder's inputs.
    all_levels: whether the last level has a table too; the decoder never reads
      it, a context that shares these tables does (models/context.py).
  """

  sizes: tuple[int, ...]
  d_model: int
  dtype: Any
  all_levels: bool = False

  def setup(self):
    self.bos = self.param(
      "bos",
      layers.boxed(nn.initializers.normal(1.0), ("norm",)),
      (self.d_model,),
    )
    self.tables = [
      layers.Embedding(
        size, self.d_model, ("codes", "table"), 1.0, zero_padding=False
      )
      for size in (self.sizes if self.all_levels else self.sizes[:-1])
    ]
    self.norms = [layers.RMSNorm() for _ in self.sizes]
    self.heads = [
      layers.Linear(size, ("embed", "codes")) for size in self.sizes
    ]

  def inputs(self, codes: Int[Array, "B T L"]) -> Float[Array, "B T L D"]:
    """BOS and all codes but the last: teacher forcing."""
    bos = jnp.broadcast_to(
      self.bos[None, None], (*codes.shape[:2], self.d_model)
    )
    embedded = [
      self.embed(level, codes[..., level])
      for level in range(len(self.sizes) - 1)
    ]
    return jnp.stack([bos, *embedded], axis=2).astype(self.dtype)

  def embed(
    self, level: int, codes: Int[Array, "*batch"]
  ) -> Float[Array, "*batch D"]:
    """Embeddings of one level's codes, in float32."""
    return self.tables[level](codes)

  def step_input(
    self, level: int, previous: Int[Array, "B W"] | None, rows: int
  ) -> Float[Array, "B W 1 D"]:
    """The input of one level in search.

    Args:
      level: static.
      previous: the codes chosen at level − 1; None at level 0 (BOS, W = 1).
      rows: B.
    """
    if level == 0:
      x = jnp.broadcast_to(self.bos[None, None], (rows, 1, self.d_model))
    else:
      x = self.embed(level - 1, previous)
    return x[:, :, None].astype(self.dtype)

  def logits(
    self, level: int, x: Float[Array, "B T D"]
  ) -> Float[Array, "B T K"]:
    """Logits of one level, in float32.

    Losses and beam scores add differences far below bfloat16's.
    """
    return self.heads[level](self.norms[level](x)).astype(jnp.float32)

  def all_logits(
    self, x: Float[Array, "B T L D"]
  ) -> tuple[Float[Array, "B T _"], ...]:
    """Logits [B, T, K_l] of every level."""
    return tuple(
      self.logits(level, x[:, :, level]) for level in range(len(self.sizes))
    )
