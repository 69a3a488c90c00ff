"""Rules, meshes, golden shardings, and what the compiler makes of them."""

import dataclasses
import functools
import json
import math
import os
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from onerec_jax import config as config_lib
from onerec_jax import model_configs, partitioning
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.models import registry
from onerec_jax.scaling import sizes as scaling_sizes
from onerec_jax.training import losses, state
from tests import tiny

GOLDEN = pathlib.Path(__file__).parent / "golden"
UPDATE = "ONEREC_UPDATE_GOLDEN"

MODELS = {
  "lazy_decoder": lambda: tiny.lazy_decoder(kv_split=2, kv_layers=2),
  "lazy_decoder_scan": lambda: tiny.lazy_decoder(
    kv_split=2, kv_layers=2, scan_layers=True, remat="full"
  ),
  "encoder_decoder": lambda: tiny.encoder_decoder(
    encoder_layers=2, decoder_layers=1
  ),
  "session_decoder": lambda: tiny.session_decoder(decoder_layers=1),
  "decoder_only": lambda: tiny.decoder_only(num_layers=2),
  "pathways": lambda: tiny.encoder_decoder(
    decoder_layers=1, pathways=tiny.PATHWAYS, lifelong_queries=8
  ),
  "pathways_experts": lambda: tiny.encoder_decoder(
    decoder_layers=1,
    pathways=tiny.PATHWAYS,
    lifelong_queries=8,
    causal_encoder=False,
    feed_forward="mlp",
    moe=tiny.experts(),
    moe_encoder=True,
  ),
  "experts": lambda: tiny.lazy_decoder(moe=tiny.experts()),
  "sasrec": tiny.sasrec,
  "two_tower": tiny.two_tower,
  "session_reward": lambda: tiny.session_reward(num_layers=1),
  "p_score": lambda: tiny.p_score(num_layers=1),
}
WITH_EXPERTS = ("experts", "pathways_experts", "session_decoder")
IN_OTHERS = ("lazy_decoder", "encoder_decoder")
"""Their gradients are part of `lazy_decoder_scan`'s and of `pathways`'."""


@functools.cache
def shapes_of(name):
  """Shapes of a model's parameters with the names of their axes."""
  model = MODELS[name]()
  return state.abstract_params(model, tiny.batch_of(model), tiny.catalogue())


@pytest.fixture(scope="module")
def mesh():
  return partitioning.make_mesh(config_lib.MeshConfig(2, 2, 1, 2))


@pytest.fixture(scope="module")
def expert_mesh():
  return partitioning.make_mesh(config_lib.MeshConfig(1, 2, 2, 2))


def test_rules_name_axes_of_the_mesh():
  assert len(partitioning.RULES) <= 20
  for name, axes in partitioning.RULES.items():
    axes = (axes,) if isinstance(axes, str) else axes or ()
    assert set(axes) <= set(partitioning.MESH_AXES), name


def test_spec():
  spec = partitioning.spec(("batch", None, "heads", "norm"))
  assert spec == PartitionSpec(("data", "fsdp", "expert"), None, "tensor", None)
  assert partitioning.spec(()) == PartitionSpec()


def test_an_unknown_name_is_refused():
  with pytest.raises(ValueError, match="'width' has no rule"):
    partitioning.spec(("batch", "width"))
  with pytest.raises(ValueError, match="'width' has no rule"):
    partitioning.constrain(jnp.zeros((2, 2)), ("batch", "width"))


@pytest.mark.parametrize(
  "names", [("heads", "mlp"), ("batch", "embed"), ("embed", "embed")]
)
def test_two_names_on_one_mesh_axis_are_refused(names):
  with pytest.raises(ValueError, match="share a mesh axis"):
    partitioning.spec(names)


def boxed(names, *shape):
  return nn.LogicallyPartitioned(
    jax.ShapeDtypeStruct(shape, jnp.float32), names
  )


