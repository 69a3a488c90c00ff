"""Checkpoints: whole or absent, the same values on any mesh, named faults."""

import shutil

import grain
import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from onerec_jax import checkpoint, files, model_configs, partitioning
from onerec_jax import config as config_lib
from onerec_jax.data import rows as rows_lib
from onerec_jax.data.batch import Catalogue
from onerec_jax.models import registry
from onerec_jax.training import optimizer, state

MODEL = registry.create(
  model_configs.SASRecConfig(num_layers=1, d_model=16, num_heads=2, d_ff=32),
  20, (), {"rating": 4}, {},
)  # fmt: skip
META = {"progress": {"best": 0.5, "best_step": 3}}


def make_mesh(data, fsdp=1, tensor=1):
  number = data * fsdp * tensor
  config = config_lib.MeshConfig(data, fsdp, tensor=tensor)
  return partitioning.make_mesh(config, jax.devices()[:number])


def create(mesh, seed=0):
  """(state, its shapes with shardings) of a small model."""
  batch = rows_lib.request_batch(
    [], ["rating"], config_lib.PipelineConfig(max_history=4), 8
  )
  settings = config_lib.OptimizerConfig()
  tx = optimizer.make_optimizer(
    settings, optimizer.make_schedule(settings, 1000, 10)
  )
  catalogue = Catalogue(np.zeros((21, 1), np.int32), {})
  shapes, make = state.plan(MODEL, tx, batch, catalogue, seed, mesh)
  return make(), shapes


def numbers(seed=0):
  """A dataset whose n-th element tells where its iterator is."""
  return grain.MapDataset.range(1000).seed(seed).shuffle().to_iter_dataset()


def assert_equal(one, other):
  jax.tree.map(
    np.testing.assert_array_equal, jax.device_get(one), jax.device_get(other)
  )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
  """(directory, state, what comes next) saved on a mesh of 8 x 1 x 1."""
  folder = tmp_path_factory.mktemp("saved")
  train_state, _ = create(make_mesh(8))
  iterator = iter(numbers())
  for _ in range(7):
    next(iterator)
  with checkpoint.TrainingCheckpoints(folder, 2) as checkpoints:
    checkpoints.save(3, train_state, iterator, META)
    # The save runs in the background and must not see what happens after it.
    following = [next(iterator) for _ in range(3)]
  return folder, train_state, following


@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 1, 1), (8, 1, 1)])
def test_another_mesh_reads_the_same_values(saved, axes):
  folder, expected, following = saved
  mesh = make_mesh(*axes)
  # Other values in the right places: nothing of them may stay.
  other, shapes = create(mesh, seed=1)
  fresh = iter(numbers())
  with checkpoint.TrainingCheckpoints(folder, 2) as checkpoints:
    assert checkpoints.latest_step == 3
    found = checkpoints.restore(3, shapes, fresh)
    assert checkpoints.metadata(3)["progress"] == META["progress"]
  assert_equal(found, expected)
  assert [next(fresh) for _ in range(3)] == following
  for leaf, wanted in zip(jax.tree.leaves(found), jax.tree.leaves(other)):
    assert leaf.sharding == wanted.sharding
  if axes == (2, 2, 2):
    specs = {leaf.sharding.spec for leaf in jax.tree.leaves(found.params)}
    assert specs - {PartitionSpec()}, "nothing was spread over this mesh"


def test_only_the_latest_stay(tmp_path):
  values = {"w": np.arange(4.0)}
  with checkpoint.TrainingCheckpoints(tmp_path / "runs", 2) as checkpoints:
    assert checkpoints.latest_step is None
    for step in (1, 5, 9):
      checkpoints.save(step, {"w": values["w"] * step}, iter(numbers()), {})
  assert checkpoint.steps(tmp_path / "runs") == [5, 9]
  assert checkpoint.steps(tmp_path / "nowhere") == []


def test_the_place_of_the_iterator_stands_once_for_all_processes(saved):
  folder, _, _ = saved
  with checkpoint.TrainingCheckpoints(folder, 2) as checkpoints:
    assert checkpoints.metadata(3)["iterator"] == {"next_index": 7}
  assert not list(folder.rglob("process_*.json"))


def test_format_1_is_read(tmp_path):
  """It kept the iterator's place in a file, at the step of the state."""
  iterator = iter(numbers())
  for _ in range(4):
    next(iterator)
  values = {"w": np.arange(4.0, dtype=np.float32)}
  with checkpoint.ocp.training.Checkpointer(tmp_path) as old:
    old.save_checkpointables(
      4,
      {"state": values, "data": iterator},
      custom_metadata={"format_version": 1},
    )
  fresh = iter(numbers())
  with checkpoint.TrainingCheckpoints(tmp_path, 2) as checkpoints:
    found = checkpoints.restore(4, best(make_mesh(1)), fresh)
  np.testing.assert_array_equal(found["w"], values["w"])
  assert next(fresh) == next(iterator)


def test_a_newer_format_is_refused(tmp_path, monkeypatch):
  with checkpoint.TrainingCheckpoints(tmp_path, 2) as checkpoints:
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 2)
    checkpoints.save(4, {"w": np.zeros(2)}, iter(numbers()), {})
    monkeypatch.setattr(checkpoint, "FORMAT_VERSION", 1)
    checkpoints.wait()
    with pytest.raises(ValueError, match=r"/4 has format 2.*up to 1.*update"):
      checkpoints.metadata(4)


