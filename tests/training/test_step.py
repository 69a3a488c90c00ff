"""The step: meshes agree, microbatches add up, nothing leaves the device."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import partitioning
from onerec_jax.data import pipeline
from onerec_jax.training import loop, losses, optimizer, state, step
from tests.tiny import random_params


def _program(tiny, shape, count):
  """(mesh, state on the host, its shardings, jitted step, tables, sharding)."""
  config, _, system = tiny
  mesh = partitioning.make_mesh(
    config_lib.MeshConfig(*shape), jax.devices()[:count]
  )
  rows = partitioning.batch_sharding(mesh)
  tables = jax.device_put(
    (system.catalogue, system.index), partitioning.replicated(mesh)
  )
  schedule = optimizer.make_schedule(config.optimizer, 1, 50)
  tx = optimizer.make_optimizer(config.optimizer, schedule)
  example = loop.put_batch(next(_batches(tiny)), rows)
  with jax.set_mesh(mesh):
    shapes, make = state.plan(system.model, tx, example, tables[0], 0, mesh)
    made = make()
  function = functools.partial(
    step.train_step,
    loss_fn=losses.make_loss(system.model),
    tx=tx,
    seed=0,
  )
  shardings = state.shardings(shapes)
  compiled = step.compile_step(function, shardings, mesh, *tables)
  return mesh, jax.device_get(made), shardings, compiled, tables, rows


def _batches(tiny):
  config, _, system = tiny
  dataset, _ = pipeline.training_dataset(system.prepared, config.pipeline, 0)
  return iter(dataset)


@pytest.fixture(scope="module")
def start(tiny):
  """Gives (mesh, fresh state, jitted step, host batches, tables, sharding).

  A mesh's program is made once: tests differ in what they feed it.
  """
  program = functools.cache(functools.partial(_program, tiny))

  def fresh(shape=(), count=8):
    mesh, first, shardings, compiled, tables, rows = program(shape, count)
    # Copies, as a step donates its state.
    current = jax.device_put(jax.tree.map(np.array, first), shardings)
    return mesh, current, compiled, _batches(tiny), tables, rows

  return fresh


def _run(start, shape, count, steps):
  mesh, current, compiled, stream, tables, rows = start(shape, count)
  trace = []
  with jax.set_mesh(mesh):
    for _ in range(steps):
      batch = loop.put_batch(next(stream), rows)
      with jax.transfer_guard("disallow"):
        current, sums = compiled(current, batch, *tables)
      trace.append(float(sums["loss"]) / float(sums["count"]))
  assert compiled._cache_size() == 1
  return jax.device_get(current), trace


@pytest.fixture(scope="module")
def one_device(start):
  return _run(start, (), 1, 50)


def test_eight_devices_equal_one_after_fifty_steps(start, one_device):
  """Parameters and losses within 1e-5, dropout included."""
  expected, losses_one = one_device
  found, losses_eight = _run(start, (2, 2, 1, 2), 8, 50)
  np.testing.assert_allclose(losses_eight, losses_one, atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    found.params,
    expected.params,
  )


def test_the_loss_falls(one_device):
  _, trace = one_device
  assert np.mean(trace[-5:]) < 0.8 * np.mean(trace[:5])


def test_microbatches_give_the_gradient_of_the_whole_batch(tiny):
  config, _, system = tiny
  dataset, _ = pipeline.training_dataset(system.prepared, config.pipeline, 0)
  batch = jax.tree.map(jnp.asarray, next(iter(dataset)))
  # Rows with different numbers of targets: weights must be exact.
  batch = batch.replace(targets=batch.targets.at[0, 3:].set(0))
  params = random_params(system.model, batch, system.catalogue, 0)
  loss_fn = losses.make_loss(system.model)
  without_dropout = lambda p, b, c, i, key: loss_fn(p, b, c, i, None)
  gradients = lambda pieces: jax.jit(
    lambda params, *tables: step._gradients(
      without_dropout, params, batch, *tables, jax.random.key(0), pieces
    )
  )(params, system.catalogue, system.index)
  found = [gradients(pieces) for pieces in (1, 4)]
  close = functools.partial(np.testing.assert_allclose, atol=2e-6)
  (grads, sums), (pieced_grads, pieced_sums) = found
  jax.tree.map(close, pieced_grads, grads)
  assert pieced_sums["count"] == sums["count"]
  # As means: a sum over some hundred targets has no digits below 1e-5.
  for name, total in sums.items():
    close(pieced_sums[name] / sums["count"], total / sums["count"])


def test_the_state_is_donated_and_keeps_its_shardings(start):
  mesh, current, compiled, stream, tables, rows = start((2, 2, 1, 2))
  before = jax.tree.map(lambda x: x.sharding, current)
  with jax.set_mesh(mesh):
    after, _ = compiled(current, loop.put_batch(next(stream), rows), *tables)
  assert all(leaf.is_deleted() for leaf in jax.tree.leaves(current.params))
  assert jax.tree.map(lambda x: x.sharding, after) == before


def test_the_compiled_step_talks_to_no_host(start):
  mesh, current, compiled, stream, tables, rows = start()
  with jax.set_mesh(mesh):
    text = compiled.lower(
      current, loop.put_batch(next(stream), rows), *tables
    ).compile().as_text()  # fmt: skip
  assert not _host_calls(text)


def _host_calls(text):
  targets = re.findall(r'custom_call_target="([^"]*)"', text)
  calls = [name for name in targets if "callback" in name]
  return calls + re.findall(r"\b(?:outfeed|infeed)\(", text)


def test_a_call_to_the_host_would_be_found():
  def chatty(x):
    jax.debug.print("{x}", x=x)
    return x + 1

  text = jax.jit(chatty).lower(jnp.zeros(3)).compile().as_text()
  assert _host_calls(text)


def test_an_update_that_is_not_finite_is_left_out(start):
  mesh, current, compiled, stream, tables, rows = start()
  poisoned = current.replace(
    params={
      **current.params,
      "codes": jax.tree.map(lambda x: x * jnp.nan, current.params["codes"]),
    }
  )
  before = jax.device_get(poisoned.params)
  with jax.set_mesh(mesh):
    after, sums = compiled(
      poisoned, loop.put_batch(next(stream), rows), *tables
    )
  assert int(sums["nonfinite"]) == 1
  assert int(after.skipped) == 1
  assert int(after.step) == 1
  jax.tree.map(np.testing.assert_array_equal, before, after.params)
