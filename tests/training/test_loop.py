"""The loop: resume is bit-equal, the best model is kept, errors speak."""

import copy
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from onerec_jax import (
  checkpoint,
  files,
  model_configs,
  partitioning,
  workflow,
)
from onerec_jax.data import pipeline
from onerec_jax.inference import assemble
from onerec_jax.training import loop, metrics_writer, state, task
from tests import worlds

ROOT = pathlib.Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures("one_device")


class _KilledError(Exception):
  """Stands for the end of a process, in process."""


def _train(tiny, run, validate, gate=None, **settings):
  """Trains into `run`; returns the state of its last checkpoint."""
  config, _, system = tiny
  config = copy.deepcopy(config)
  for name, value in settings.items():
    setattr(config.training, name, value)
  mesh = partitioning.make_mesh(config.mesh)
  dataset, per_epoch = pipeline.training_dataset(
    system.prepared, config.pipeline, config.training.seed
  )
  work = task.Task(config, system.model)
  work.gate = gate
  return loop.train(
    config, run, system.model, dataset, per_epoch, system.catalogue,
    system.index, validate, mesh, work,
  )  # fmt: skip


def _arrays(run, step):
  """Every array of a checkpoint, by reading it without any shape given."""
  with checkpoint.TrainingCheckpoints(run / "checkpoints", 2) as saved:
    state = saved._checkpointer.load(step)
  return jax.device_get(state)


def _steady():
  """A validation that is a function of the parameters alone."""

  def validate(params):
    leaves = jax.tree.leaves(jax.device_get(params))
    return {"ndcg@10": float(sum(np.abs(leaf).sum() for leaf in leaves))}

  return validate


def _config(raw):
  """The loop is the same for every model: one that is quick to compile."""
  config = worlds.config(raw)
  config.model = model_configs.SASRecConfig(num_layers=1, d_model=16, d_ff=32)
  return config


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
  """(config, work directory, system)."""
  folder = tmp_path_factory.mktemp("tiny")
  config = _config(worlds.write_csv(folder / "raw"))
  return config, folder, workflow.assembled(config, folder)


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory):
  """An uninterrupted run of ten steps."""
  run = tmp_path_factory.mktemp("whole")
  progress = _train(tiny, run, _steady())
  return run, progress


def _assert_same_end(run, whole):
  """All ten steps are as if nobody had disturbed them."""
  jax.tree.map(
    np.testing.assert_array_equal, _arrays(run, 10), _arrays(whole, 10)
  )
  best = [files.read_json(folder / "best.json") for folder in (run, whole)]
  assert best[0] == best[1]
  numbers = lambda folder: [
    (r["step"], r["kind"], r.get("loss"), r.get("ndcg@10"))
    for r in metrics_writer.read(folder / "metrics.jsonl")
  ]
  assert numbers(run) == numbers(whole)


@pytest.mark.parametrize("validation", [1, 2])
def test_a_run_cut_between_checkpoints_resumes_bit_equal(
  tiny, whole, tmp_path, validation
):
  """Cut at step 5 (last checkpoint 3) or 10 (last checkpoint 9)."""
  calls = []

  def cut(params):
    calls.append(1)
    if len(calls) == validation:
      raise _KilledError
    return _steady()(params)

  with pytest.raises(_KilledError):
    _train(tiny, tmp_path, cut)
  resumed = _train(tiny, tmp_path, _steady())
  expected = whole[1]
  assert (resumed.best, resumed.best_step) == (
    expected.best,
    expected.best_step,
  )
  _assert_same_end(tmp_path, whole[0])


def test_a_resumed_run_makes_no_state_beside_the_restored_one(
  tiny, whole, tmp_path, monkeypatch
):
  """Where one just fits into memory, two do not."""
  run = shutil.copytree(whole[0], tmp_path / "run")
  shutil.rmtree(run / "checkpoints" / "10")
  plan = state.plan

  def no_second():
    raise AssertionError("made anew")

  monkeypatch.setattr(
    state, "plan", lambda *given: (plan(*given)[0], no_second)
  )
  _train(tiny, run, _steady())
  _assert_same_end(run, whole[0])
  with pytest.raises(AssertionError, match="made anew"):
    _train(tiny, tmp_path / "fresh", _steady())


def test_ctrl_c_stops_when_all_is_saved(tiny, whole, tmp_path, ctrl_c):
  before = signal.getsignal(signal.SIGINT)

  def interrupted(params):
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):  # a second one does not wait
      signal.raise_signal(signal.SIGINT)
    return _steady()(params)

  # As ever: what ends on it in a shell or a notebook still does.
  with pytest.raises(KeyboardInterrupt):
    _train(tiny, tmp_path, interrupted)
  assert checkpoint.steps(tmp_path / "checkpoints")[-1] == 5
  assert signal.getsignal(signal.SIGINT) is before
  # Where it is ignored, as in the background of a script, it stays so.
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def ignored(params):
    signal.raise_signal(signal.SIGINT)
    return _steady()(params)

  _train(tiny, tmp_path, ignored)
  equal = np.testing.assert_array_equal
  jax.tree.map(equal, _arrays(tmp_path, 10), _arrays(whole[0], 10))


