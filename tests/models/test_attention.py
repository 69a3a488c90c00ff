"""Attention against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from onerec_jax.models import attention, context

cross_attention = jax.jit(attention.cross_attention)
causal_attention = jax.jit(attention.causal_attention)
prefix_attention = jax.jit(attention.prefix_attention)


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def softmax(x):
  e = np.exp(np.asarray(x, np.float64) - np.max(x))
  return e / e.sum()


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shared_bias", [False, True])
def test_cross_attention(groups, shared_bias):
  B, T, L, H, S, Z = 2, 3, 2, 4, 5, 3
  q = normal(B, T, L, H, Z)
  k, v = normal(B, S, groups, Z, seed=1), normal(B, S, groups, Z, seed=2)
  bias = normal(B, H, 1 if shared_bias else T, S, seed=3)
  bias[0, :, 0, 2:4] = attention.MASKED
  found = cross_attention(*map(jnp.asarray, (q, k, v, bias)))
  for b, t, n, h in np.ndindex(B, T, L, H):
    g = h // (H // groups)
    own = bias[b, h, 0 if shared_bias else t]
    scores = [
      q[b, t, n, h] @ k[b, s, g] / np.sqrt(Z) + own[s] for s in range(S)
    ]
    weights = softmax(scores)
    expected = sum(weights[s] * v[b, s, g] for s in range(S))
    np.testing.assert_allclose(
      found[b, t, n, h], expected, rtol=1e-4, atol=1e-5
    )


def test_hidden_positions_weigh_exactly_nothing():
  """Whatever lies there, even far larger than what is seen."""
  q, k = normal(1, 1, 1, 2, 4), normal(1, 6, 2, 4, seed=1)
  bias = np.zeros((1, 2, 1, 6), np.float32)
  bias[..., 3:] = attention.MASKED
  huge = k.copy()
  huge[:, 3:] *= 1e4
  one = cross_attention(*map(jnp.asarray, (q, k, k, bias)))
  other = cross_attention(*map(jnp.asarray, (q, huge, huge, bias)))
  np.testing.assert_array_equal(one, other)


def test_nothing_visible_gives_no_nan():
  q, k = normal(1, 1, 1, 2, 4), normal(1, 6, 2, 4, seed=1)
  bias = jnp.full((1, 2, 1, 6), attention.MASKED)

  def total(q, k):
    return jnp.sum(jnp.square(attention.cross_attention(q, k, k, bias)))

  value, grads = jax.jit(jax.value_and_grad(total, (0, 1)))(q, k)
  assert np.isfinite(value)
  assert all(np.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("shared_bias", [False, True])
def test_gradients_of_tied_keys(shared_bias):
  """Keys that are their own values: the gradients of both, added."""
  B, T, L, H, G, S, Z = 2, 3, 2, 4, 2, 5, 3
  q, k = normal(B, T, L, H, Z), normal(B, S, G, Z, seed=1)
  bias = normal(B, H, 1 if shared_bias else T, S, seed=2)
  weights = normal(B, T, L, H, Z, seed=3)

  def total(q, k, v, bias):
    return jnp.sum(weights * attention.cross_attention(q, k, v, bias))

  def tied(q, k, bias):
    return total(q, k, k, bias)

  of_q, of_k, of_v, of_bias = jax.jit(jax.grad(total, (0, 1, 2, 3)))(
    q, k, k.copy(), bias
  )
  found = jax.jit(jax.grad(tied, (0, 1, 2)))(q, k, bias)
  for got, want in zip(found, (of_q, of_k + of_v, of_bias)):
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("new", [1, 2, 4])
def test_causal_attention(new):
  """The last `new` of four levels, each over itself and those before."""
  B, T, L, H, Z = 2, 3, 4, 2, 3
  q = normal(B, T, new, H, Z)
  k, v = normal(B, T, L, H, Z, seed=1), normal(B, T, L, H, Z, seed=2)
  found = causal_attention(*map(jnp.asarray, (q, k, v)))
  for b, t, n, h in np.ndindex(B, T, new, H):
    seen = L - new + n + 1
    weights = softmax(
      [q[b, t, n, h] @ k[b, t, s, h] / np.sqrt(Z) for s in range(seen)]
    )
    expected = sum(weights[s] * v[b, t, s, h] for s in range(seen))
    np.testing.assert_allclose(
      found[b, t, n, h], expected, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("levels", [3, 9])
def test_causal_attention_keeps_the_type(levels):
  """A scanned block's hidden states must not become float32."""
  x = jnp.asarray(normal(1, 2, levels, 2, 4), jnp.bfloat16)
  assert causal_attention(x, x, x).dtype == jnp.bfloat16


