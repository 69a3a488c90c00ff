"""Experts against numpy loops, and meshes against a device."""

import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from onerec_jax import config as config_lib
from onerec_jax import partitioning
from onerec_jax.models import layers, moe
from onerec_jax.scaling import hlo
from tests.models.moe_oracle import (
  PADDING,
  SHAPE,
  D,
  E,
  F,
  apply,
  by_loop,
  draw,
  inputs,
  parameters,
  routing,
  run,
  swiglu,
)

CASES = pytest.mark.parametrize(
  ("router", "k", "shared"),
  [
    ("softmax", 1, 0),
    ("softmax", 2, 0),
    ("softmax", 3, 1),
    ("sigmoid", 1, 1),
    ("sigmoid", 2, 2),
    ("sigmoid", 3, 0),
  ],
)


@CASES
def test_output_and_loads_equal_a_loop_over_tokens_and_experts(
  router, k, shared
):
  module = moe.MoE(E, k, F, shared, router)
  x, weights = inputs()
  params = parameters(module)
  found, loads = run(module, params, x, weights)
  expected, counts = by_loop(module, params, x, weights)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert loads.dtype == jnp.float32
  np.testing.assert_array_equal(loads, counts)
  # Without a place for the loads, the same.
  alone = jax.jit(module.apply)({"params": params}, x, weights)
  np.testing.assert_allclose(alone, found, atol=1e-6)


@CASES
def test_gradients_equal_those_of_every_expert_on_every_token(
  router, k, shared
):
  """And an expert without a token gets exactly zero."""
  module = moe.MoE(E, k, F, shared, router)
  x, weights = inputs()
  params = parameters(module)
  params["balance_bias"] = params["balance_bias"].at[2].set(-9.0)
  chosen = routing(module, params, x.reshape(-1, D), weights.reshape(-1)) > 0

  def dense(params, x):
    logits = x.reshape(-1, D) @ params["router"]["kernel"]
    if router == "softmax":
      gates = jax.nn.softmax(logits) * chosen
    else:
      gates = jax.nn.sigmoid(logits) * chosen
      gates /= jnp.sum(gates, axis=1, keepdims=True) + 1e-9
    out = 0.0
    for e in range(E):
      kernels = params["wi"]["kernel"][e], params["wo"]["kernel"][e]
      out += gates[:, e, None] * swiglu(x.reshape(-1, D), *kernels, jnp)
    if shared:
      kernels = (params["shared"][name]["kernel"] for name in ("wi", "wo"))
      out += swiglu(x.reshape(-1, D), *kernels, jnp)
    return jnp.sum(jnp.sin(out) * draw(*out.shape, seed=9))

  def ours(params, x):
    out = module.apply({"params": params}, x, weights).reshape(-1, D)
    return jnp.sum(jnp.sin(out) * draw(*out.shape, seed=9))

  expected = jax.jit(jax.grad(dense, argnums=(0, 1)))(params, x)
  found = jax.jit(jax.grad(ours, argnums=(0, 1)))(params, x)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found, expected
  )
  assert not found[0]["balance_bias"].any()
  for name in ("wi", "wo"):
    assert not found[0][name]["kernel"][2].any()
    assert found[0][name]["kernel"][jnp.asarray([0, 1, 3, 4])].any()


def test_no_token_is_dropped_when_all_want_one_expert():
  module = moe.MoE(E, 1, F, router="softmax")
  x, weights = draw(64, D), jnp.ones(64)
  params = parameters(module)
  params["balance_bias"] = jnp.zeros(E).at[3].set(9.0)
  found, loads = run(module, params, x, weights)
  assert loads.tolist() == [0, 0, 0, 64, 0]
  expected, _ = by_loop(module, params, x, weights)
  np.testing.assert_allclose(found, expected, atol=1e-5)
  assert np.all(np.any(found != 0, axis=-1))


@pytest.mark.parametrize("router", moe.ROUTERS)
def test_the_bias_chooses_but_does_not_weigh(router):
  module = moe.MoE(E, 2, F, router=router)
  x, weights = inputs()
  params = parameters(module)
  bias = params.pop("balance_bias")
  biased = lambda b: run(module, params | {"balance_bias": b}, x, weights)
  out, loads = biased(bias)
  # The same choice with other numbers: the same output.
  same, _ = biased(bias + 0.75)
  np.testing.assert_array_equal(same, out)
  _, unbiased = biased(jnp.zeros(E))
  assert np.any(loads != unbiased)