def test_a_preempted_run_asks_to_be_run_again(tiny, whole, tmp_path):
  def terminated(params):
    signal.raise_signal(signal.SIGTERM)
    return _steady()(params)

  with pytest.raises(SystemExit) as ended:
    _train(tiny, tmp_path, terminated)
  assert ended.value.code == loop.PREEMPTED
  assert checkpoint.steps(tmp_path / "checkpoints")[-1] == 5
  _train(tiny, tmp_path, _steady())
  equal = np.testing.assert_array_equal
  jax.tree.map(equal, _arrays(tmp_path, 10), _arrays(whole[0], 10))


def test_log_lines_hold_speed_and_loss(whole):
  run, _ = whole
  records = metrics_writer.read(run / "metrics.jsonl")
  trains = [r for r in records if r["kind"] == "train"]
  assert [r["step"] for r in trains] == [2, 3, 4, 5, 6, 8, 9, 10]
  for record in trains:
    for name in ("loss", "targets_per_s", "step_ms", "gflops_per_s"):
      assert record[name] > 0
    # This host has no peak in the table: a matmul stands beside it.
    assert record["matmul_gflops_per_s"] > 0


def test_compiling_is_no_part_of_the_steps_time(tiny, tmp_path, capsys):
  """Not even where the first step is logged."""
  _train(tiny, tmp_path, _steady(), log_every=1, num_steps=2)
  said = capsys.readouterr().err
  compiled = float(said.split("compiled in ")[1].split(" s")[0])
  first = next(
    record
    for record in metrics_writer.read(tmp_path / "metrics.jsonl")
    if record["kind"] == "train"
  )
  assert first["step"] == 1
  assert first["train_s"] == pytest.approx(first["step_ms"] / 1e3)
  assert first["train_s"] < compiled / 4


def test_the_best_validation_is_kept_and_training_stops_early(tiny, tmp_path):
  values = iter([0.1, 0.5, 0.3, 0.2, 0.9])
  snapshots = []

  def validate(params):
    snapshots.append(jax.device_get(params))
    return {"ndcg@10": next(values)}

  progress = _train(tiny, tmp_path, validate, validate_every=2, patience=2)
  assert (progress.best, progress.best_step) == (0.5, 4)
  assert len(snapshots) == 4
  assert files.read_json(tmp_path / "best.json") == {"step": 4}
  _, _, system = tiny
  mesh = partitioning.make_mesh(system.config.mesh)
  best = assemble.load_params(system, tmp_path, mesh)
  jax.tree.map(
    np.testing.assert_array_equal, jax.device_get(best), snapshots[1]
  )


@pytest.mark.parametrize("value", [np.nan, np.inf, 0.0])
def test_a_start_without_a_figure_cannot_be_gated(tiny, tmp_path, value):
  told = f"ndcg@10' is {value:.0f} for the start"
  with pytest.raises(ValueError, match=told):
    _train(tiny, tmp_path, lambda _: {"ndcg@10": value}, gate=0.1)
  assert not checkpoint.steps(tmp_path / "checkpoints")


@pytest.mark.parametrize(
  "values",
  [
    # Kept although they fall: .45 is the least.
    [0.5, 0.49, 0.48, 0.1],
    # Of the start and not of the best, of which the last is 36% short.
    [0.5, 0.7, 0.46, 0.45, 0.44],
    # A tenth of what is below 0 is further below.
    [-2.0, -2.1, -2.19, -2.21],
  ],
)
def test_the_gate_keeps_the_latest_it_let_through(tiny, tmp_path, values):
  """A start at step 0, validations each second step; the last one stops it."""
  given, snapshots = iter([*values, 9.0]), []

  def validate(params):
    snapshots.append(jax.device_get(params))
    return {"ndcg@10": next(given)}

  settings = dict(gate=0.1, validate_every=2)
  last = len(values) - 1
  for _ in range(2):  # once stopped, it stays so
    progress = _train(tiny, tmp_path, validate, **settings)
    assert len(snapshots) == len(values)
    kept = progress.start, progress.best, progress.best_step
    assert kept == (values[0], values[-2], 2 * (last - 1))
    assert f"at step {2 * last} is below" in progress.stopped
  assert files.read_json(tmp_path / "best.json") == {"step": 2 * (last - 1)}
  assert checkpoint.steps(tmp_path / "checkpoints")[-1] == 2 * last
  seen = [
    (r["step"], r["ndcg@10"])
    for r in metrics_writer.read(tmp_path / "metrics.jsonl")
    if r["kind"] == "validation"
  ]
  assert seen == [(2 * i, value) for i, value in enumerate(values)]
  _, _, system = tiny
  mesh = partitioning.make_mesh(system.config.mesh)
  best = assemble.load_params(system, tmp_path, mesh)
  equal = np.testing.assert_array_equal
  jax.tree.map(equal, jax.device_get(best), snapshots[-2])