@pytest.mark.parametrize("new", [1, 2, 4])
@pytest.mark.parametrize("shared_bias", [False, True])
def test_prefix_attention(new, shared_bias):
  """The last `new` of four codes after a shared context: one softmax."""
  B, T, L, H, S, Z = 2, 3, 4, 2, 5, 3
  q = normal(B, T, new, H, Z)
  prefix = normal(B, S, H, Z, seed=1), normal(B, S, H, Z, seed=2)
  own = normal(B, T, L, H, Z, seed=3), normal(B, T, L, H, Z, seed=4)
  bias = normal(B, H, 1 if shared_bias else T, S, seed=5)
  bias[0, :, 0, 2:4] = attention.MASKED
  bias[1, :, 0] = attention.MASKED  # a padding target: its codes alone
  found = prefix_attention(*jax.tree.map(jnp.asarray, (q, prefix, bias, own)))
  for b, t, n, h in np.ndindex(B, T, new, H):
    seen = L - new + n + 1
    keys = [*prefix[0][b, :, h], *own[0][b, t, :seen, h]]
    values = [*prefix[1][b, :, h], *own[1][b, t, :seen, h]]
    biases = [*bias[b, h, 0 if shared_bias else t], *[0.0] * seen]
    scores = [
      q[b, t, n, h] @ k / np.sqrt(Z) + more for k, more in zip(keys, biases)
    ]
    expected = sum(w * v for w, v in zip(softmax(scores), values))
    np.testing.assert_allclose(
      found[b, t, n, h], expected, rtol=1e-4, atol=1e-5
    )


def test_attention_weighs_in_float32():
  """Weights of 1/4096 each, whose bfloat16 sum would stop at 256 of them."""
  S = 4096
  q = jnp.zeros((1, 1, 1, 1, 2), jnp.bfloat16)
  k = jnp.ones((1, S, 1, 2), jnp.bfloat16)
  bias = jnp.zeros((1, 1, 1, S))
  found = cross_attention(q, k, k, bias)
  assert found.dtype == jnp.bfloat16
  np.testing.assert_allclose(np.float32(found).ravel(), 1.0, rtol=1e-2)


@pytest.mark.parametrize("causal", [True, False])
def test_between_positions(causal):
  segment = np.asarray([[1, 1, 1, 2, 2, 0], [0, 3, 3, 0, 1, 1]])
  distance, mask = context.between_positions(jnp.asarray(segment), causal)
  assert distance.shape == mask.shape == (2, 6, 6)
  for b, i, j in np.ndindex(2, 6, 6):
    same = segment[b, i] == segment[b, j] and segment[b, i] > 0
    assert mask[b, i, j] == (same and (j <= i or not causal))
    if mask[b, i, j]:
      assert distance[b, i, j] == abs(i - j)


def test_distances_from_what_a_target_saw_last():
  until = np.asarray([[4, 0, 7], [1, 2, 3]])
  found = attention.distances(jnp.asarray(until), 8)
  assert found.shape == (2, 3, 8)
  for b, t, s in np.ndindex(2, 3, 8):
    assert found[b, t, s] == until[b, t] - 1 - s


def test_distance_buckets():
  distances = np.arange(70_000)
  buckets = np.asarray(attention.distance_bucket(jnp.asarray(distances)))
  np.testing.assert_array_equal(buckets[:32], np.arange(32))
  assert (np.diff(buckets) >= 0).all(), "never decreases"
  assert set(buckets) == set(range(attention.NUM_BUCKETS)), "no bucket is empty"
  # Sixteen buckets over 11 octaves from 32 to 65,536.
  for bucket in range(33, 48):
    first = int(np.argmax(buckets == bucket))
    edge = 32 * 2 ** (11 * (bucket - 32) / 16)
    assert first - 1 <= edge <= first + 1


def test_distance_bias_is_masked_and_starts_at_a_slope():
  until = jnp.asarray([[4, 6], [6, 0]])
  static = jnp.zeros((2, 6), bool).at[:, 0].set(True)
  mask = jnp.arange(6)[None, None, :] < until[:, :, None]
  module = attention.DistanceBias(3)
  arguments = attention.distances(until, 6), mask, static
  variables = nn.unbox(jax.jit(module.init)(jax.random.key(0), *arguments))
  bias = np.asarray(jax.jit(module.apply)(variables, *arguments))
  assert bias.shape == (2, 3, 2, 6)
  for b, h, t, s in np.ndindex(bias.shape):
    if s >= until[b, t]:
      assert bias[b, h, t, s] == attention.MASKED
    elif s == 0:
      assert bias[b, h, t, s] == 0  # a user token has no distance
    else:
      distance = int(until[b, t]) - 1 - s
      assert bias[b, h, t, s] == pytest.approx(-0.1 * distance, abs=1e-6)