def test_padding_goes_to_no_routed_expert_and_changes_nothing():
  x, weights = inputs()
  module = moe.MoE(E, 2, F)
  params = parameters(module)
  found, loads = run(module, params, x, weights)
  assert loads.sum() == 2 * (np.prod(SHAPE) - len(PADDING))
  padding = weights == 0
  assert not found[padding].any()
  filled = jnp.where(padding[..., None], 5.0, x)
  other, _ = run(module, params, filled, weights)
  np.testing.assert_array_equal(other, found)


def test_bfloat16_tokens_are_routed_in_float32():
  """Affinities that bfloat16 cannot tell apart decide as in float64."""
  module = moe.MoE(E, 1, F)
  params = parameters(module)
  # Experts 0 and 1 are a hair apart, far above the others.
  kernel = params["router"]["kernel"].at[:, 2:].set(-1.0)
  kernel = kernel.at[:, 1].set(kernel[:, 0] * 1.001)
  params |= {"router": {"kernel": kernel}, "balance_bias": jnp.zeros(E)}
  x = jnp.abs(draw(40, D)).astype(jnp.bfloat16)
  found, loads = run(module, params, x, jnp.ones(40))
  assert found.dtype == jnp.bfloat16
  _, counts = by_loop(module, params, x, jnp.ones(40))
  assert min(counts[:2]) >= 3
  np.testing.assert_array_equal(loads, counts)


MESHES = [(2, 1, 2, 2), (1, 2, 4, 1), (8, 1, 1, 1)]


@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("shape", [(8, 3), (3, 5)])
def test_a_mesh_equals_one_device(sizes, shape):
  """Output, loads and gradients; 15 tokens do not divide over the devices."""
  module = moe.MoE(8, 3, F, 1)
  params, x = parameters(module, 8), draw(*shape, D)
  # Expert 5 gets nothing, and so may a device.
  params["balance_bias"] = params["balance_bias"].at[5].set(-9.0)
  weights = jnp.ones(shape).at[1, 1:].set(0)

  def loss(params, x, weights):
    out, load = apply(module, params, x, weights)
    return jnp.sum(jnp.sin(out) * draw(*out.shape, seed=9)), (out, load)

  grad = jax.value_and_grad(loss, argnums=(0, 1), has_aux=True)
  expected = jax.jit(grad)(params, x, weights)
  mesh = partitioning.make_mesh(config_lib.MeshConfig(*sizes))
  boxed = jax.eval_shape(module.init, jax.random.key(0), x, weights)["params"]
  whole = partitioning.replicated(mesh)
  rows = whole if shape[0] % 8 else partitioning.batch_sharding(mesh)
  places = (partitioning.tree_shardings(boxed, mesh), rows, rows)
  with jax.set_mesh(mesh):
    found = jax.jit(grad, in_shardings=places)(
      *jax.device_put((params, x, weights), places)
    )
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-5),
    found,
    expected,
  )


@pytest.mark.parametrize(
  ("sizes", "collectives", "rows"),
  [
    ((8, 1, 1, 1), set(), 4),
    ((1, 2, 4, 1), {"all-gather", "reduce-scatter"}, 16),
  ],
)
def test_tokens_meet_along_the_expert_axis_alone(sizes, collectives, rows):
  """Of 16 tokens, two copies each: a device's share, or its group's."""
  module = moe.MoE(8, 2, F)
  x, weights = draw(16, D), jnp.ones(16)
  mesh = partitioning.make_mesh(config_lib.MeshConfig(*sizes))
  tokens = partitioning.batch_sharding(mesh)
  places = (partitioning.replicated(mesh), tokens, tokens)
  function = lambda params, *args: module.apply({"params": params}, *args)
  with jax.set_mesh(mesh):
    traced = jax.jit(function, in_shardings=places, out_shardings=tokens).trace(
      parameters(module, 8), x, weights
    )
    text = traced.lower().compile().as_text()
  products = re.findall(r"f32\[(\d+),\d+\]\S* = ragged_dot", str(traced.jaxpr))
  assert products == [str(rows)] * 2
  # Those of each device with itself are none.
  found = {
    name
    for name, attributes in re.findall(
      r" (all-\w+|reduce-scatter|collective-permute)\((.*)", text
    )
    if hlo.replica_groups(attributes).shape[1] > 1
  }
  assert found == collectives


