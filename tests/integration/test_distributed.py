"""Two processes with real collectives train what one process trains."""

import os
import pathlib
import signal
import socket
import subprocess
import sys
import time

import pytest

from onerec_jax import checkpoint, model_configs, workflow
from onerec_jax.evaluation.result import Evaluation
from onerec_jax.training import loop, metrics_writer
from tests import worlds

ROOT = pathlib.Path(__file__).resolve().parents[2]
_PROGRAM = """
import pathlib, sys, jax
jax.config.update("jax_num_cpu_devices", 2)
address, rank, folder, steps, fsdp = sys.argv[1:]
jax.distributed.initialize(address, 2, int(rank))
assert jax.device_count() == 4
from onerec_jax import workflow
from tests.integration import test_distributed
folder = pathlib.Path(folder)
config = test_distributed.config(folder, int(steps), int(fsdp))
workflow.train(config, folder / "two")
print("ndcg", workflow.evaluate(folder / "two", "tiny").metrics["ndcg@10"])
"""


def config(folder, steps=6, fsdp=1):
  """Without dropout, whose masks go by a row's place in the batch."""
  c = worlds.config(folder)
  c.mesh.fsdp = fsdp
  c.model = model_configs.SASRecConfig(
    num_layers=1, d_model=16, d_ff=32, dropout=0.0
  )
  c.training.num_steps = steps
  c.training.log_every, c.training.validate_every = 1, steps // 2
  c.training.checkpoint_every = 0
  return c


def losses(folder):
  lines = metrics_writer.read(folder / "models/tiny/metrics.jsonl")
  return {
    (r["step"], r["kind"]): r.get("loss", r.get("ndcg@10")) for r in lines
  }


def start(folder, steps=6, fsdp=1):
  """Two processes of two devices each."""
  with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{free.getsockname()[1]}"
  environment = dict(os.environ, PYTHONPATH=str(ROOT), JAX_PLATFORMS="cpu")
  return [
    subprocess.Popen(
      [
        sys.executable, "-c", _PROGRAM, address, str(rank), str(folder),
        str(steps), str(fsdp),
      ],
      env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
      text=True,
    )
    for rank in range(2)
  ]  # fmt: skip


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path):
  worlds.write_csv(tmp_path)
  processes = start(tmp_path)
  try:
    workflow.train(config(tmp_path), tmp_path / "one")
    expected = workflow.evaluate(tmp_path / "one", "tiny").metrics
    shown = [process.communicate(timeout=240) for process in processes]
  finally:
    for process in processes:
      process.kill()
  for process, (_, error) in zip(processes, shown):
    assert process.returncode == 0, error[-3000:]
  # Only one of them prepared; both measured the same.
  assert "unchanged, skipped" in shown[1][1]
  assert shown[0][0].split("ndcg")[1] == shown[1][0].split("ndcg")[1]
  found = losses(tmp_path / "two")
  assert len(found) == 8
  assert found == pytest.approx(losses(tmp_path / "one"), rel=1e-3)
  metrics = Evaluation.load(tmp_path / "two", "tiny", "test").metrics
  assert metrics["queries"] == expected["queries"] == 40
  assert metrics == pytest.approx(expected, abs=1e-3)


@pytest.mark.slow
def test_a_preemption_of_one_stops_both_and_another_mesh_goes_on(tmp_path):
  worlds.write_csv(tmp_path)
  steps = 400
  processes = start(tmp_path, steps)
  try:
    log = tmp_path / "two/models/tiny/metrics.jsonl"
    while not (log.exists() and log.read_text().count("\n") >= 3):
      assert all(p.poll() is None for p in processes), "ended too soon"
      time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    shown = [process.communicate(timeout=120)[1] for process in processes]
    assert [p.returncode for p in processes] == [loop.PREEMPTED] * 2, shown
    (saved,) = checkpoint.steps(tmp_path / "two/models/tiny/checkpoints")
    assert 3 <= saved < steps
    processes = start(tmp_path, steps, fsdp=2)
    shown = [process.communicate(timeout=240)[1] for process in processes]
  finally:
    for process in processes:
      process.kill()
  assert [p.returncode for p in processes] == [0, 0], shown
  assert f"resumed at step {saved}" in shown[0]
  trained = [step for step, kind in losses(tmp_path / "two") if kind == "train"]
  assert trained == list(range(1, steps + 1))