def test_a_broken_or_foreign_checkpoint_is_named(tmp_path):
  whole = partitioning.replicated(make_mesh(1))
  shapes = {"w": jax.ShapeDtypeStruct((3,), np.float32, sharding=whole)}
  with checkpoint.TrainingCheckpoints(tmp_path, 2) as checkpoints:
    checkpoints.save(4, {"w": np.zeros(2)}, iter(numbers()), {})
    checkpoints.wait()
    with pytest.raises(
      ValueError, match=r"/4.*delete .* to start this run"
    ) as told:
      checkpoints.restore(4, shapes, iter(numbers()))
    assert "(3,)" in str(told.value)


def test_a_damaged_checkpoint_leaves_the_one_before(tmp_path):
  """The message is short, and what it says to do is enough."""
  many = {f"layer_{n}": np.full(8, n, np.float32) for n in range(200)}
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(
      x.shape, x.dtype, sharding=partitioning.replicated(make_mesh(1))
    ),
    many,
  )
  with checkpoint.TrainingCheckpoints(tmp_path, 2) as checkpoints:
    for step in (4, 9):
      checkpoints.save(step, many, iter(numbers()), {})
    checkpoints.wait()
    for path in (tmp_path / "9").rglob("*"):
      if path.is_file() and not path.name.startswith("_"):
        path.write_bytes(path.read_bytes()[:10])
    with pytest.raises(ValueError, match=r"delete \S+/9 to go on from") as told:
      checkpoints.restore(9, shapes, iter(numbers()))
    assert len(str(told.value)) < 1000
  for path in (tmp_path / "9").rglob("_CHECKPOINT_METADATA"):
    path.unlink()
  with (
    checkpoint.TrainingCheckpoints(tmp_path, 2) as checkpoints,
    pytest.raises(ValueError, match=r"lost its meta.* delete \S+/9 to go"),
  ):
    checkpoints.metadata(9)
  shutil.rmtree(tmp_path / "9")
  with checkpoint.TrainingCheckpoints(tmp_path, 2) as checkpoints:
    assert checkpoints.latest_step == 4
    found = checkpoints.restore(4, shapes, iter(numbers()))
  assert_equal(found, many)


def best(mesh):
  """Shapes of `params(n)` on a mesh."""
  whole = partitioning.replicated(mesh)
  return {"w": jax.ShapeDtypeStruct((4,), np.float32, sharding=whole)}


def params(value):
  return {"w": jax.numpy.full((4,), value, np.float32)}


def load_best(run):
  found = checkpoint.load_best(run, best(make_mesh(1)))["w"]
  return float(np.unique(found).item())


def test_the_best_replaces_the_one_before(tmp_path):
  checkpoint.save_best(tmp_path, 10, params(1.0))
  assert load_best(tmp_path) == 1.0
  checkpoint.save_best(tmp_path, 20, params(2.0))
  assert load_best(tmp_path) == 2.0
  assert checkpoint.steps(tmp_path / "best") == [20]


class _KilledError(BaseException):
  """Stands for the end of the process."""


def _kill(*_, **__):
  raise _KilledError


@pytest.mark.parametrize(
  ("where", "survivor"),
  [
    ((files, "write_json"), 1.0),  # before the pointer moves
    ((checkpoint.ocp, "save"), 1.0),  # before the parameters are written
    ((checkpoint.shutil, "rmtree"), 2.0),  # after the pointer has moved
  ],
)
def test_a_kill_leaves_one_whole_best(tmp_path, monkeypatch, where, survivor):
  checkpoint.save_best(tmp_path, 10, params(1.0))
  with monkeypatch.context() as patch:
    patch.setattr(*where, _kill)
    with pytest.raises(_KilledError):
      checkpoint.save_best(tmp_path, 20, params(2.0))
  assert load_best(tmp_path) == survivor
  # The resumed run comes to the same step again, and clears what was left.
  checkpoint.save_best(tmp_path, 20, params(3.0))
  assert load_best(tmp_path) == 3.0
  assert checkpoint.steps(tmp_path / "best") == [20]


def test_parameters_go_from_one_device_to_eight_and_back(tmp_path):
  value = np.arange(16, dtype=np.float32).reshape(8, 2)
  for source, target in ((1, 8), (8, 1)):
    rows = [partitioning.batch_sharding(make_mesh(n)) for n in (source, target)]
    checkpoint.save_params(
      tmp_path / "p", {"w": jax.device_put(value, rows[0])}
    )
    shapes = {"w": jax.ShapeDtypeStruct((8, 2), np.float32, sharding=rows[1])}
    found = checkpoint.load_params(tmp_path / "p", shapes)["w"]
    assert len(found.sharding.device_set) == target
    np.testing.assert_array_equal(found, value)


def test_what_is_missing_or_misfits_is_named(tmp_path):
  with pytest.raises(
    FileNotFoundError, match=r"no trained model.*launch.train"
  ):
    checkpoint.load_best(tmp_path, {})
  checkpoint.save_best(tmp_path, 10, params(1.0))
  wrong = {"w": jax.ShapeDtypeStruct((5,), np.float32)}
  with pytest.raises(ValueError, match=r"best/10.*another config.*train"):
    checkpoint.load_best(tmp_path, wrong)
  files.write_json(tmp_path / "best.json", {"step": 11})
  with pytest.raises(FileNotFoundError, match=r"best/11.*launch.train"):
    load_best(tmp_path)
  (tmp_path / "best.json").write_text("{")
  with pytest.raises(ValueError, match="best.json is not readable"):
    load_best(tmp_path)