def test_tree_shardings(mesh):
  tree = {
    "a": boxed(("embed", "mlp"), 4, 6),
    "b": jax.ShapeDtypeStruct((3,), jnp.float32),
  }
  found = partitioning.tree_shardings(tree, mesh)
  assert found["a"].spec == PartitionSpec("fsdp", "tensor")
  assert found["b"].spec == PartitionSpec()
  assert {s.mesh for s in found.values()} == {mesh}


def test_an_axis_that_does_not_divide_is_named(mesh):
  tree = {"layer": {"kernel": boxed(("embed", "mlp"), 4, 5)}}
  with pytest.raises(ValueError, match=r"'layer'.*'kernel'.* size 5 .* 2 dev"):
    partitioning.tree_shardings(tree, mesh)


@pytest.mark.parametrize(
  ("sizes", "expected"),
  [
    ((), (8, 1, 1, 1)),
    ((2, -1, 1, 2), (2, 2, 1, 2)),
    ((2, 1, -1, 2), (2, 1, 2, 2)),
    ((1, 1, 1, -1), (1, 1, 1, 8)),
    ((4, 2, 1, 1), (4, 2, 1, 1)),
  ],
)
def test_make_mesh(sizes, expected):
  mesh = partitioning.make_mesh(config_lib.MeshConfig(*sizes))
  assert tuple(mesh.shape.values()) == expected
  assert tuple(mesh.shape) == partitioning.MESH_AXES
  assert mesh.devices.ravel().tolist() == jax.devices()


@pytest.mark.parametrize(
  ("sizes", "devices"),
  [
    ((3, 1, 1, 1), 8),
    ((2, 2, 1, 1), 8),
    ((-1, 1, 3, 1), 8),
    ((-1, -1, 1, 2), 8),
    ((-1, -1, 1, 1), 1),
    ((-2, -4, 1, 1), 8),
    ((0, -1, 1, 1), 8),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, devices):
  with pytest.raises(ValueError, match=f"does not fit {devices} device"):
    partitioning.make_mesh(
      config_lib.MeshConfig(*sizes), jax.devices()[:devices]
    )


def test_shards():
  assert partitioning.shards("batch") == 1
  mesh = partitioning.make_mesh(config_lib.MeshConfig(1, 2, 4, 1))
  with jax.set_mesh(mesh):
    assert partitioning.shards("batch") == 8
    assert partitioning.shards("expert") == 4
    assert partitioning.shards("norm") == 1
  with pytest.raises(ValueError, match="'width' has no rule"):
    partitioning.shards("width")


@pytest.mark.parametrize("name", MODELS)
def test_golden_shardings(mesh, name):
  """Every parameter's place on a mesh of 2 × 2 × 1 × 2."""
  shardings = partitioning.tree_shardings(shapes_of(name), mesh)
  found = {
    "/".join(key.key for key in path): json.loads(json.dumps([*sharding.spec]))
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings)
  }
  path = GOLDEN / f"sharding_{name}.json"
  if os.environ.get(UPDATE):
    lines = [
      f"  {json.dumps(k)}: {json.dumps(found[k])}" for k in sorted(found)
    ]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")
  assert found == json.loads(path.read_text()), (
    f"shardings of {name} changed; if meant, write {path.name} anew with "
    f"{UPDATE}=1 pytest tests/test_partitioning.py and read the diff"
  )


def test_large_parameters_are_never_replicated(mesh):
  """All matrices but lookup tables of codes and features lie in pieces."""
  for name in MODELS:
    shardings = partitioning.tree_shardings(shapes_of(name), mesh)
    for path, sharding in jax.tree_util.tree_leaves_with_path(shardings):
      key = jax.tree_util.keystr(path)
      if "kernel" in key and "router" not in key:
        used = jax.tree.leaves([axis for axis in sharding.spec if axis])
        assert {*used} - {"expert"} == {"fsdp", "tensor"}, (name, key)
      if "'item'" in key:
        assert sharding.spec[0] == "fsdp"


