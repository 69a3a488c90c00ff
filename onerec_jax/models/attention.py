"""Attention with grouped queries, masks and a bias by distance."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from onerec_jax.models import layers

MASKED = -1e9
"""The bias of a hidden position; finite, so that padding targets, which see
nothing, give no NaN. Every real target sees its user token."""

NUM_BUCKETS = 48


def distance_bucket(distance: Int[Array, "*shape"]) -> Int[Array, "*shape"]:
  """Buckets of a distance: exact below 32, then logarithmic up to 65,536."""
  exact = 32
  far = jnp.maximum(distance, exact).astype(jnp.float32) / exact
  scale = (NUM_BUCKETS - exact) / np.log(65536 / exact)
  bucket = exact + (jnp.log(far) * scale).astype(jnp.int32)
  bucket = jnp.where(distance < exact, distance, bucket)
  return jnp.clip(bucket, 0, NUM_BUCKETS - 1)


def distances(
  visible_until: Int[Array, "B T"], positions: int
) -> Int[Array, "B T S"]:
  """From the last position each target sees back to every position.

  Negative at what lies behind it, which no target sees.
  """
  return visible_until[:, :, None] - 1 - jnp.arange(positions)[None, None, :]


class DistanceBias(nn.Module):
  """A learned logit per head and distance from the target to an event.

  INFERRED: the papers give the context no positions. A bias by distance holds
  for any history length and lets one context serve targets at many times.
  It starts at −0.1 a step, so that recent events weigh more.
  """

  num_heads: int

  @nn.compact
  def __call__(
    self,
    distance: Int[Array, "B T S"] | None,
    mask: Bool[Array, "B T S"],
    static: Bool[Array, "B S"],
  ) -> Float[Array, "B H T S"]:
    """Bias plus mask.

    Args:
      distance: from the last position a target sees back to each position;
        None: positions that have embeddings, and so need no bias.
      mask: what a target sees.
      static: positions without a time (user tokens); they have a bucket of
        their own.
    """

    if distance is None:
      B, T, S = mask.shape
      bias = jnp.where(mask[:, None], 0.0, MASKED)
      return jnp.broadcast_to(bias, (B, self.num_heads, T, S))

    def start(key, shape, dtype=jnp.float32):
      del key
      slope = -0.1 * jnp.arange(shape[0], dtype=dtype)[:, None]
      return jnp.broadcast_to(slope.at[-1].set(0.0), shape)

    table = self.param(
      "table",
      layers.boxed(start, ("bucket", "heads")),
      (NUM_BUCKETS + 1, self.num_heads),
    )
    bucket = distance_bucket(distance)
    bucket = jnp.where(static[:, None, :], NUM_BUCKETS, bucket)
    bias = jnp.moveaxis(table[bucket], 3, 1)
    return jnp.where(mask[:, None], bias, MASKED)


def softmax(logits: Float[Array, "*batch S"]) -> Float[Array, "*batch S"]:
  """Softmax over the last axis in float32: bfloat16 sums lose the tail."""
  return jax.nn.softmax(logits.astype(jnp.float32), axis=-1)


def cross_attention(
  queries: Float[Array, "B T L H Z"],
  keys: Float[Array, "B S G Z"],
  values: Float[Array, "B S G Z"],
  bias: Float[Array, "B H #T S"],
) -> Float[Array, "B T L H Z"]:
  """Queries of each target over the context they share.

  H / G query heads share a key/value head. The context is read once for all
  targets (training) or beams (search); it is never repeated.
  """
  B, T, L, H, Z = queries.shape
  G, S = keys.shape[2], keys.shape[1]
  # One matrix product for each row and key head: all its queries at once.
  scale = np.asarray(Z**-0.5, queries.dtype)
  q = (queries * scale).reshape(B, T, L, G, H // G, Z)
  q = q.transpose(0, 3, 4, 1, 2, 5).reshape(B, G, -1, Z)
  k, v = (x.transpose(0, 2, 1, 3) for x in (keys, values))
  bias = bias.reshape(B, G, H // G, -1, 1, S)
  shape = (B, G, H // G, T, L, S)
  if values is keys:
    out = _attend_tied(shape, q, k, bias)
  else:
    out = _weights(shape, q, k, bias) @ v
  out = out.reshape(B, G, H // G, T, L, Z).transpose(0, 3, 4, 1, 2, 5)
  return out.reshape(B, T, L, H, Z)


def _weights(
  shape: tuple[int, ...],
  q: Float[Array, "B G N Z"],
  k: Float[Array, "B G S Z"],
  bias: Float[Array, "B G _ #T 1 S"],
) -> Float[Array, "B G N S"]:
  """Attention weights; `shape` is [B, G, H / G, T, L, S], N all its queries."""
  logits = (q @ k.swapaxes(2, 3)).reshape(shape)
  weights = softmax(logits + bias).astype(k.dtype)
  return weights.reshape(*q.shape[:3], -1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend_tied(shape, q, k, bias):
  """Attention to keys that are their own values (V2's S_kv = 1).

  Their gradient is one matrix product over what scores and weights pass back,
  not two that are added. Where many layers read long keys for few targets,
  these are most of a training step's memory.
  """
  return _weights(shape, q, k, bias) @ k


def _attend_tied_forward(shape, q, k, bias):
  weights = _weights(shape, q, k, bias)
  return weights @ k, (weights, q, k, bias)


def _attend_tied_backward(shape, kept, out):
  weights, q, k, bias = kept
  of_weights = (out @ k.swapaxes(2, 3)).astype(jnp.float32)
  p = weights.astype(jnp.float32)
  of_logits = p * (of_weights - jnp.sum(p * of_weights, -1, keepdims=True))
  of_bias = of_logits.reshape(shape)
  summed = tuple(i for i in range(6) if bias.shape[i] < shape[i])
  of_bias = jnp.sum(of_bias, summed, keepdims=True).astype(bias.dtype)
  of_logits = of_logits.astype(k.dtype)
  # Transposed, the small factor is what a CPU has to copy.
  of_k = jnp.concatenate([q, out], axis=2).swapaxes(2, 3)
  of_k = of_k @ jnp.concatenate([of_logits, weights], axis=2)
  return of_logits @ k, of_k.swapaxes(2, 3), of_bias


_attend_tied.defvjp(_attend_tied_forward, _attend_tied_backward)


def causal_attention(
  queries: Float[Array, "B T N H Z"],
  keys: Float[Array, "B T L H Z"],
  values: Float[Array, "B T L H Z"],
) -> Float[Array, "B T N H Z"]:
  """Self-attention over the code positions of each target.

  The N queries are the last N of the L positions (N = L while training, 1 in
  search). A few levels are written as products of pairs and their sums: 3 or 4
  are far below what a matrix unit or BLAS needs, and XLA on CPU is slow to sum
  over their axis, in the middle of an array.
  A session's many positions are a batched matrix product.
  """
  N, L = queries.shape[2], keys.shape[2]
  if L > _FEW:
    return _causal_products(queries, keys, values)
  rows = []
  queries, keys, values = (_positions(x) for x in (queries, keys, values))
  for n, query in enumerate(queries):
    seen = range(L - N + n + 1)
    query = query / np.sqrt(query.shape[-1])
    logits = [jnp.sum(query * keys[past], axis=-1) for past in seen]
    weights = softmax(jnp.stack(logits, axis=-1)).astype(values[0].dtype)
    rows.append(sum(weights[..., past, None] * values[past] for past in seen))
  return jnp.stack(rows, axis=2)


def _positions(x: Float[Array, "B T L H Z"]) -> list[Float[Array, "B T H Z"]]:
  """Split once, whose gradient is one concatenation; that of an index is a
  padded array for each of its uses, and their sum.
  """
  pieces = jax.lax.split(x, (1,) * x.shape[2], axis=2)
  return [jnp.squeeze(piece, axis=2) for piece in pieces]


_FEW = 8
"""Positions up to which products and sums are the quicker."""


def _causal_products(queries, keys, values):
  """`causal_attention` as matrix products over all pairs of positions."""
  N, L = queries.shape[2], keys.shape[2]
  q = queries * np.asarray(queries.shape[-1] ** -0.5, queries.dtype)
  logits = jnp.einsum("btnhz,btlhz->bthnl", q, keys)
  seen = np.arange(L)[None, :] <= np.arange(L - N, L)[:, None]
  logits = jnp.where(seen[None, None, None], logits, MASKED)
  weights = softmax(logits).astype(values.dtype)
  return jnp.einsum("bthnl,btlhz->btnhz", weights, values)


def prefix_attention(
  queries: Float[Array, "B T N H Z"],
  context: tuple[Float[Array, "B S H Z"], Float[Array, "B S H Z"]],
  bias: Float[Array, "B H #T S"],
  own: tuple[Float[Array, "B T L H Z"], Float[Array, "B T L H Z"]],
) -> Float[Array, "B T N H Z"]:
  """One softmax over a shared context and each target's codes so far.

  What a decoder-only model computes for the last N of L positions that follow
  the context, without repeating the context for each target.

  Args:
    queries: of the last N positions.
    context: keys and values of the context.
    bias: distance bias and mask of the context; codes have none.
    own: keys and values of the L code positions.
  """
  N, L = queries.shape[2], own[0].shape[2]
  q = queries * np.asarray(queries.shape[-1] ** -0.5, queries.dtype)
  far = jnp.einsum("btnhz,bshz->bhtns", q, context[0])
  near = jnp.einsum("btnhz,btlhz->bhtnl", q, own[0])
  seen = np.arange(L)[None, :] <= np.arange(L - N, L)[:, None]
  near = jnp.where(seen[None, None, None], near, MASKED)
  logits = jnp.concatenate([far + bias[:, :, :, None], near], axis=-1)
  weights = softmax(logits).astype(queries.dtype)
  far, near = jnp.split(weights, [context[0].shape[1]], axis=-1)
  return jnp.einsum("bhtns,bshz->btnhz", far, context[1]) + jnp.einsum(
    "bhtnl,btlhz->btnhz", near, own[1]
  )
