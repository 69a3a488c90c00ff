"""Balancing experts by hand, in scanned layers, and while training."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from onerec_jax.models import moe
from tests.models.moe_oracle import (
  D,
  E,
  F,
  apply,
  draw,
  inputs,
  parameters,
)


class _Layer(nn.Module):
  """A residual layer of experts, as nn.scan wants it."""

  @nn.compact
  def __call__(self, x, weights):
    return x + moe.MoE(E, 2, F, name="ffn")(x, weights), None


class _Stack(nn.Module):
  scanned: bool

  @nn.compact
  def __call__(self, x, weights):
    if not self.scanned:
      for layer in range(3):
        x, _ = nn.remat(_Layer)(name=f"layer_{layer}")(x, weights)
      return x
    layers = nn.scan(
      nn.remat(_Layer, prevent_cse=False),
      variable_axes={"params": 0, "loads": 0},
      split_rngs={"params": True},
      in_axes=nn.broadcast,
      length=3,
      metadata_params={nn.PARTITION_NAME: "layers"},
    )
    return layers(name="layers")(x, weights)[0]


def test_scanned_layers_sow_stacked_loads_that_balance_them():
  x, weights = inputs()
  scanned, looped = _Stack(True), _Stack(False)
  shapes = jax.eval_shape(scanned.init, jax.random.key(0), x, weights)
  params = jax.tree.map(
    lambda a: draw(*a.shape, seed=a.ndim) / 3, nn.unbox(shapes["params"])
  )
  pieces = {
    f"layer_{i}": jax.tree.map(lambda a, i=i: a[i], params["layers"])
    for i in range(3)
  }

  def loss(model, params):
    out, sown = model.apply({"params": params}, x, weights, mutable=["loads"])
    return jnp.sum(jnp.square(out)), sown["loads"]

  grad = jax.value_and_grad(loss, argnums=1, has_aux=True)
  grad = jax.jit(grad, static_argnums=0)
  (found, loads), grads = grad(scanned, params)
  (expected, apart), grads_apart = grad(looped, pieces)
  np.testing.assert_allclose(found, expected, rtol=1e-5)
  stack = lambda tree: jax.tree.map(
    lambda *a: jnp.stack(a), *(tree[f"layer_{i}"] for i in range(3))
  )
  load = loads["layers"]["ffn"]["load"]
  np.testing.assert_array_equal(load, stack(apart)["ffn"]["load"])
  close = functools.partial(np.testing.assert_allclose, atol=1e-4)
  jax.tree.map(close, grads["layers"], stack(grads_apart))
  moved = moe.balance(params, loads, 0.5)["layers"]
  moved_apart = stack(moe.balance(pieces, apart, 0.5))
  jax.tree.map(np.testing.assert_array_equal, moved, moved_apart)
  assert moved["ffn"]["balance_bias"].any()
  # Not asked for, nothing is sown.
  alone = jax.eval_shape(scanned.apply, {"params": params}, x, weights)
  assert alone.shape == x.shape


def test_balance_by_hand():
  """Means are 4; in the stack 2 and 1. What is not a bias stays."""
  params = {
    "a": {"ffn": {"balance_bias": jnp.asarray([0.5, 0, 0, -1]), "w": 1.0}},
    "b": {"balance_bias": jnp.zeros((2, 2)), "wi": {"kernel": 2.0}},
    "balance_bias": jnp.asarray([7.0]),
    "c": {},
  }
  loads = {
    "a": {"ffn": {"load": jnp.asarray([4.0, 0, 9, 3])}},
    "b": {"load": jnp.asarray([[1.0, 3], [1, 1]])},
  }
  found = jax.jit(functools.partial(moe.balance, rate=0.25))(params, loads)
  expected = {
    "a": {"ffn": {"balance_bias": [0.5, 0.25, -0.25, -0.75], "w": 1.0}},
    "b": {"balance_bias": [[0.25, -0.25], [0, 0]], "wi": {"kernel": 2.0}},
    "balance_bias": [7.0],
    "c": {},
  }
  assert jax.tree.map(lambda x: x.tolist(), found) == expected
  assert moe.balance(params, {}, 0.25) == params
  with pytest.raises(ValueError, match=r"loads of d/ffn.* no d/ffn/balance_b"):
    moe.balance(params, {"d": {"ffn": {"load": jnp.ones(3)}}}, 0.25)


def test_max_load_by_hand():
  one = {"a": {"load": jnp.asarray([4.0, 0, 9, 3])}}
  two = one | {"b": {"load": jnp.asarray([[1.0, 3], [5, 0], [0, 0]])}}
  assert moe.max_load(one) == 9 / 4
  assert moe.max_load(two) == 9 / 4
  two["b"]["load"] = two["b"]["load"].at[0].set(jnp.asarray([0.0, 1]))
  one["a"]["load"] = jnp.ones(4)
  assert moe.max_load(two | one) == 2
  assert moe.max_load({"b": {"load": jnp.zeros((2, 3))}}) == 0
  with pytest.raises(ValueError, match="no loads"):
    moe.max_load({})


def _train(rate, steps=150):
  """max_load by step, last loss over first; most tokens look alike."""
  module = moe.MoE(8, 2, F)
  params = parameters(module, 8) | {"balance_bias": jnp.zeros(8)}
  weights = jnp.ones(256)

  def step(params, key):
    kinds = jax.random.categorical(
      key, jnp.asarray([2.0, 1.0, 0.0, -1.0, -1.0, -1.0]), shape=(256,)
    )
    x = draw(6, D, seed=7)[kinds]
    x = x + 0.3 * jax.random.normal(key, x.shape)
    target = jnp.sin(2 * x)

    def loss(params):
      out, loads = apply(module, params, x, weights)
      return jnp.mean(jnp.square(out - target)), loads

    (value, load), grads = jax.value_and_grad(loss, has_aux=True)(params)
    params = jax.tree.map(lambda p, g: p - 0.5 * g, params, grads)
    loads = {"load": load}
    params = moe.balance(params, loads, rate)
    return params, (moe.max_load(loads), value)

  keys = jax.random.split(jax.random.key(1), steps)
  _, (ratio, loss) = jax.jit(functools.partial(jax.lax.scan, step))(
    params, keys
  )
  return ratio, loss[-10:].mean() / loss[:10].mean()


def test_balancing_flattens_skewed_loads_while_training():
  """Without the bias the largest load stays above twice the mean."""
  free, free_loss = _train(0.0)
  balanced, balanced_loss = _train(0.02)
  assert free[:5].mean() > 2
  assert free[-20:].mean() > 2
  np.testing.assert_allclose(balanced[0], free[0])
  assert balanced[-20:].mean() < 1.5
  assert free_loss < 0.7
  assert balanced_loss < 0.7