def _of_size_1b():
  """(shapes, shardings, mesh sizes) of V2's 1B without and with `tensor`."""
  sizes = {"gap": 42, "rating": 7, "user_age": 10}
  config = dataclasses.replace(
    scaling_sizes.lazy_decoder("1B"), feature_embed_dim=50
  )
  model = registry.create(config, 1000, (8192,) * 3, sizes, {"category": 9999})
  column = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  batch = Batch(
    column(8, 512),
    column(8, 512),
    {name: column(8, 512) for name in sizes},
    *(column(8, 5) for _ in range(3)),
  )
  catalogue = Catalogue(column(1001, 3), {"category": column(1001)})
  shapes = state.abstract_params(model, batch, catalogue)
  for mesh_sizes in ((1, 8, 1, 1), (1, 4, 1, 2)):
    mesh = partitioning.make_mesh(config_lib.MeshConfig(*mesh_sizes))
    yield shapes, partitioning.tree_shardings(shapes, mesh), mesh.shape


def test_few_bytes_of_a_real_size_are_replicated():
  """Of 4.5 GB, optimizer state left out, not one in a hundred.

  Without a `tensor` axis the decoder's tables of codes are whole too: 117 MB.
  """
  of_codes = []
  for shapes, shardings, axis_sizes in _of_size_1b():
    whole, everything = {}, 0
    leaves = jax.tree_util.tree_leaves_with_path(nn.unbox(shapes))
    for (path, leaf), sharding in zip(
      leaves, jax.tree.leaves(shardings), strict=True
    ):
      size = leaf.size * leaf.dtype.itemsize
      everything += size
      axes = jax.tree.leaves([axis for axis in sharding.spec if axis])
      if math.prod(axis_sizes[axis] for axis in axes) == 1:
        whole[jax.tree_util.keystr(path)] = size
    assert 4.4e9 < everything < 4.6e9
    of_codes.append(sum(v for k, v in whole.items() if "['tables_" in k))
    assert (sum(whole.values()) - of_codes[-1]) / everything < 0.01
  assert of_codes == [2 * 8192 * 1792 * 4, 0]


def test_constrain_lowers_to_a_constraint_under_a_mesh_alone(mesh):
  x = jnp.zeros((8, 4))
  assert partitioning.constrain(x, ("batch", None)) is x

  def function(x):
    return 2 * partitioning.constrain(x, ("batch", None))

  count = lambda: jax.jit(function).lower(x).as_text().count(
    "sharding_constraint"
  )  # fmt: skip
  assert count() == 0
  with jax.set_mesh(mesh):
    assert count() == 1
    found = jax.jit(function)(x)
  rows = partitioning.batch_sharding(mesh)
  assert found.sharding.is_equivalent_to(rows, 2)


def four_rows(model):
  return jax.tree.map(
    lambda x: jnp.concatenate([x, x[::-1]]),
    tiny.labelled(tiny.batch_of(model)),
  )


def dropped_out(name):
  """(model with dropout, arguments): masks do not depend on the mesh."""
  model = MODELS[name]().clone(dropout=0.2)
  return model, (tiny.params(model), four_rows(model), tiny.catalogue())


def places_on(mesh, name):
  """Shardings of parameters, batch and catalogue."""
  return (
    partitioning.tree_shardings(shapes_of(name), mesh),
    partitioning.batch_sharding(mesh),
    partitioning.replicated(mesh),
  )


