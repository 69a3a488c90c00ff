"""Item-id tables with an optimizer and a learning rate of their own."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from onerec_jax import config as config_lib
from onerec_jax import partitioning
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.models import id_table, layers
from onerec_jax.training import optimizer, state, step

RATE, TABLE_RATE = 0.01, 0.3


def config(**fields):
  return config_lib.OptimizerConfig(
    learning_rate=RATE, schedule="constant", warmup_steps=0, clip_norm=1e9,
    **fields,
  )  # fmt: skip


def make(settings):
  schedules = (
    function(settings, 1, 100)
    for function in (optimizer.make_schedule, optimizer.make_table_schedule)
  )
  return optimizer.make_optimizer(settings, *schedules)


def params():
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda shape: rng.normal(size=shape).astype(np.float32),
    {
      "embedding": {"item": {"table": (6, 4)}, "code": {"table": (3, 4)}},
      "project": {"kernel": (4, 2)},
    },
    is_leaf=lambda x: isinstance(x, tuple),
  )


def gradients(steps):
  rng = np.random.default_rng(1)
  for _ in range(steps):
    grads = jax.tree.map(
      lambda x: rng.normal(size=x.shape).astype(np.float32), params()
    )
    table = grads["embedding"]["item"]["table"]
    table[[1, 4]] = 0.0  # no batch ever looks these up
    yield grads


def run(tx, steps):
  current, own = params(), tx.init(params())
  update = jax.jit(tx.update)
  for grads in gradients(steps):
    updates, own = update(grads, own, current)
    current = optax.apply_updates(current, updates)
  return current, own


def test_rowwise_adagrad_equals_loops_in_numpy():
  tx = make(
    config(table_optimizer="rowwise_adagrad", table_learning_rate=TABLE_RATE)
  )
  found, own = run(tx, 5)
  table = params()["embedding"]["item"]["table"].astype(np.float64)
  sums = np.zeros(6)
  for grads in gradients(5):
    for row, g in enumerate(grads["embedding"]["item"]["table"]):
      sums[row] += sum(float(x) ** 2 for x in g) / 4
      if sums[row]:
        table[row] -= TABLE_RATE * g / np.sqrt(sums[row])
  np.testing.assert_allclose(
    found["embedding"]["item"]["table"], table, rtol=1e-5, atol=1e-6
  )
  (kept,) = (x for x in jax.tree.leaves(own[1].tables) if x.ndim)
  np.testing.assert_allclose(kept, sums, rtol=1e-5)


def test_rows_without_a_gradient_stay_bit_by_bit():
  found, _ = run(make(config(table_optimizer="rowwise_adagrad")), 3)
  before = params()["embedding"]["item"]["table"]
  same = (found["embedding"]["item"]["table"] == before).all(axis=1)
  assert same.tolist() == [False, True, False, False, True, False]


@pytest.mark.parametrize("kind", ["adamw", "rowwise_adagrad"])
def test_the_rest_learns_as_without(kind):
  """Every leaf but the table; and the table's state is not kept twice."""
  expected, _ = run(make(config()), 4)
  found, own = run(
    make(config(table_optimizer=kind, table_learning_rate=TABLE_RATE)), 4
  )
  np.testing.assert_array_equal(
    found["project"]["kernel"], expected["project"]["kernel"]
  )
  np.testing.assert_array_equal(
    found["embedding"]["code"]["table"], expected["embedding"]["code"]["table"]
  )
  of_table = [x for x in jax.tree.leaves(own) if x.shape[:1] == (6,)]
  shapes = {"adamw": [(6, 4)] * 2, "rowwise_adagrad": [(6,)]}
  assert [x.shape for x in of_table] == shapes[kind]


def test_a_learning_rate_of_its_own_scales_adams_step():
  expected, _ = run(make(config()), 1)
  found, _ = run(make(config(table_learning_rate=TABLE_RATE)), 1)
  before = params()["embedding"]["item"]["table"]
  np.testing.assert_allclose(
    (found["embedding"]["item"]["table"] - before) / TABLE_RATE,
    (expected["embedding"]["item"]["table"] - before) / RATE,
    rtol=1e-4, atol=1e-5,
  )  # fmt: skip


def test_by_default_there_is_one_optimizer_and_one_state():
  leaves = jax.tree.leaves(make(config()).init(params()))
  assert sum(x.shape == (6, 4) for x in leaves) == 2
  assert not any(
    isinstance(x, optimizer.TablesState) for x in make(config()).init(params())
  )


