"""Several processes with real collectives, and other numbers of them after."""

import asyncio
import contextlib
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from orbax.checkpoint._src.path import async_path

from benchmarks import kill_resume
from onerec_jax import checkpoint, files, partitioning, workflow
from onerec_jax.evaluation.result import Evaluation
from onerec_jax.training import loop, metrics_writer

pytestmark = pytest.mark.slow
# Rows and randomness are the same ones; the collectives of several processes
# add up in another order than those of one, and fewer devices do too. Other
# rows, or other dropout, would differ in the third digit.
TOLERANCE = 1e-5
ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS, CUT = 18, 15
NAME = kill_resume.WHOLE
_PROGRAM = """
import pathlib, sys, jax
from benchmarks import kill_resume
jax.config.update("jax_num_cpu_devices", kill_resume.DEVICES)
address, rank, folder, run, *names = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
assert jax.device_count() == 4
from onerec_jax import config, partitioning, workflow
from tests.integration import test_distributed
test_distributed.look_late(int(rank))
for mesh in (config.MeshConfig(), config.MeshConfig(data=1, tensor=4)):
  rows = partitioning.local_rows(partitioning.make_mesh(mesh), 16)
  print("rows", *rows.tolist())
folder = pathlib.Path(folder)
for name in names:
  workflow.train(getattr(test_distributed, run)(), folder / name)
found = workflow.evaluate(folder / names[0], test_distributed.NAME)
print("ndcg", found.metrics["ndcg@10"])
"""


def short():
  """What kill_resume compares with: trained here, it need not do so again."""
  return kill_resume.config(NAME, STEPS)


def long(fsdp=1):
  """Long enough to be stopped in the middle."""
  c = kill_resume.config(NAME, steps=100)
  c.mesh.fsdp, c.training.checkpoint_every = fsdp, 0
  return c


def losses(folder):
  lines = metrics_writer.read(folder / f"models/{NAME}/metrics.jsonl")
  return {(r["step"], r["kind"]): r["loss"] for r in lines}


def start(folder, run, *names):
  """Two processes of two devices each that train such runs in directories."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  # Only the first would find its programs in a cache; the other's collectives
  # wait 30 s for it at most.
  environment = dict(
    os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu",
    JAX_ENABLE_COMPILATION_CACHE="false", XLA_FLAGS=kill_resume.XLA_FLAGS,
    PYTHONFAULTHANDLER="1",
  )  # fmt: skip
  return [
    subprocess.Popen(
      [
        sys.executable, "-c", _PROGRAM, address, str(rank), str(folder), run,
        *names,
      ],
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]  # fmt: skip


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


def cut(workdir, copy):
  """Copies a run, as it was before its last steps."""
  shutil.copytree(workdir, copy)
  run = copy / "models" / NAME
  for step in checkpoint.steps(run / "checkpoints"):
    if step > CUT:
      shutil.rmtree(run / "checkpoints" / str(step))
  assert checkpoint.steps(run / "checkpoints")[-1] == CUT
  # So that the resumed run replaces it (look_late).
  assert files.read_json(run / "best.json")["step"] == STEPS
  (run / "finished.json").unlink()


@contextlib.contextmanager
def on(devices):
  """Meshes of fewer devices than there are."""
  make_mesh = partitioning.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      partitioning,
      "make_mesh",
      lambda config: make_mesh(config, jax.devices()[:devices]),
    )
    yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(folder, what each process printed): `one` was trained by one process of
  four devices, `two` by two of two, `one_cut` first so and then so."""
  folder = tmp_path_factory.mktemp("trained")
  with on(4):
    workflow.train(short(), folder / "one")
    workflow.evaluate(folder / "one", NAME)
  cut(folder / "one", folder / "one_cut")
  processes = start(folder, "short", "two", "one_cut")
  try:
    shown = finish(processes, seconds=240)
  finally:
    for process in processes:
      process.kill()
  for process, (_, error) in zip(processes, shown):
    assert process.returncode == 0, error[-3000:]
  return folder, shown


