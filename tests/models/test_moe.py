"""Experts against numpy loops, balancing by hand, meshes against a device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from onerec_jax import config as config_lib
from onerec_jax import partitioning
from onerec_jax.models import moe
from tests import tiny

D, F, E = 8, 6, 5
SHAPE = (3, 7)
PADDING = [(0, 6), (2, 3), (2, 4), (2, 5), (2, 6)]


def draw(*shape, seed=0):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def inputs():
  weights = np.ones(SHAPE, np.float32)
  weights[tuple(zip(*PADDING))] = 0
  return draw(*SHAPE, D), jnp.asarray(weights)


def parameters(module, experts=E):
  """Random ones, the bias large enough to change choices."""
  params = {
    "router": {"kernel": draw(D, experts, seed=1) / 2},
    "balance_bias": draw(experts, seed=2) / 3,
    "wi": {"kernel": draw(experts, D, 2 * F, seed=3) / 2},
    "wo": {"kernel": draw(experts, F, D, seed=4) / 2},
  }
  if module.shared_experts:
    width = module.shared_experts * F
    params["shared"] = {
      "wi": {"kernel": draw(D, 2 * width, seed=5) / 2},
      "wo": {"kernel": draw(width, D, seed=6) / 2},
    }
  return params


def apply(module, params, x, weights):
  """(output, loads)."""
  out, sown = module.apply({"params": params}, x, weights, mutable=["loads"])
  return out, sown["loads"]["load"]


run = tiny.jit(apply, static_argnums=0)


def routing(module, params, x, weights):
  """Gates [N, E], 0 where not chosen, by sorting one token at a time."""
  wide = lambda a: np.asarray(a, np.float64)
  gates = np.zeros((x.shape[0], module.num_experts))
  for n, (token, real) in enumerate(zip(wide(x), np.asarray(weights))):
    logits = token @ wide(params["router"]["kernel"])
    affinity = 1 / (1 + np.exp(-logits))
    if module.router == "softmax":
      affinity = np.exp(logits) / np.sum(np.exp(logits))
    score = affinity + wide(params["balance_bias"])
    chosen = sorted(range(module.num_experts), key=lambda e: -score[e])
    chosen = chosen[: module.experts_per_token] if real else []
    total = sum(affinity[e] for e in chosen)
    for e in chosen:
      gates[n, e] = affinity[e] / (total if module.router == "sigmoid" else 1)
  return gates


def swiglu(x, wi, wo, backend=np):
  half = wi.shape[-1] // 2
  gate, value = x @ wi[:, :half], x @ wi[:, half:]
  return (gate / (1 + backend.exp(-gate)) * value) @ wo


def by_loop(module, params, x, weights):
  """(output, loads) by a loop over tokens and experts in float64."""
  rows = np.asarray(x, np.float64).reshape(-1, D)
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  gates = routing(module, params, rows, weights.reshape(-1))
  out = np.zeros_like(rows)
  for n, e in zip(*np.nonzero(gates)):
    kernels = params["wi"]["kernel"][e], params["wo"]["kernel"][e]
    out[n] += gates[n, e] * swiglu(rows[n], *kernels)
  if module.shared_experts:
    shared = params["shared"]
    out += swiglu(rows, shared["wi"]["kernel"], shared["wo"]["kernel"])
  return out.reshape(x.shape), np.sum(gates > 0, axis=0)


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
  alone = tiny.jit(module.apply)({"params": params}, x, weights)
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

  expected = tiny.jit(jax.grad(dense, argnums=(0, 1)))(params, x)
  found = tiny.jit(jax.grad(ours, argnums=(0, 1)))(params, x)
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
  grad = tiny.jit(grad, static_argnums=0)
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
  _, (ratio, loss) = tiny.jit(functools.partial(jax.lax.scan, step))(
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
  expected = tiny.jit(grad)(params, x, weights)
  mesh = partitioning.make_mesh(config_lib.MeshConfig(*sizes))
  boxed = jax.eval_shape(module.init, jax.random.key(0), x, weights)["params"]
  whole = partitioning.replicated(mesh)
  rows = whole if shape[0] % 8 else partitioning.batch_sharding(mesh)
  places = (partitioning.tree_shardings(boxed, mesh), rows, rows)
  with jax.set_mesh(mesh):
    found = tiny.jit(grad, in_shardings=places)(
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
    traced = tiny.jit(
      function, in_shardings=places, out_shardings=tokens
    ).trace(parameters(module, 8), x, weights)
    text = traced.lower().compile().as_text()
  products = re.findall(r"f32\[(\d+),\d+\]\S* = ragged_dot", str(traced.jaxpr))
  assert products == [str(rows)] * 2
  # Those of each device with itself are none.
  found = {
    name
    for name, groups in re.findall(
      r" (all-\w+|reduce-scatter|collective-permute)\(.*replica_groups=(\S+)",
      text,
    )
    if not groups.startswith("{{0},{1},")
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
  init = tiny.jit(lambda *args: nn.unbox(module.init(*args)["params"]))
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