@pytest.mark.parametrize("cut", ["signal", "kill"])
def test_a_run_that_stopped_early_stays_stopped(tiny, tmp_path, cut):
  """Cut off in the deciding validation, or before it could say it ended."""
  values = iter([0.5, 0.1, 0.9])
  settings = dict(validate_every=2, patience=1)

  def validate(params):
    value = next(values)
    if cut == "signal" and value == 0.1:
      signal.raise_signal(signal.SIGTERM)
    return {"ndcg@10": value}

  for _ in range(2):
    progress = _train(tiny, tmp_path, validate, **settings)
    assert (progress.best, progress.best_step) == (0.5, 2)
  assert files.read_json(tmp_path / "best.json") == {"step": 2}
  assert checkpoint.steps(tmp_path / "checkpoints")[-1] == 4


def test_an_unknown_selection_metric_is_named(tiny, tmp_path):
  with pytest.raises(ValueError, match="ndcg@10.*recall@5"):
    _train(tiny, tmp_path, lambda params: {"recall@5": 0.0})


def test_not_finite_stops_with_advice_or_goes_on_if_told(tiny, tmp_path):
  config, folder, system = tiny
  broken = copy.deepcopy(config)
  broken.optimizer.learning_rate = 1e30
  broken_tiny = (broken, folder, system)
  with pytest.raises(FloatingPointError, match="learning_rate"):
    _train(broken_tiny, tmp_path / "a", _steady())
  _train(broken_tiny, tmp_path / "b", _steady(), on_nan="skip")
  records = metrics_writer.read(tmp_path / "b" / "metrics.jsonl")
  assert sum(r.get("nonfinite", 0) for r in records) > 0


def test_a_window_without_a_weighted_target_is_logged(tmp_path):
  config = _config(worlds.write_csv(tmp_path / "raw"))
  config.prepare.positive = "rating >= 5"
  config.pipeline.targets, config.pipeline.imitate = "request", "positive"
  config.pipeline.batch_size = config.pipeline.row_targets = 1
  config.training.num_steps = config.training.validate_every = 20
  config.training.log_every = 1
  system = workflow.assembled(config, tmp_path)
  _train((config, tmp_path, system), tmp_path / "run", _steady())
  records = metrics_writer.read(tmp_path / "run/metrics.jsonl")
  found = [r["loss"] for r in records if r["kind"] == "train"]
  assert len(found) == 20
  # Four events in five are not imitated: their steps have no loss.
  assert 0 < sum(loss is None for loss in found) < 20


def test_a_checkpoint_of_another_model_is_refused_by_name(
  tiny, whole, tmp_path
):
  run = shutil.copytree(whole[0], tmp_path / "run")
  config, folder, _ = tiny
  other = copy.deepcopy(config)
  other.model.d_model = 32
  wider = (other, folder, workflow.assembled(other, folder))
  with pytest.raises(ValueError, match="checkpoints/10"):
    _train(wider, run, _steady())


def test_metrics_cut_short_by_a_kill_are_read_up_to_there(tmp_path):
  path = tmp_path / "metrics.jsonl"
  path.write_text('{"step": 1, "kind": "train"}\n{"step": 2, "ki')
  assert metrics_writer.read(path) == [{"step": 1, "kind": "train"}]
  path.write_text('{"step": 1\n{"step": 2, "kind": "train"}\n')
  with pytest.raises(ValueError, match="line 1"):
    metrics_writer.read(path)
  assert metrics_writer.read(tmp_path / "none.jsonl") == []


_PROGRAM = """
import pathlib, sys
from tests.training import test_loop
test_loop.train(*map(pathlib.Path, sys.argv[1:]))
"""


def train(folder, run):
  """What the process below does: ten steps, with time to kill it in between."""
  config = _config(folder / "raw")
  put_batch = loop.put_batch

  def put_slowly(*arguments):
    time.sleep(0.3)
    return put_batch(*arguments)

  loop.put_batch = put_slowly
  system = workflow.assembled(config, folder)
  _train((config, folder, system), run, _steady())


def _process(*arguments):
  environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
  return subprocess.Popen(
    [sys.executable, "-c", _PROGRAM, *map(str, arguments)],
    env=environment,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.PIPE,
    text=True,
  )


def _wait_for_step(process, run, step):
  while process.poll() is None:
    records = metrics_writer.read(run / "metrics.jsonl")
    if any(r["step"] >= step for r in records):
      return
    time.sleep(0.002)
  raise AssertionError(f"ended before step {step}: {process.stderr.read()}")


@pytest.mark.slow
def test_a_killed_process_resumes_bit_equal(tiny, whole, tmp_path):
  """kill -9, against a run that nobody disturbed."""
  process = _process(tiny[1], tmp_path)
  _wait_for_step(process, tmp_path, 6)
  process.kill()
  assert process.wait() == -signal.SIGKILL, "it ended before"
  assert max(checkpoint.steps(tmp_path / "checkpoints")) < 9
  _train(tiny, tmp_path, _steady())
  _assert_same_end(tmp_path, whole[0])


def test_a_profile_is_written_even_if_the_run_ends_inside_its_window(
  tiny, tmp_path
):
  _train(tiny, tmp_path, _steady(), profile_steps=50)
  assert list((tmp_path / "profile").rglob("*.xplane.pb"))