def test_two_processes_train_what_one_does(trained):
  folder, shown = trained
  # Only one of them prepared; both measured the same.
  assert "unchanged, skipped" in shown[1][1]
  assert shown[0][0].split("ndcg")[1:] == shown[1][0].split("ndcg")[1:]
  found = losses(folder / "two")
  assert len(found) == STEPS + 2
  assert found == pytest.approx(losses(folder / "one"), rel=TOLERANCE)
  metrics = Evaluation.load(folder / "two", NAME, "test").metrics
  expected = Evaluation.load(folder / "one", NAME, "test").metrics
  assert metrics["queries"] == expected["queries"] > 40
  assert metrics == pytest.approx(expected, abs=1e-3)


def test_each_process_reads_the_rows_that_its_devices_hold(trained):
  _, shown = trained
  rows = [
    [line for line in printed.splitlines() if line.startswith("rows")]
    for printed, _ in shown
  ]
  numbers = [" ".join(map(str, range(*r))) for r in ((8,), (8, 16), (16,))]
  assert rows[0] == [f"rows {numbers[0]}", f"rows {numbers[2]}"]
  assert rows[1] == [f"rows {numbers[1]}", f"rows {numbers[2]}"]


def test_a_run_of_one_process_goes_on_with_two(trained):
  folder, shown = trained
  assert f"resumed at step {CUT}" in shown[0][1]
  found = losses(folder / "one_cut")
  assert len(found) == STEPS + 2
  assert found == pytest.approx(losses(folder / "one"), rel=TOLERANCE)


@pytest.mark.parametrize("devices", [4, 2])
def test_a_run_of_two_processes_goes_on_with_one(
  trained, devices, tmp_path, capsys
):
  """On the same mesh, and on half the devices."""
  folder, _ = trained
  cut(folder / "two", tmp_path / "cut")
  with on(devices):
    workflow.train(short(), tmp_path / "cut")
  said = capsys.readouterr().err
  assert f"on {devices} × cpu, resumed at step {CUT}" in said
  found, expected = losses(tmp_path / "cut"), losses(folder / "two")
  assert found == pytest.approx(expected, rel=TOLERANCE)


def test_a_preemption_of_one_stops_both_and_another_mesh_goes_on(
  tmp_path, capsys
):
  steps = long().training.num_steps
  processes = start(tmp_path, "long", "run")
  try:
    log = tmp_path / f"run/models/{NAME}/metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
      assert all(p.poll() is None for p in processes), "ended too soon"
      time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    shown = [error for _, error in finish(processes, seconds=120)]
  finally:
    for process in processes:
      process.kill()
  assert [p.returncode for p in processes] == [loop.PREEMPTED] * 2, shown
  run = tmp_path / "run/models" / NAME
  (saved,) = checkpoint.steps(run / "checkpoints")
  assert 3 <= saved < steps
  with on(4):
    workflow.train(long(fsdp=2), tmp_path / "run")
  assert f"resumed at step {saved}" in capsys.readouterr().err
  trained = [step for step, kind in losses(tmp_path / "run") if kind == "train"]
  assert trained == list(range(1, steps + 1))


def test_killed_processes_resume_bit_equal(trained):
  """kill -9 to one process, then to both; more: benchmarks/kill_resume.py."""
  folder, _ = trained
  # By this seed the first process dies after step 5 and both after step 7.
  record = kill_resume.measure(
    folder / "two", kills=2, seed=463, steps=STEPS, start_s=0.0
  )
  first, second = record["kills"]
  assert (first["killed"], second["killed"]) == ("first", "both")
  for kill in (first, second):
    assert kill["in"] == "steps"
    assert kill["saved"] > 0, "nothing was there to lose"
  assert second["resumed_at"] == first["saved"]
  assert record["end"]["resumed_at"] == second["saved"]
  assert record["equal"], record
