"""Several processes with real collectives, and other numbers of them after."""

import asyncio
import contextlib
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from orbax.checkpoint._src.path import async_path

from benchmarks import kill_resume, xla_flags
from onerec_jax import checkpoint, model_configs, partitioning, workflow
from onerec_jax.evaluation.result import Evaluation
from onerec_jax.training import loop, metrics_writer
from tests import worlds

pytestmark = pytest.mark.slow
# Rows and randomness are the same ones; the collectives of several processes
# add up in another order than those of one, and fewer devices do too. Other
# rows, or other dropout, would differ in the third digit.
TOLERANCE = 1e-5
LONG = 40
"""Steps of a run that is stopped on its way."""
ROOT = pathlib.Path(__file__).resolve().parents[2]
_PROGRAM = """
import pathlib, sys, jax
jax.config.update("jax_num_cpu_devices", 4)
address, rank, folder, steps, name, measured = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
assert jax.device_count() == 8
from onerec_jax import config, partitioning, workflow
from tests.integration import test_distributed
test_distributed.look_late(int(rank))
for mesh in (config.MeshConfig(), config.MeshConfig(data=1, tensor=8)):
  rows = partitioning.local_rows(partitioning.make_mesh(mesh), 16)
  print("rows", *rows.tolist())
folder = pathlib.Path(folder)
if measured:
  found = workflow.evaluate(folder / measured, "tiny", "validation")
  print("ndcg", found.metrics["ndcg@10"])
test_distributed.train_slowly(folder, int(steps), name)
"""
_EXPERIMENT = """
import pathlib
from tests.integration import test_distributed
def get_config():
  return test_distributed.config(pathlib.Path({folder!r}))
"""


def config(folder, steps=6, fsdp=1):
  c = worlds.config(folder)
  c.mesh.fsdp = fsdp
  c.model = model_configs.SASRecConfig(num_layers=1, d_model=16, d_ff=32)
  c.training.num_steps = steps
  c.training.log_every, c.training.validate_every = 1, steps // 2
  c.training.checkpoint_every = 0
  return c


def losses(folder):
  lines = metrics_writer.read(folder / "models/tiny/metrics.jsonl")
  return {(r["step"], r["kind"]): r["loss"] for r in lines}


def train_slowly(folder, steps, name):
  """What each of two processes does, with time to stop it in between."""
  put_batch = loop.put_batch

  def put_slowly(*arguments):
    time.sleep(0.4)
    return put_batch(*arguments)

  loop.put_batch = put_slowly
  workflow.train(config(folder, steps), folder / name)