def assert_close(found, expected):
  """Up to 2e-4 of the largest entry of an array, small as it may be."""

  def check(a, b):
    largest = float(np.max(np.abs(b)))
    np.testing.assert_allclose(a, b, atol=2e-4 * largest + 1e-7, rtol=2e-4)

  jax.tree.map(check, found, expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_forward_says_where_its_arrays_lie(mesh, name):
  model, args = dropped_out(name)

  def forward(params, batch, catalogue):
    return model.apply({"params": params}, batch, catalogue)

  with jax.set_mesh(mesh):
    run = jax.jit(forward, in_shardings=places_on(mesh, name))
    text = run.lower(*args).as_text()
  # Keys, values of their own and every block; every block, that of the context
  # too; SASRec: the states, two towers: the users; reward models: candidates,
  # every block and every call of the towers.
  constraints = {
    "lazy_decoder": 4, "lazy_decoder_scan": 3, "experts": 3,
    "encoder_decoder": 3, "session_decoder": 2, "decoder_only": 3, "sasrec": 1,
    "pathways": 2, "pathways_experts": 2, "session_reward": 4, "p_score": 4,
    "two_tower": 1,
  }  # fmt: skip
  assert text.count("sharding_constraint") == constraints[name]


def loss_of(model):
  """(parameters, batch, catalogue) → mean loss, and its parts."""
  if hasattr(model, "constrained_softmax"):
    model = model.clone(constrained_softmax=False)
  of_batch = losses.make_loss(model)

  def loss(params, batch, catalogue):
    frequency = jnp.linspace(-3.0, 0.0, len(catalogue.codes))  # two towers'
    sums = of_batch(params, batch, catalogue, frequency, jax.random.key(1))
    return sums["loss"] / sums["count"], sums

  return loss


@pytest.mark.parametrize(
  ("axes", "name"),
  [
    *(
      ("mesh", name)
      for name in MODELS
      if name not in (*WITH_EXPERTS, *IN_OTHERS)
    ),
    *(("expert_mesh", name) for name in WITH_EXPERTS),
  ],
)
def test_sharded_gradients_equal_those_of_one_device(request, axes, name):
  """Loss, loads of experts and every gradient, that of lookups' rows too."""
  mesh = request.getfixturevalue(axes)
  model, args = dropped_out(name)
  grad = jax.value_and_grad(loss_of(model), has_aux=True)
  expected = jax.jit(grad)(*args)
  places = places_on(mesh, name)
  with jax.set_mesh(mesh):
    run = jax.jit(
      grad, in_shardings=places, out_shardings=(places[2], places[0])
    )
    found = run(*jax.device_put(args, places))
  assert_close(found, expected)
  if name in WITH_EXPERTS:
    # Routed tokens are whole numbers: none is lost or counted twice.
    loads = [of[0][1]["loads"] for of in (found, expected)]
    jax.tree.map(np.testing.assert_array_equal, *loads)


@pytest.mark.parametrize(
  ("config", "method"),
  [
    (
      model_configs.LazyDecoderConfig(
        d_model=32, d_ff=64, sid_embed_dim=8, feature_embed_dim=8
      ),
      "encode",
    ),
    (
      model_configs.SASRecConfig(num_layers=1, d_model=32, d_ff=64),
      "states",
    ),
  ],
)
def test_item_lookups_gather_rows_not_the_table(mesh, capfd, config, method):
  """Forward and backward: the table of 1,024 rows stays in its pieces."""
  model = registry.create(config, 1000, (16,) * 3, {"a": 3}, {})
  column = lambda n: jax.ShapeDtypeStruct((8, n), jnp.int32)
  batch = Batch(
    column(24), column(24), {"a": column(24)}, *(column(12) for _ in range(3))
  )
  catalogue = Catalogue(jax.ShapeDtypeStruct((1001, 3), jnp.int32), {})
  shapes = state.abstract_params(model, batch, catalogue)
  places = partitioning.tree_shardings(shapes, mesh)
  rows, whole = partitioning.batch_sharding(mesh), partitioning.replicated(mesh)
  args = (batch,) if method == "states" else (batch, catalogue)

  def loss(params, *args):
    out = model.apply({"params": params}, *args, method=method)
    return sum(jnp.sum(jnp.square(x)) for x in jax.tree.leaves(out))

  with jax.set_mesh(mesh):
    compiled = jax.jit(
      jax.value_and_grad(loss),
      in_shardings=(places, rows, whole)[: 1 + len(args)],
      out_shardings=(whole, places),
    ).lower(nn.unbox(shapes), *args).compile()  # fmt: skip
  text = compiled.as_text()
  assert "f32[512,32]" in text, "a device's piece of the table"
  assert not re.search(r"f32\[(1024,32|32,1024)\]", text)
  assert "rematerialization" not in capfd.readouterr().err
