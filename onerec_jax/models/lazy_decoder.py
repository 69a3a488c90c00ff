"""OneRec-V2's lazy decoder (arXiv 2508.20900 §3.2-3.3).

A context processor turns every context position into keys and values once;
no layer of the decoder projects them again, and no context position attends
to another. The decoder runs over the L codes of a target alone:

  h ← h + CrossAttn(RMSNorm(h), k, v)      W_q and W_o only
  h ← h + SelfAttn(RMSNorm(h))             causal over the L codes
  h ← h + SwiGLU(RMSNorm(h))

with a norm and a head of its own for every level. One context serves all the
targets of a row, and in search all the beams of a request.
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
  """What the context processor makes of a row; shared by its targets.

  Attributes:
    keys: [L_kv, B, S, G, Z].
    values: likewise; None where kv_split is 1: the keys themselves.
    bias: [B, H, T, S] distance bias, hidden positions masked.
  """

  keys: Any
  values: Any
  bias: Any

  def layer(self, kv_layer: Any) -> tuple[Array, Array]:
    """Keys and values of one key/value layer; one array if they are alike."""
    keys = self.keys[kv_layer]
    return keys, keys if self.values is None else self.values[kv_layer]


def split_context(
  features: Float[Array, "B S C"], kv_layers: int, kv_split: int
) -> Float[Array, "L_kv S_kv B S D"]:
  """Cuts d_context = S_kv · L_kv · G · Z into its chunks C_0, C_1, …

  Chunk l·S_kv gives layer l's keys and, where S_kv is 2, chunk l·S_kv + 1 its
  values (V2 §3.2).
  """
  B, S, C = features.shape
  width = C // (kv_layers * kv_split)
  chunks = features.reshape(B, S, kv_layers, kv_split, width)
  return jnp.moveaxis(chunks, (2, 3), (0, 1))


class LazyDecoderBlock(nn.Module):
  """One block; see the module docstring."""

  num_heads: int
  feed_forward: Callable[..., nn.Module]
  dropout: float
  attend: Callable[..., Array] = attention.cross_attention

  @nn.compact
  def __call__(
    self,
    x: Float[Array, "B T N D"],
    keys: Float[Array, "B S G Z"],
    values: Float[Array, "B S G Z"],
    bias: Float[Array, "B H #T S"],
    real: Float[Array, "B T"],
    past: tuple[Array, Array] | None,
  ) -> tuple[Float[Array, "B T N D"], tuple[Array, Array]]:
    """Runs N new code positions of each target.

    Args:
      x: their hidden states.
      keys: of this block's key/value layer.
      values: likewise.
      bias: distance bias and mask of the context.
      real: 1 at targets, 0 at padding.
      past: self-attention keys and values [B, T, L_past, H, Z] of the earlier
        codes; None at the first.

    Returns:
      The hidden states and the self-attention keys and values so far.
    """
    D = x.shape[-1]
    heads = (*x.shape[:-1], self.num_heads, D // self.num_heads)
    drop = layers.Dropout(self.dropout)

    h = layers.RMSNorm(name="cross_norm")(x)
    q = layers.Linear(D, ("embed", "heads"), name="cross_q")(h).reshape(heads)
    h = self.attend(q, keys, values, bias).reshape(x.shape)
    h = layers.Linear(D, ("heads", "embed"), name="cross_o")(h)
    x = x + drop(h)

    h = layers.RMSNorm(name="self_norm")(x)
    qkv = layers.Linear(3 * D, ("embed", "heads"), name="self_qkv")(h)
    q, k, v = (part.reshape(heads) for part in jnp.split(qkv, 3, axis=-1))
    if past is not None:
      k = jnp.concatenate([past[0], k], axis=2)
      v = jnp.concatenate([past[1], v], axis=2)
    h = attention.causal_attention(q, k, v).reshape(x.shape)
    h = layers.Linear(D, ("heads", "embed"), name="self_o")(h)
    x = x + drop(h)

    h = layers.RMSNorm(name="ffn_norm")(x)
    real = jnp.broadcast_to(real[:, :, None], x.shape[:3])
    h = self.feed_forward(name="ffn")(h, real)
    x = x + drop(h)
    return constrain(x, ("batch", None, None, None)), (k, v)


class _ScannedBlock(nn.Module):
  """A block whose key/value layer is picked by index, for nn.scan.

  Recomputation goes round the picking: round the block alone, every layer
  would keep a copy of the keys it was given (16 GB a chip at 8B).
  """

  num_heads: int
  feed_forward: Callable[..., nn.Module]
  dropout: float
  attend: Callable[..., Array]

  def setup(self):
    self.block = LazyDecoderBlock(
      self.num_heads, self.feed_forward, self.dropout, self.attend
    )

  def __call__(self, x, scanned, context, real):
    kv_layer, past = scanned
    keys, values = context.layer(kv_layer)
    return self.block(x, keys, values, context.bias, real, past)


class LazyDecoder(generator.Generator):
  """The model; fields beyond those of Generator are LazyDecoderConfig's."""

  num_layers: int
  num_kv_heads: int
  kv_layers: int
  kv_split: int
  scan_layers: bool

  projects_pathways = True

  def setup(self):
    super().setup()
    self.key_norms = [layers.RMSNorm() for _ in range(self.kv_layers)]
    if self.kv_split == 2:
      self.value_norms = [layers.RMSNorm() for _ in range(self.kv_layers)]
    feed_forwards = moe.feed_forwards(
      self.moe, functools.partial(layers.SwiGLU, self.d_ff), self.num_layers
    )
    attend = fused_attention.CROSS_ATTENTION[self.attention]
    block = layers.remat(LazyDecoderBlock, self.remat)
    self.layers = [
      block(self.num_heads, feed_forward, self.dropout, attend)
      for feed_forward in feed_forwards[: self._looped]
    ]
    if self.scan_layers:
      self.scanned = nn.scan(
        layers.remat(_ScannedBlock, self.remat),
        variable_axes={"params": 0, "loads": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast, nn.broadcast),
        length=self.num_layers - self._looped,
        metadata_params={nn.PARTITION_NAME: "layers"},
      )(self.num_heads, feed_forwards[-1], self.dropout, attend)

  @property
  def context_width(self) -> int:
    """d_context = S_kv · L_kv · G · Z."""
    head_width = self.d_model // self.num_heads
    return self.kv_layers * self.kv_split * self.num_kv_heads * head_width

  @property
  def _looped(self) -> int:
    """How many blocks run one by one; equal ones after them are scanned."""
    if not self.scan_layers:
      return self.num_layers
    return self.moe.dense_layers if self.moe.num_experts else 0

  def kv_layer(self, layer: int) -> int:
    """Which key/value layer block `layer` reads: ⌊l · L_kv / num_layers⌋.

    l counts from 0 (INFERRED: from 1 the last would be out of range).
    """
    return layer * self.kv_layers // self.num_layers

  def encode(
    self,
    batch: batch_lib.Batch,
    catalogue: batch_lib.Catalogue,
  ) -> Context:
    """The context processor: one linear layer, then a norm per chunk."""
    inputs = self.read(batch, catalogue)
    chunks = split_context(inputs.features, self.kv_layers, self.kv_split)
    # INFERRED: the norm runs over a whole chunk, not over each head.
    heads = (*inputs.segment.shape, self.num_kv_heads, -1)
    keys = jnp.stack(
      [norm(c[0]).reshape(heads) for norm, c in zip(self.key_norms, chunks)]
    )
    names = (None, "batch", None, "heads", None)
    keys, values = constrain(keys, names), None
    if self.kv_split == 2:
      values = jnp.stack(
        [norm(c[1]).reshape(heads) for norm, c in zip(self.value_norms, chunks)]
      )
      values = constrain(values, names)
    return Context(keys, values, self.bias_of_targets(inputs))

  def _decode(self, x, context, real, past):
    """`past` and what comes back: cached keys and values [layers, …]."""
    kv_layers = [self.kv_layer(layer) for layer in range(self.num_layers)]
    presents = []
    for layer, block in enumerate(self.layers):
      own = None if past is None else (past[0][layer], past[1][layer])
      keys, values = context.layer(kv_layers[layer])
      x, present = block(x, keys, values, context.bias, real, own)
      presents.append(jax.tree.map(lambda y: y[None], present))
    if self.scan_layers:
      rest = jax.tree.map(lambda y: y[self._looped :], past)
      scanned = jnp.asarray(kv_layers[self._looped :]), rest
      x, present = self.scanned(x, scanned, context, real)
      presents.append(present)
    return x, jax.tree.map(lambda *leaves: jnp.concatenate(leaves), *presents)


def block_parameters(model: LazyDecoder) -> int:
  """Active parameters of the blocks' matrices: 6·d² of attention, SwiGLU.

  18·d²·layers at the paper's F = 4·d (V2 Table 5).
  """
  D = model.d_model
  feed_forwards = moe.active_parameters(
    model.moe, D, 3 * D * model.d_ff, model.num_layers
  )
  return 6 * model.num_layers * D**2 + feed_forwards


def forward_flops(
  model: LazyDecoder, rows: int, positions: int, targets: int
) -> float:
  """Multiply-adds ×2 of one forward pass over a batch, padding included.

  Args:
    model: the model.
    rows: B.
    positions: S.
    targets: T.
  """
  levels = len(model.codebook_sizes)
  context, positions = generator.context_cost(model, positions)
  blocks = levels * block_parameters(model)
  scores = model.num_layers * levels * 2 * positions * model.d_model
  own = model.num_layers * levels * (levels + 1) * model.d_model
  heads = model.d_model * sum(model.codebook_sizes)
  return 2.0 * rows * (context + targets * (blocks + scores + own + heads))
