"""Norm, projections, lookup, SwiGLU; dropout masks as random numbers."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from onerec_jax.models import layers


def normal(*shape, seed=0):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def test_rms_norm():
  x, scale = normal(3, 4, 8), normal(8, seed=1)
  found = layers.RMSNorm().apply({"params": {"scale": scale}}, x)
  x = np.asarray(x, np.float64)
  for i, j in np.ndindex(3, 4):
    rms = np.sqrt(sum(v * v for v in x[i, j]) / 8 + 1e-6)
    np.testing.assert_allclose(found[i, j], x[i, j] / rms * scale, rtol=1e-5)


def test_rms_norm_of_bfloat16_keeps_small_entries():
  """Squares are summed in float32: 256 + 255 ones is 511, not 256."""
  x = jnp.ones((1, 512), jnp.bfloat16).at[0, 0].set(16.0)
  found = layers.RMSNorm().apply({"params": {"scale": jnp.ones(512)}}, x)
  assert found.dtype == jnp.bfloat16
  rms = np.sqrt((256 + 511) / 512)
  np.testing.assert_allclose(np.float32(found[0, 1]), 1 / rms, rtol=4e-3)


def test_swiglu():
  F = 3
  wi, wo, x = normal(4, 2 * F), normal(F, 4, seed=1), normal(5, 4, seed=2)
  params = {"wi": {"kernel": wi}, "wo": {"kernel": wo}}
  found = layers.SwiGLU(F).apply({"params": params}, x)
  gate, value = x @ wi[:, :F], x @ wi[:, F:]
  expected = (gate / (1 + np.exp(-gate)) * value) @ wo
  np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_swiglu_are_those_of_its_formula():
  """As JAX differentiates it, of plain matrices."""
  F = 3
  wi, wo, x = normal(4, 2 * F), normal(F, 4, seed=1), normal(2, 5, 4, seed=2)

  def by_layer(x, wi, wo):
    params = {"wi": {"kernel": wi}, "wo": {"kernel": wo}}
    return jnp.sum(jnp.sin(layers.SwiGLU(F).apply({"params": params}, x)))

  def by_hand(x, wi, wo):
    rows = x.reshape(-1, 4)
    gate, value = rows @ wi[:, :F], rows @ wi[:, F:]
    return jnp.sum(jnp.sin((gate / (1 + jnp.exp(-gate)) * value) @ wo))

  found = jax.jit(jax.grad(by_layer, argnums=(0, 1, 2)))(x, wi, wo)
  expected = jax.grad(by_hand, argnums=(0, 1, 2))(x, wi, wo)
  for one, other in zip(found, expected, strict=True):
    np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
  ("dtype", "tolerance"), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("shape", [(6,), (3, 6), (2, 3, 4, 6)])
def test_matmul_has_the_gradients_of_a_product_of_matrices(
  shape, dtype, tolerance
):
  x, weight = normal(*shape).astype(dtype), normal(6, 5, seed=1).astype(dtype)
  out = normal(*shape[:-1], 5, seed=2).astype(dtype)
  found, back = jax.vjp(layers.matmul, x, weight)
  assert found.shape == out.shape
  of_x, of_weight = back(out)
  assert of_x.dtype == of_weight.dtype == dtype
  x, weight, out = (np.asarray(y, np.float64) for y in (x, weight, out))
  expected = np.einsum("nd,nf->df", x.reshape(-1, 6), out.reshape(-1, 5))
  close = {"rtol": tolerance, "atol": tolerance}
  np.testing.assert_allclose(of_weight.astype(jnp.float32), expected, **close)
  expected = np.einsum("...f,df->...d", out, weight)
  np.testing.assert_allclose(of_x.astype(jnp.float32), expected, **close)


def test_accelerators_get_the_gradients_of_jax():
  """Nothing flattened, no barrier: what a CPU gets, and a TPU would pay for."""
  x, wi, wo = normal(2, 3, 4, 6), normal(6, 10, seed=1), normal(5, 6, seed=2)

  def loss(wi, wo):
    params = {"wi": {"kernel": wi}, "wo": {"kernel": wo}}
    return jnp.sum(layers.SwiGLU(5).apply({"params": params}, x))

  traced = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(wi, wo)
  cpu, tpu, gpu = (
    traced.lower(lowering_platforms=(name,)).as_text()
    for name in ("cpu", "tpu", "cuda")
  )
  for program in tpu, gpu:
    assert program.count("contracting_dims = [0, 1, 2] x [0, 1, 2]") == 2
    assert "optimization_barrier" not in program
  assert "contracting_dims = [0, 1, 2]" not in cpu
  assert "optimization_barrier" in cpu


def test_linear_computes_in_the_dtype_of_its_input_and_starts_by_fan_in():
  layer = layers.Linear(400)
  x = normal(2, 100).astype(jnp.bfloat16)
  kernel = nn.unbox(layer.init(jax.random.key(0), x))["params"]["kernel"]
  assert kernel.dtype == jnp.float32
  assert layer.apply({"params": {"kernel": kernel}}, x).dtype == jnp.bfloat16
  # 40,000 entries: the standard error of the deviation is 0.4%.
  assert np.std(kernel) == pytest.approx(0.1, rel=0.03)


@pytest.mark.parametrize("zero_padding", [True, False])
def test_embedding(zero_padding):
  table = normal(5, 3)
  ids = jnp.asarray([[0, 4, 2], [1, 0, 0]])
  found = layers.Embedding(5, 3, zero_padding=zero_padding).apply(
    {"params": {"table": table}}, ids
  )
  expected = np.asarray(table)[np.asarray(ids)]
  if zero_padding:
    expected[np.asarray(ids) == 0] = 0
  np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
  ("items", "rows"), [(0, 128), (127, 128), (128, 256), (255, 256)]
)
def test_item_tables_are_padded_to_multiples_of_128(items, rows):
  assert layers.table_rows(items) == rows


# Below, a count of n draws at probability p is compared with its normal
# limit at five standard deviations; seeds are fixed, so nothing is flaky.


def _keys(count):
  return jax.random.split(jax.random.key(11), count)


def _near(share, probability, n):
  error = np.sqrt(probability * (1 - probability) / n)
  return abs(share - probability) < 5 * error


@pytest.mark.parametrize("rate", [0.1, 0.3, 0.5, 0.9])
def test_dropout_keeps_the_right_share(rate):
  shape = (40, 50, 64)
  for key in _keys(5):
    keep = np.asarray(layers.dropout_mask(key, shape, rate))
    assert keep.dtype == bool
    assert keep.shape == shape
    assert _near(keep.mean(), 1 - rate, keep.size)
    # No row, column or channel is favoured: chi square of each margin.
    for axis in range(3):
      margin = np.moveaxis(keep, axis, 0).reshape(shape[axis], -1)
      n, p = margin.shape[1], 1 - rate
      chi = ((margin.sum(1) - n * p) ** 2 / (n * p * (1 - p))).sum()
      freedom = shape[axis]
      assert abs(chi - freedom) < 5 * np.sqrt(2 * freedom)


def test_dropout_masks_of_different_keys_are_independent():
  # Keys as flax folds them, and keys that differ in a few bits alone.
  keys = [*_keys(4), *(jax.random.key(i) for i in range(6))]
  keys += [jax.random.fold_in(keys[0], i) for i in range(4)]
  masks = [
    np.asarray(layers.dropout_mask(k, (128, 160), 0.5)).ravel() for k in keys
  ]
  for one, other in itertools.combinations(masks, 2):
    assert _near((one == other).mean(), 0.5, one.size)


def test_dropout_of_different_positions_is_independent():
  for key in _keys(3):
    keep = np.asarray(layers.dropout_mask(key, (256, 512), 0.5))
    flat = keep.ravel()
    for shift in (1, 2, 3, 4, 8, 16, 64, 256, 512, 513, 4096, 65536):
      same = flat[shift:] == flat[:-shift]
      assert _near(same.mean(), 0.5, same.size), shift
    # Parity of three neighbours: a linear generator would fail here.
    parity = keep[:, :-2] ^ keep[:, 1:-1] ^ keep[:, 2:]
    assert _near(parity.mean(), 0.5, parity.size / 3)


def test_dropout_mask_is_the_same_on_every_mesh():
  mesh = Mesh(np.asarray(jax.devices()).reshape(4, 2), ("x", "y"))
  drop = layers.Dropout(0.4)
  x = normal(8, 4, 6)
  run = jax.jit(lambda x, key: drop.apply({}, x, rngs={"dropout": key}))
  key = jax.random.key(5)
  whole = run(x, key)
  rows = NamedSharding(mesh, PartitionSpec("x", None, "y"))
  cut = run(jax.device_put(x, rows), key)
  assert len(cut.sharding.device_set) == 8
  np.testing.assert_array_equal(whole, cut)


def test_dropout_scales_what_it_keeps():
  x = normal(64, 64) + 3.0
  drop = layers.Dropout(0.25)
  found = np.asarray(drop.apply({}, x, rngs={"dropout": jax.random.key(0)}))
  kept = found != 0
  assert _near(kept.mean(), 0.75, kept.size)
  np.testing.assert_allclose(found[kept], np.asarray(x)[kept] / 0.75, rtol=1e-6)
  np.testing.assert_array_equal(drop.apply({}, x), x)
  np.testing.assert_array_equal(
    layers.Dropout(0.0).apply({}, x, rngs={"dropout": jax.random.key(0)}), x
  )