def test_the_parameters_of_experts_lie_over_every_axis_but_data():
  module = moe.MoE(8, 2, F, 1)
  x, weights = inputs()
  boxed = jax.eval_shape(module.init, jax.random.key(0), x, weights)["params"]
  mesh = partitioning.make_mesh(config_lib.MeshConfig(1, 2, 2, 2))
  found = jax.tree.map(
    lambda s: s.spec, partitioning.tree_shardings(boxed, mesh)
  )
  assert found == {
    "router": {"kernel": PartitionSpec("fsdp", None)},
    "balance_bias": PartitionSpec(None),
    "wi": {"kernel": PartitionSpec("expert", "fsdp", "tensor")},
    "wo": {"kernel": PartitionSpec("expert", "tensor", "fsdp")},
    "shared": {
      "wi": {"kernel": PartitionSpec("fsdp", "tensor")},
      "wo": {"kernel": PartitionSpec("tensor", "fsdp")},
    },
  }


def test_each_expert_starts_as_a_linear_layer_and_the_bias_at_zero():
  """10,000 entries an expert: the error of a deviation is under 1%."""
  module = moe.MoE(3, 1, 50)
  init = jax.jit(lambda *args: nn.unbox(module.init(*args)["params"]))
  params = init(jax.random.key(0), jnp.zeros((1, 100)), jnp.ones(1))
  deviations = lambda name: np.std(params[name]["kernel"], axis=(1, 2))
  np.testing.assert_allclose(deviations("wi"), 1 / 100**0.5, rtol=0.04)
  np.testing.assert_allclose(deviations("wo"), 1 / 50**0.5, rtol=0.04)
  assert not params["balance_bias"].any()


def test_forward_flops_by_hand():
  """V2's 4B: 3 routed and 1 shared expert of 1,408 are its dense 5,632."""
  router = 1408 * 53
  swiglu = 3 * 1408 * 5632
  found = moe.forward_flops(10, D=1408, F=1408, k=3, shared=1, E=53)
  assert found == 10 * 2 * (router + swiglu)


@pytest.mark.parametrize(
  ("N", "E", "k", "shared", "places"),
  [
    (512, 4, 2, 0, 1280),
    (512, 4, 3, 1, 1920),
    (512, 16, 2, 0, 1280),
    # 960 rows in tiles of 16, of 24 experts each.
    (480, 24, 2, 1, 1344),
  ],
)
def test_forward_flops_agree_with_the_compiler(N, E, k, shared, places):
  """On CPUs, of so many places in tiles, a quarter more than rows or so."""
  D, F = 128, 192
  module = moe.MoE(E, k, F, shared)
  x = jax.ShapeDtypeStruct((N, D), jnp.float32)
  real = jax.ShapeDtypeStruct((N,), jnp.float32)
  variables = jax.eval_shape(module.init, jax.random.key(0), x, real)
  run = jax.jit(lambda params, *args: module.apply({"params": params}, *args))
  program = run.lower(variables["params"], x, real).compile()
  counted = moe.forward_flops(N, D, F, k, shared, E)
  empty = 2 * (places - k * N) * 3 * D * F
  found = program.cost_analysis()["flops"]
  assert found == pytest.approx(counted + empty, rel=0.03)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1), (2, 1, 2, 2)])
@pytest.mark.parametrize(
  ("policy", "again"), [("none", 0), ("full", 2), ("dots", 0)]
)
def test_products_are_computed_again_where_nothing_is_kept(
  policy, again, sizes
):
  """Two products, and of each the gradients of its two factors."""
  module = layers.remat(moe.MoE, policy)(8, 2, F)
  params, x = parameters(moe.MoE(8, 2, F), 8), draw(16, D)

  def loss(params):
    return jnp.sum(module.apply({"params": params}, x, jnp.ones(16)))

  devices = jax.devices()[: math.prod(sizes)]
  mesh = partitioning.make_mesh(config_lib.MeshConfig(*sizes), devices)
  with jax.set_mesh(mesh):
    program = str(jax.make_jaxpr(jax.grad(loss))(params))
  assert program.count("= ragged_dot") == 2 + 4 + again


@pytest.mark.parametrize(
  ("changes", "match"),
  [
    ({"router": "tanh"}, r"router='tanh'.* want one of"),
    ({"experts_per_token": 6}, "experts_per_token=6 must .* num_experts=5"),
    ({"experts_per_token": 0}, "experts_per_token=0 must"),
  ],
)
def test_experts_that_cannot_be_are_refused(changes, match):
  module = moe.MoE(E, 2, F).clone(**changes)
  with pytest.raises(ValueError, match=match):
    module.init(jax.random.key(0), *inputs())
