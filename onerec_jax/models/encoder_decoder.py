"""OneRec-V1's encoder-decoder (arXiv 2506.13695 §2.3).

The encoder runs over the context, its blocks those of context.ContextBlock:

  z ← z + SelfAttn(RMSNorm(z));  z ← z + FFN(RMSNorm(z))

The decoder runs over the L codes of a target; each block projects keys and
values of the encoded context anew:

  h ← h + SelfAttn(RMSNorm(h))             causal over the L codes
  h ← h + CrossAttn(RMSNorm(h), Z)
  h ← h + FFN(RMSNorm(h))                  or experts

INFERRED: a pre-norm before all three (the report prints the last one's only)
and a final norm of the encoder. OneRec's own model (arXiv 2502.18965 §1.3) is
the same with softmax-gated experts.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jaxtyping import Array, Float

from onerec_jax import model_configs
from onerec_jax.data import batch as batch_lib
from onerec_jax.models import attention, fused_attention, generator, layers, moe
from onerec_jax.models import context as context_lib
from onerec_jax.partitioning import constrain


@struct.dataclass
class Context:
  """The encoded context of a row, as every decoder block reads it.

  Attributes:
    keys: [decoder layers, B, S, H, Z].
    values: likewise.
    bias: [B, H, T, S] distance bias, hidden positions masked.
  """

  keys: Any
  values: Any
  bias: Any


class DecoderBlock(nn.Module):
  """One decoder block; see the module docstring."""

  num_heads: int
  feed_forward: Callable[..., nn.Module]
  dropout: float
  d_model: int
  attend: Callable[..., Array] = attention.cross_attention

  def setup(self):
    D = self.d_model
    self.self_norm, self.cross_norm = layers.RMSNorm(), layers.RMSNorm()
    self.self_qkv = layers.Linear(3 * D, ("embed", "heads"))
    self.self_o = layers.Linear(D, ("heads", "embed"))
    self.cross_q = layers.Linear(D, ("embed", "heads"))
    self.cross_kv = layers.Linear(2 * D, ("embed", "heads"))
    self.cross_o = layers.Linear(D, ("heads", "embed"))
    self.ffn_norm = layers.RMSNorm()
    self.ffn = self.feed_forward()
    self.drop = layers.Dropout(self.dropout)

  def _heads(self, x):
    return x.reshape(*x.shape[:-1], self.num_heads, -1)

  def project(
    self, z: Float[Array, "B S D"]
  ) -> tuple[Float[Array, "B S H Z"], Float[Array, "B S H Z"]]:
    """This block's keys and values of the encoded context."""
    keys, values = jnp.split(self.cross_kv(z), 2, axis=-1)
    return self._heads(keys), self._heads(values)

  def __call__(
    self,
    x: Float[Array, "B T N D"],
    keys: Float[Array, "B S H Z"],
    values: Float[Array, "B S H Z"],
    bias: Float[Array, "B H #T S"],
    real: Float[Array, "B T"],
    past: tuple[Array, Array] | None,
  ) -> tuple[Float[Array, "B T N D"], tuple[Array, Array]]:
    """Runs N new code positions of each target.

    Args:
      x: their hidden states.
      keys: of the context, by `project`.
      values: likewise.
      bias: distance bias and mask of the context.
      real: 1 at targets, 0 at padding.
      past: self-attention keys and values [B, T, L_past, H, Z] of the earlier
        codes; None at the first.

    Returns:
      The hidden states and the self-attention keys and values so far.
    """
    qkv = jnp.split(self.self_qkv(self.self_norm(x)), 3, axis=-1)
    q, k, v = map(self._heads, qkv)
    if past is not None:
      k = jnp.concatenate([past[0], k], axis=2)
      v = jnp.concatenate([past[1], v], axis=2)
    h = attention.causal_attention(q, k, v).reshape(x.shape)
    x = x + self.drop(self.self_o(h))

    q = self._heads(self.cross_q(self.cross_norm(x)))
    h = self.attend(q, keys, values, bias).reshape(x.shape)
    x = x + self.drop(self.cross_o(h))

    real = jnp.broadcast_to(real[:, :, None], x.shape[:3])
    x = x + self.drop(self.ffn(self.ffn_norm(x), real))
    return constrain(x, ("batch", None, None, None)), (k, v)