def test_the_schedule_of_tables_has_their_peak():
  settings = config_lib.OptimizerConfig(
    learning_rate=RATE, warmup_steps=10, table_learning_rate=TABLE_RATE
  )
  of_rest = optimizer.make_schedule(settings, 1, 100)
  of_tables = optimizer.make_table_schedule(settings, 1, 100)
  for at in (3, 10, 55):
    ratio = float(of_tables(at)) / float(of_rest(at))
    assert ratio == pytest.approx(TABLE_RATE / RATE, rel=1e-5)
  settings.table_learning_rate = settings.learning_rate = 0.0
  of_tables = optimizer.make_table_schedule(settings, int(1e8), 100)
  assert float(of_tables(10)) == pytest.approx(5e-4)


def test_what_cannot_be_is_refused():
  with pytest.raises(ValueError, match="table_optimizer='sgd': want one of"):
    make(config(table_optimizer="sgd"))
  tx = make(config(table_optimizer="rowwise_adagrad"))
  with pytest.raises(ValueError, match="has none; set model.item_embedding"):
    tx.init({"project": params()["project"]})


class _Model(nn.Module):
  """A hashed table, and a square loss of a projection of its embeddings."""

  @nn.compact
  def __call__(self, batch, catalogue):
    del catalogue
    table = id_table.ItemTable(1000, 8, 256, name="item")
    found = layers.Linear(4, ("embed", "mlp"))(table(batch.items))
    angles = batch.items[..., None] * jnp.arange(1.0, 5.0)[None, None]
    wanted = jnp.sin(angles)
    return jnp.sum((batch.targets > 0)[..., None] * (found - wanted) ** 2)


def _loss(params, batch, catalogue, index, key):
  del index, key
  loss = _Model().apply({"params": params}, batch, catalogue)
  return {"loss": loss, "count": jnp.sum(batch.targets > 0)}


@functools.cache
def _trained(sizes):
  """(state, losses) after twenty steps on a mesh."""
  devices = jax.devices()[: int(np.prod(sizes))]
  mesh = partitioning.make_mesh(config_lib.MeshConfig(*sizes), devices)
  items = np.random.default_rng(0).integers(0, 1001, (8, 12)).astype(np.int32)
  batch = Batch(items, items, {}, items, items, items)
  batch = jax.device_put(batch, partitioning.batch_sharding(mesh))
  catalogue = Catalogue(jnp.zeros((1001, 3), jnp.int32), {})
  catalogue = jax.device_put(catalogue, partitioning.replicated(mesh))
  tx = make(
    config(table_optimizer="rowwise_adagrad", table_learning_rate=TABLE_RATE)
  )
  function = functools.partial(step.train_step, loss_fn=_loss, tx=tx, seed=0)
  key, zero = jax.random.key(0), jnp.zeros((), jnp.int32)

  def init(key):
    params = _Model().init(key, batch, catalogue)["params"]
    return state.TrainState(zero, params, tx.init(params), zero)

  with jax.set_mesh(mesh):
    shardings = partitioning.tree_shardings(jax.eval_shape(init, key), mesh)
    current = jax.jit(lambda key: nn.unbox(init(key)), out_shardings=shardings)(
      key
    )
    compiled = step.compile_step(function, shardings, mesh, catalogue, None)
    trace = []
    for _ in range(20):
      current, sums = compiled(current, batch, catalogue, None)
      trace.append(float(sums["loss"]) / float(sums["count"]))
  return current, trace


@pytest.mark.parametrize("sizes", [(1, 8, 1, 1), (2, 2, 1, 2)])
def test_sharded_tables_learn_as_one_device_does(sizes):
  """Rows of table and state over fsdp; 1e-5 of the largest entry."""
  expected, expected_trace = _trained((1, 1, 1, 1))
  found, trace = _trained(sizes)
  np.testing.assert_allclose(trace, expected_trace, rtol=1e-5)
  assert trace[-1] < 0.5 * trace[0]
  for at in (
    lambda s: s.params["item"]["table"],
    lambda s: s.opt_state[1].tables[0].sums["item"]["table"],
  ):
    a, b = at(found), np.asarray(at(expected))
    assert a.sharding.spec[0] == "fsdp"
    assert a.addressable_shards[0].data.shape[0] == 256 // sizes[1]
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max())
  sums = found.opt_state[1].tables[0].sums["item"]["table"]
  assert sums.sharding.spec == PartitionSpec("fsdp")
