"""The naive decoder-only model that OneRec-V2 compares with (§3, Table 2).

One causal Transformer reads a user's context positions and then the codes of
a target; every position passes through every block:

  h ← h + SelfAttn(RMSNorm(h));  h ← h + FFN(RMSNorm(h))

A context is followed by many targets (those of one request, or of many times
under one mask), so the context's keys and values are computed once and each
target's codes attend to the ones it sees and to its own: what running each
target's whole sequence would give, without running the context again.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from onerec_jax.data import batch as batch_lib
from onerec_jax.models import attention, fused_attention, generator, layers, moe
from onerec_jax.partitioning import constrain


@struct.dataclass
class Context:
  """Every block's keys and values of a row's context.

  Attributes:
    keys: [layers, B, S, H, Z].
    values: likewise.
    bias: [B, H, T, S] distance bias, hidden positions masked.
  """

  keys: Any
  values: Any
  bias: Any


class DecoderOnlyBlock(nn.Module):
  """One block; the same weights for context positions and codes."""

  num_heads: int
  feed_forward: Callable[..., nn.Module]
  dropout: float
  d_model: int
  attend: Callable[..., Array] = attention.cross_attention

  def setup(self):
    D = self.d_model
    self.norm, self.ffn_norm = layers.RMSNorm(), layers.RMSNorm()
    self.qkv = layers.Linear(3 * D, ("embed", "heads"))
    self.out = layers.Linear(D, ("heads", "embed"))
    self.ffn = self.feed_forward()
    self.drop = layers.Dropout(self.dropout)

  def project(self, x: Float[Array, "*batch D"]) -> tuple[Array, Array, Array]:
    """Queries, keys and values [..., H, Z]."""
    parts = jnp.split(self.qkv(self.norm(x)), 3, axis=-1)
    return tuple(p.reshape(*p.shape[:-1], self.num_heads, -1) for p in parts)

  def _finish(self, x, attended, real):
    x = x + self.drop(self.out(attended.reshape(x.shape)))
    return x + self.drop(self.ffn(self.ffn_norm(x), real))

  def over_context(
    self,
    z: Float[Array, "B S D"],
    bias: Float[Array, "B H S S"],
    real: Float[Array, "B S"],
  ) -> tuple[Float[Array, "B S D"], tuple[Array, Array]]:
    """Runs the context positions; returns them, and their keys and values."""
    q, k, v = self.project(z)
    z = self._finish(z, self.attend(q[:, :, None], k, v, bias), real)
    return constrain(z, ("batch", None, None)), (k, v)

  def __call__(
    self,
    x: Float[Array, "B T N D"],
    context: tuple[Array, Array],
    bias: Float[Array, "B H #T S"],
    real: Float[Array, "B T"],
    past: tuple[Array, Array] | None,
  ) -> tuple[Float[Array, "B T N D"], tuple[Array, Array]]:
    """Runs N new code positions of each target.

    Args:
      x: their hidden states.
      context: the context's keys and values in this block.
      bias: distance bias and mask of the context.
      real: 1 at targets, 0 at padding.
      past: keys and values [B, T, L_past, H, Z] of the earlier codes; None at
        the first.

    Returns:
      The hidden states and the codes' keys and values so far.
    """
    q, k, v = self.project(x)
    if past is not None:
      k = jnp.concatenate([past[0], k], axis=2)
      v = jnp.concatenate([past[1], v], axis=2)
    h = attention.prefix_attention(q, context, bias, (k, v))
    x = self._finish(x, h, jnp.broadcast_to(real[:, :, None], x.shape[:3]))
    return constrain(x, ("batch", None, None, None)), (k, v)


class DecoderOnly(generator.Generator):
  """The model; fields beyond those of Generator are DecoderOnlyConfig's."""

  num_layers: int

  def setup(self):
    super().setup()
    dense = functools.partial(layers.SwiGLU, self.d_ff)
    attend = fused_attention.CROSS_ATTENTION[self.attention]
    block = layers.remat(
      DecoderOnlyBlock, self.remat, ("__call__", "over_context")
    )
    self.blocks = [
      block(self.num_heads, feed_forward, self.dropout, self.d_model, attend)
      for feed_forward in moe.feed_forwards(self.moe, dense, self.num_layers)
    ]

  def encode(
    self,
    batch: batch_lib.Batch,
    catalogue: batch_lib.Catalogue,
  ) -> Context:
    """Runs the context through all blocks, keeping their keys and values."""
    inputs = self.read(batch, catalogue)
    real = (inputs.segment > 0).astype(jnp.float32)
    distance, mask = inputs.between(causal=True)
    bias = self.distance_bias(distance, mask, inputs.static)
    z = inputs.features
    keys_values = []
    for block in self.blocks[:-1]:
      z, own = block.over_context(z, bias, real)
      keys_values.append(own)
    # Nothing reads what the last block makes of the context but these.
    keys_values.append(self.blocks[-1].project(z)[1:])
    keys, values = (jnp.stack(x) for x in zip(*keys_values))
    return Context(keys, values, self.bias_of_targets(inputs))

  def _decode(self, x, context, real, past):
    presents = []
    for layer, block in enumerate(self.blocks):
      own = None if past is None else (past[0][layer], past[1][layer])
      keys_values = context.keys[layer], context.values[layer]
      x, present = block(x, keys_values, context.bias, real, own)
      presents.append(present)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *presents)


def _feed_forward_parameters(model: DecoderOnly, num_layers: int) -> int:
  dense = 3 * model.d_model * model.d_ff
  return moe.active_parameters(model.moe, model.d_model, dense, num_layers)


def block_parameters(model: DecoderOnly) -> int:
  """Active parameters of the blocks' matrices: 4·d² of attention, SwiGLU."""
  attentions = 4 * model.num_layers * model.d_model**2
  return attentions + _feed_forward_parameters(model, model.num_layers)


def forward_flops(
  model: DecoderOnly, rows: int, positions: int, targets: int
) -> float:
  """Multiply-adds ×2 of one forward pass over a batch, padding included.

  The last block runs the context only up to its keys and values.

  Args:
    model: the model.
    rows: B.
    positions: S.
    targets: T.
  """
  D, N, levels = model.d_model, model.num_layers, len(model.codebook_sizes)
  reading, positions = generator.context_cost(model, positions)
  context = 3 * D**2
  context += (N - 1) * (4 * D**2 + 2 * positions * D)
  context += _feed_forward_parameters(model, N - 1)
  scores = 2 * (positions + levels) * D
  code = block_parameters(model) + N * scores
  heads = D * sum(model.codebook_sizes)
  codes = targets * (levels * code + heads)
  return 2.0 * rows * (reading + positions * context + codes)