class EncoderDecoder(generator.Generator):
  """The model; fields beyond those of Generator are EncoderDecoderConfig's."""

  encoder_layers: int
  decoder_layers: int
  feed_forward: str
  causal_encoder: bool
  moe_encoder: bool

  def setup(self):
    super().setup()
    self.encoder_bias = attention.DistanceBias(self.num_heads)
    attend = fused_attention.CROSS_ATTENTION[self.attention]
    block = layers.remat(context_lib.ContextBlock, self.remat)
    self.encoder = [
      block(self.num_heads, feed_forward, self.dropout, attend)
      for feed_forward in self._encoder_feed_forwards()
    ]
    self.encoder_norm = layers.RMSNorm()
    block = layers.remat(DecoderBlock, self.remat)
    self.decoder = [
      block(self.num_heads, feed_forward, self.dropout, self.d_model, attend)
      for feed_forward in self._feed_forwards(self.decoder_layers, self.moe)
    ]

  def _encoder_feed_forwards(self):
    experts = self.moe if self.moe_encoder else model_configs.MoEConfig()
    return self._feed_forwards(self.encoder_layers, experts)

  def _feed_forwards(self, num_layers, experts):
    dense = functools.partial(DENSE[self.feed_forward], self.d_ff)
    return moe.feed_forwards(experts, dense, num_layers)

  def encode(
    self,
    batch: batch_lib.Batch,
    catalogue: batch_lib.Catalogue,
  ) -> Context:
    """Runs the encoder; projects keys and values for every decoder block."""
    inputs = self.read(batch, catalogue)
    real = (inputs.segment > 0).astype(jnp.float32)
    distance, mask = inputs.between(self.causal_encoder)
    bias = self.encoder_bias(distance, mask, inputs.static)
    z = inputs.features
    for block in self.encoder:
      z = constrain(block(z, bias, real), ("batch", None, None))
    z = self.encoder_norm(z)
    keys, values = zip(*(block.project(z) for block in self.decoder))
    bias = self.bias_of_targets(inputs)
    return Context(jnp.stack(keys), jnp.stack(values), bias)

  def _decode(self, x, context, real, past):
    presents = []
    for layer, block in enumerate(self.decoder):
      own = None if past is None else (past[0][layer], past[1][layer])
      x, present = block(
        x, context.keys[layer], context.values[layer], context.bias, real, own
      )
      presents.append(present)
    return x, jax.tree.map(lambda *leaves: jnp.stack(leaves), *presents)


DENSE = {"swiglu": layers.SwiGLU, "mlp": layers.MLP}
"""What `feed_forward` may be."""
_MATRICES = {"swiglu": 3, "mlp": 2}


def _feed_forward_parameters(model: EncoderDecoder) -> tuple[int, int]:
  """Active parameters of all feed-forwards: of the encoder, of the decoder."""
  D = model.d_model
  dense = _MATRICES[model.feed_forward] * D * model.d_ff
  experts = model.moe if model.moe_encoder else model_configs.MoEConfig()
  return (
    moe.active_parameters(experts, D, dense, model.encoder_layers),
    moe.active_parameters(model.moe, D, dense, model.decoder_layers),
  )


def block_parameters(model: EncoderDecoder) -> int:
  """Active parameters of the blocks' matrices.

  4·d² of attention an encoder block, 8·d² a decoder block, and feed-forwards.
  """
  attentions = 4 * model.encoder_layers + 8 * model.decoder_layers
  return attentions * model.d_model**2 + sum(_feed_forward_parameters(model))


def forward_flops(
  model: EncoderDecoder, rows: int, positions: int, targets: int
) -> float:
  """Multiply-adds ×2 of one forward pass over a batch, padding included.

  Args:
    model: the model.
    rows: B.
    positions: S.
    targets: T.
  """
  length = len(model.codebook_sizes)
  blocks = decoding_flops(model, rows, positions, targets, length)
  return blocks + head_flops(model, rows * targets)


def decoding_flops(
  model: EncoderDecoder, rows: int, positions: int, sequences: int, length: int
) -> float:
  """Multiply-adds ×2 of encoder and decoder blocks, without heads.

  Args:
    model: the model.
    rows: B.
    positions: S.
    sequences: the decoder runs over so many a row,
    length: each of so many positions.
  """
  D = model.d_model
  in_encoder, in_decoder = _feed_forward_parameters(model)
  reading, positions = generator.context_cost(model, positions)
  of_layer = 4 * D**2 + 2 * positions * D
  encoder = in_encoder + model.encoder_layers * of_layer
  keys_values = model.decoder_layers * 2 * D**2
  scores = 2 * positions * D + (length + 1) * D
  decoder = model.decoder_layers * (6 * D**2 + scores) + in_decoder
  context = reading + positions * (encoder + keys_values)
  return 2.0 * rows * (context + sequences * length * decoder)


def head_flops(model: EncoderDecoder, targets: int) -> float:
  """Multiply-adds ×2 of the logits of so many targets."""
  return 2.0 * targets * model.d_model * sum(model.codebook_sizes)