def start(folder, steps, name, measured=""):
  """Two processes of four devices each that train in this directory."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  return [
    spawn(
      "-c", _PROGRAM, address, str(rank), str(folder), str(steps), name,
      measured,
    )
    for rank in range(2)
  ]  # fmt: skip


def spawn(*arguments, **variables):
  """Python with these arguments and variables of its environment."""
  # Only the first would find its programs in a cache; the other's collectives
  # wait 30 s for it at most.
  environment = dict(
    os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu",
    JAX_ENABLE_COMPILATION_CACHE="false", XLA_FLAGS=xla_flags.QUICK_TO_COMPILE,
    PYTHONFAULTHANDLER="1", **variables,
  )  # fmt: skip
  return subprocess.Popen(
    [sys.executable, *arguments], env=environment, stdout=subprocess.PIPE,
    stderr=subprocess.PIPE, text=True,
  )  # fmt: skip


def wait_for(processes, workdir, step, before=0):
  """Until they have logged a step; `before`: the log that lay there."""
  log = workdir / "models/tiny/metrics.jsonl"
  deadline = time.monotonic() + 240
  while time.monotonic() < deadline:
    # A start writes the log anew.
    new = log.exists() and log.stat().st_ino != before
    if new and max(losses(workdir), default=(0,))[0] >= step:
      return
    assert all(p.poll() is None for p in processes), "ended too soon"
    time.sleep(0.01)
  raise TimeoutError(f"no step {step} in {log}")


def slurm_job():
  """The number of a job for which the port that JAX derives is free."""
  while True:
    job = random.randrange(4096)
    with socket.socket() as free, contextlib.suppress(OSError):
      free.bind(("", 65535 - 4095 + job))
      return job


def finish(processes, seconds):
  """What they printed: (stdout, stderr) of each.

  Raises:
    TimeoutError: they did not end; says where each of their threads stood.
  """
  deadline = time.monotonic() + seconds
  while any(process.poll() is None for process in processes):
    if time.monotonic() > deadline:
      for process in processes:
        process.send_signal(signal.SIGABRT)
      ends = [process.communicate()[1][-6000:] for process in processes]
      raise TimeoutError("\n---- the other ----\n".join(ends))
    time.sleep(0.1)
  return [process.communicate() for process in processes]


def look_late(rank):
  """The second process sees what is on disk after the first went on.

  Where a resumed run replaces a best model, orbax's `overwrite` then leaves
  both waiting for ever.
  """
  exists = async_path.exists

  async def late(path):
    await asyncio.sleep(0.2 * rank)
    return await exists(path)

  async_path.exists = late


def cut(workdir, copy, steps=6):
  """Copies a run of these steps, as it was after half of them."""
  shutil.copytree(workdir, copy)
  run = copy / "models/tiny"
  assert checkpoint.steps(run / "checkpoints") == [steps // 2, steps]
  shutil.rmtree(run / "checkpoints" / str(steps))
  (run / "finished.json").unlink()


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """The folder in which one process of eight devices trained `one`."""
  folder = worlds.write_csv(tmp_path_factory.mktemp("trained"))
  workflow.train(config(folder), folder / "one")
  workflow.evaluate(folder / "one", "tiny")
  return folder


def outputs(processes):
  """What they printed: (stdout, stderr) of each; all of them did well."""
  try:
    shown = finish(processes, seconds=240)
  finally:
    for process in processes:
      process.kill()
  for process, (_, error) in zip(processes, shown):
    assert process.returncode == 0, error[-3000:]
  return shown


@pytest.fixture(scope="module")
def two(alone):
  """(folder, what each process printed): `one` was trained by one process of
  eight devices, `two` by two of four, as a SLURM step starts them."""
  experiment = alone / "experiment.py"
  experiment.write_text(_EXPERIMENT.format(folder=str(alone)))
  job = str(slurm_job())
  return alone, outputs([
    spawn(
      "-m", "launch.train", "--distributed", f"--config={experiment}",
      f"--workdir={alone / 'two'}", JAX_NUM_CPU_DEVICES="4", SLURM_JOB_ID=job,
      SLURM_STEP_NODELIST="127.0.0.1", SLURM_NTASKS="2",
      SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank),
    )
    for rank in range(2)
  ])  # fmt: skip


@pytest.fixture(scope="module")
def stopped(alone):
  """(folder, what each process printed): `long` was trained by one process;
  `long_cut`, its first half, went on in two until one of them got SIGTERM."""
  workflow.train(config(alone, LONG), alone / "long")
  cut(alone / "long", alone / "long_cut", LONG)
  log = alone / "long_cut/models/tiny/metrics.jsonl"
  before = log.stat().st_ino
  processes = start(alone, LONG, "long_cut", measured="one")
  try:
    wait_for(processes, alone / "long_cut", LONG // 2 + 2, before)
    processes[1].send_signal(signal.SIGTERM)
    shown = finish(processes, seconds=120)
  finally:
    for process in processes:
      process.kill()
  assert [p.returncode for p in processes] == [loop.PREEMPTED] * 2, shown
  return alone, shown


def test_two_processes_of_a_slurm_step_train_what_one_does(two):
  folder, shown = two
  # Only one of them prepared, says how training goes, and what came of it.
  assert "unchanged, skipped" in shown[1][1]
  said = ["on 8 × cpu" in error for _, error in shown]
  assert said == [True, False], shown
  assert ["N@10" in output for output, _ in shown] == [True, False], shown
  found = losses(folder / "two")
  assert len(found) == 8
  assert found == pytest.approx(losses(folder / "one"), rel=TOLERANCE)
  metrics = Evaluation.load(folder / "two", "tiny", "test").metrics
  expected = Evaluation.load(folder / "one", "tiny", "test").metrics
  assert metrics["queries"] == expected["queries"] == 40
  assert metrics == pytest.approx(expected, abs=1e-3)


def test_each_process_reads_the_rows_that_its_devices_hold(stopped):
  _, shown = stopped
  rows = [
    [line for line in printed.splitlines() if line.startswith("rows")]
    for printed, _ in shown
  ]
  numbers = [" ".join(map(str, range(*r))) for r in ((8,), (8, 16), (16,))]
  assert rows[0] == [f"rows {numbers[0]}", f"rows {numbers[2]}"]
  assert rows[1] == [f"rows {numbers[1]}", f"rows {numbers[2]}"]


def test_two_processes_measure_the_same(stopped):
  folder, shown = stopped
  first, second = (float(out.split("ndcg")[1].split()[0]) for out, _ in shown)
  assert first == second
  workflow.location(folder / "one", "tiny", "validation").unlink()
  expected = workflow.evaluate(folder / "one", "tiny", "validation").metrics
  assert first == pytest.approx(expected["ndcg@10"], abs=1e-3)


def test_one_goes_on_in_two_and_where_one_is_preempted_another_mesh_does(
  stopped, capsys
):
  folder, shown = stopped
  half = LONG // 2
  assert f"resumed at step {half}" in shown[0][1]
  _, saved = checkpoint.steps(folder / "long_cut/models/tiny/checkpoints")
  assert half + 2 <= saved < LONG
  workflow.train(config(folder, LONG, fsdp=2), folder / "long_cut")
  assert f"resumed at step {saved}" in capsys.readouterr().err
  found = losses(folder / "long_cut")
  assert len(found) == LONG + 2
  assert found == pytest.approx(losses(folder / "long"), rel=TOLERANCE)


@pytest.mark.parametrize("devices", [8, 4])
def test_a_run_of_two_processes_goes_on_with_one(
  two, devices, tmp_path, monkeypatch, capsys
):
  """On the same mesh, and on half the devices."""
  folder, _ = two
  make_mesh = partitioning.make_mesh
  monkeypatch.setattr(
    partitioning, "make_mesh",
    lambda config: make_mesh(config, jax.devices()[:devices]),
  )  # fmt: skip
  cut(folder / "two", tmp_path / "cut")
  workflow.train(config(folder), tmp_path / "cut")
  said = capsys.readouterr().err
  assert f"on {devices} × cpu, resumed at step 3" in said
  found, expected = losses(tmp_path / "cut"), losses(folder / "two")
  assert found == pytest.approx(expected, rel=TOLERANCE)


def test_killed_processes_resume_bit_equal(two):
  """kill -9 to one and then to the other; benchmarks/kill_resume.py does more.

  Against the run of two processes that nobody disturbed.
  """
  folder, _ = two
  processes = start(folder, 6, "killed")
  try:
    wait_for(processes, folder / "killed", 5)
    processes[0].kill()
    time.sleep(1.0)
  finally:
    for process in processes:
      process.kill()
  finish(processes, seconds=60)
  run, whole = folder / "killed/models/tiny", folder / "two/models/tiny"
  assert checkpoint.steps(run / "checkpoints") == [3], "nothing was to be lost"
  shown = outputs(start(folder, 6, "killed"))
  assert "resumed at step 3" in shown[0][1]
  assert losses(folder / "killed") == losses(folder / "two")
  for place in ("checkpoints/6", "best/6"):
    assert kill_resume.same_arrays(run / place, whole / place), place
