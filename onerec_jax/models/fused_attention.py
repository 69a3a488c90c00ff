"""Cross-attention of a context's targets as one TPU kernel (Pallas).

What attention.cross_attention computes. There the scores of all queries, in
float32, go through the chip's memory several times, forward and backward; one
context serves few queries, so that this, not arithmetic, bounds a training
step (docs/tpu.md). Here the scores of one context and key head never leave the
chip: a step of the grid reads its queries, keys, values and bias, and writes
what comes of them. The backward pass computes the scores again.

The kernel's rows are a key head's queries, code by code: [L, P, Z] with
P = H / G · T padded to a multiple of 8, the rows of a tile, so that a target's
bias is laid over its L codes without moving data across tiles.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu
from jaxtyping import Array, Float

from onerec_jax import partitioning
from onerec_jax.models import attention

_LANES, _SUBLANES = 128, 8
_VMEM_BYTES = 48 * 2**20
"""Of the vector memory (64 MiB and more on v5e and later), the kernel's."""
_MOST_ROWS = 8
"""Contexts a step of the grid: enough to hide what a step costs by itself."""


def cross_attention(
  queries: Float[Array, "B T L H Z"],
  keys: Float[Array, "B S G Z"],
  values: Float[Array, "B S G Z"],
  bias: Float[Array, "B H #T S"],
) -> Float[Array, "B T L H Z"]:
  """attention.cross_attention; that one itself where the kernel does not fit.

  Keys that are their own values are read once: pass the same array twice.
  """
  B, T, L, H, Z = queries.shape
  G, S = keys.shape[2], keys.shape[1]
  heads = partitioning.shards("heads")
  rows = H // G * T
  fits = (
    bias.shape[2] == T
    and B % partitioning.shards("batch") == 0
    and G % heads == 0
    and _step_bytes(rows, L, S, Z, _together(G // heads, Z)) <= _VMEM_BYTES
  )
  if not fits:
    return attention.cross_attention(queries, keys, values, bias)
  padded = -(-rows // _SUBLANES) * _SUBLANES
  pad = ((0, 0), (0, 0), (0, padded - rows), (0, 0))
  scale = np.asarray(Z**-0.5, queries.dtype)
  q = (queries * scale).reshape(B, T, L, G, H // G, Z)
  q = q.transpose(2, 0, 3, 4, 1, 5).reshape(L, B, G, rows, Z)
  q = jnp.pad(q, ((0, 0), *pad)).transpose(1, 2, 0, 3, 4)
  biases = jnp.pad(bias.reshape(B, G, rows, S), pad)
  tied = values is keys
  flat = [x.reshape(B, S, G * Z) for x in ((keys,) if tied else (keys, values))]
  out = _on_mesh(q.reshape(B, G, L * padded, Z), biases, *flat)
  # Worth keeping where products are: no product of this program, but one.
  out = checkpoint_name(out, "attended")
  out = out.reshape(B, G, L, padded, Z)[:, :, :, :rows]
  out = out.reshape(B, G, L, H // G, T, Z).transpose(0, 4, 2, 1, 3, 5)
  return out.reshape(B, T, L, H, Z)


CROSS_ATTENTION = {
  "plain": attention.cross_attention,
  "fused": cross_attention,
}
"""What a generator's `attention` may be."""


def _together(G: int, Z: int) -> int:
  """Key heads a step of the grid: their widths fill whole lanes."""
  heads = math.lcm(Z, _LANES) // Z
  return heads if G % heads == 0 else G


def _step_bytes(rows: int, L: int, S: int, Z: int, heads: int) -> int:
  """Vector memory of one context in the backward pass, generously."""
  padded = -(-rows // _SUBLANES) * _SUBLANES
  scores = 5 * 4 * L * padded * S
  # In two buffers each: keys, values and their gradients; the bias and its.
  context = 2 * 4 * 4 * S * heads * max(Z, _LANES)
  biases = 2 * 2 * 4 * heads * padded * S
  own = 2 * 4 * 4 * heads * L * padded * max(Z, _LANES)
  return scores + context + biases + own


def _on_mesh(q, bias, *keys_values):
  """Each device its own contexts and key heads."""
  if jax.sharding.get_abstract_mesh().size <= 1:
    return _attend(q, bias, *keys_values)
  own = partitioning.spec(("batch", "heads", None, None))
  flat = partitioning.spec(("batch", None, "heads"))
  return jax.shard_map(
    _attend,
    in_specs=(own, own, *[flat] * len(keys_values)),
    out_specs=own,
    # What a kernel gives is not known to vary over the mesh.
    check_vma=False,
  )(q, bias, *keys_values)


@jax.custom_vjp
def _attend(
  q: Float[Array, "B G N Z"],
  bias: Float[Array, "B G P S"],
  *keys_values: Float[Array, "B S D"],
) -> Float[Array, "B G N Z"]:
  """Softmax attention; `keys_values` are keys and values, or both at once."""
  own, biases, flat, grid = _specs(q, bias, keys_values[0])
  return _call(
    functools.partial(_forward, len(keys_values)), grid,
    (own, biases, *[flat] * len(keys_values)), (own,),
    (jax.ShapeDtypeStruct(q.shape, keys_values[-1].dtype),),
    4 * q.size * bias.shape[-1],
  )(q, bias, *keys_values)[0]  # fmt: skip


def _attend_forward(*inputs):
  return _attend(*inputs), inputs


def _attend_backward(inputs, gradient):
  q, bias, *keys_values = inputs
  own, biases, flat, grid = _specs(q, bias, keys_values[0])
  specs = (own, biases, *[flat] * len(keys_values))
  return tuple(
    _call(
      functools.partial(_backward, len(keys_values)), grid,
      (*specs, own), specs,
      tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in inputs),
      10 * q.size * bias.shape[-1],
    )(*inputs, gradient)
  )  # fmt: skip


_attend.defvjp(_attend_forward, _attend_backward)


def _specs(q, bias, keys):
  """Blocks of the arrays, and the grid: (contexts, key heads)."""
  B, G, N, Z = q.shape
  P, S = bias.shape[2:]
  heads = _together(G, Z)
  of_one = _step_bytes(P, N // P, S, Z, heads)
  together = min(_MOST_ROWS, max(1, _VMEM_BYTES // of_one))
  contexts = max(n for n in range(1, together + 1) if B % n == 0)
  place = lambda b, g: (b, g, 0, 0)
  own = pl.BlockSpec((contexts, heads, N, Z), place)
  biases = pl.BlockSpec((contexts, heads, P, S), place)
  flat = pl.BlockSpec(
    (contexts, keys.shape[1], heads * Z), lambda b, g: (b, 0, g)
  )
  return own, biases, flat, (B // contexts, G // heads)


def _call(kernel, grid, in_specs, out_specs, out_shape, flops):
  """The kernel on a TPU; elsewhere its interpretation, for tests."""
  # The counts of products are for who reads the compiled program.
  call = functools.partial(
    pl.pallas_call,
    kernel,
    grid=grid,
    in_specs=in_specs,
    out_specs=out_specs,
    out_shape=out_shape,
  )
  compiled = call(
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel"),
      vmem_limit_bytes=2 * _VMEM_BYTES,
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops, bytes_accessed=0, transcendentals=0
    ),
  )
  return lambda *inputs: jax.lax.platform_dependent(
    *inputs, tpu=compiled, default=call(interpret=True)
  )


def _each(q_ref, body):
  """Runs `body(context, head, lanes of the head)` for a block's contexts."""
  contexts, heads, _, Z = q_ref.shape

  def of_context(b, _):
    for head in range(heads):
      body(b, head, slice(head * Z, (head + 1) * Z))
    return _

  jax.lax.fori_loop(0, contexts, of_context, None)


def _weights(q, keys, bias):
  """Softmax over the context in float32."""
  scores = _product(q, keys, 1, 1)
  scores += jnp.concatenate([bias] * (len(q) // len(bias)), axis=0)
  weights = jnp.exp(scores - jnp.max(scores, axis=-1, keepdims=True))
  return weights / jnp.sum(weights, axis=-1, keepdims=True)


def _product(a, b, of_a: int, of_b: int):
  """Sums over an axis of each, in float32."""
  return jax.lax.dot_general(
    a, b, (((of_a,), (of_b,)), ((), ())), preferred_element_type=jnp.float32
  )


def _forward(count, q_ref, bias_ref, *refs):
  key_ref, value_ref, out_ref = refs[0], refs[count - 1], refs[count]

  def one(b, head, lanes):
    weights = _weights(q_ref[b, head], key_ref[b, :, lanes], bias_ref[b, head])
    values = value_ref[b, :, lanes]
    out = _product(weights.astype(values.dtype), values, 1, 0)
    out_ref[b, head] = out.astype(out_ref.dtype)

  _each(q_ref, one)


def _backward(count, q_ref, bias_ref, *refs):
  key_ref, value_ref, gradient_ref = refs[0], refs[count - 1], refs[count]
  dq_ref, dbias_ref, *dkeys_values = refs[count + 1 :]

  def one(b, head, lanes):
    q, keys = q_ref[b, head], key_ref[b, :, lanes]
    values, gradient = value_ref[b, :, lanes], gradient_ref[b, head]
    bias = bias_ref[b, head]
    weights = _weights(q, keys, bias)
    dvalues = _product(weights.astype(gradient.dtype), gradient, 0, 0)
    dweights = _product(gradient, values, 1, 1)
    mean = jnp.sum(weights * dweights, axis=-1, keepdims=True)
    dscores = weights * (dweights - mean)
    dbias_ref[b, head] = sum(jnp.split(dscores, len(q) // len(bias)))
    dscores = dscores.astype(q.dtype)
    dq_ref[b, head] = _product(dscores, keys, 1, 0).astype(q.dtype)
    dkeys = _product(dscores, q, 0, 0)
    if count == 1:
      found = (dkeys + dvalues,)
    else:
      found = dkeys, dvalues
    for ref, value in zip(dkeys_values, found):
      ref[b, :, lanes] = value.astype(ref.dtype)

  _each(q_ref, one)
