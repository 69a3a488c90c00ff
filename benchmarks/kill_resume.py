r"""Kills a run of two processes at random moments; nothing may be lost by it.

  python -m benchmarks.kill_resume [--kills=20] [--seed=0] [--steps=200] \
    [--output=results/raw/kill_resume.json]

Two processes of two CPU devices each train a small SASRec, dropout and all, on
the simulated world. One run is left alone. Of another, the first process, the
second or both get SIGKILL at random moments: while starting, restoring,
stepping or saving. The survivor is given a moment and then killed too, as
clusters do, and the same command starts again. All numbers that it logs, the
newest checkpoint at each start, and at the end state and best parameters must
equal those of the undisturbed run bit for bit.
"""

import os
import pathlib
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from typing import Any

import jax
import numpy as np
import rich
import rich.table
from absl import app, flags, logging
from orbax.checkpoint import v1 as ocp

from benchmarks import xla_flags
from onerec_jax import checkpoint, files, model_configs, workflow
from onerec_jax import config as config_lib
from onerec_jax.training import metrics_writer

_KILLS = flags.DEFINE_integer("kills", 20, "How often.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the moments.")
_STEPS = flags.DEFINE_integer("steps", 200, "Training steps of a run.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON record; default: none.")

_PROCESSES, _DEVICES = 2, 2
_WHOLE, _KILLED = "whole", "killed"
_VICTIMS = {"both": (0, 1), "first": (0,), "second": (1,)}
_GRACE_S = 2.0
_PATIENCE_S = 300.0
"""After so long without an end, a start has failed."""
_STARTING = 0.25
"""Share of the kills that fall into a start, not into the steps."""


def _config(name: str, steps: int) -> config_lib.Config:
  c = config_lib.Config(name=name)
  c.prepare.dataset, c.prepare.where = "simulator", "click = 1"
  world = c.prepare.simulation
  world.num_users, world.num_items, world.num_days = 60, 60, 2
  c.pipeline.batch_size, c.pipeline.max_history = 8, 8
  c.pipeline.row_positions = c.pipeline.row_targets = 16
  c.model = model_configs.SASRecConfig(
    num_layers=1, d_model=16, num_heads=2, d_ff=32
  )
  c.optimizer.learning_rate = 1e-2
  c.mesh.fsdp = 2
  c.training.num_steps, c.training.log_every = steps, 1
  c.training.checkpoint_every = 3
  c.training.validate_every = max(1, steps // 2)
  # What checkpoints are compared with, and as few as may be.
  c.training.keep_checkpoints = steps if name == _WHOLE else 2
  c.evaluation.beam_width, c.evaluation.batch_size = 10, 16
  return c


def work(address: str, rank: str, workdir: str, name: str, steps: str) -> None:
  """One of the processes."""
  jax.config.update("jax_num_cpu_devices", _DEVICES)
  jax.distributed.initialize(address, _PROCESSES, int(rank))
  workflow.train(_config(name, int(steps)), workdir)


_PROGRAM = "import sys; from benchmarks import kill_resume as program; \
program.work(*sys.argv[1:])"


class _Run:
  """One start of the processes of a run."""

  def __init__(self, workdir: pathlib.Path, name: str, steps: int):
    self.folder = workdir / "models" / name
    self._log = workdir / f"{name}.log"
    self._metrics = self.folder / "metrics.jsonl"
    self._before = self._inode()
    with socket.socket() as free:
      free.bind(("127.0.0.1", 0))
      address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = dict(
      os.environ,
      JAX_PLATFORMS="cpu",
      XLA_FLAGS=xla_flags.QUICK_TO_COMPILE,
      # Only the first process would find its programs in a cache, and the
      # collectives of CPUs wait 30 s for who still compiles.
      JAX_ENABLE_COMPILATION_CACHE="false",
    )
    with open(self._log, "w") as log:
      self._processes = [
        subprocess.Popen(
          [
            sys.executable, "-c", _PROGRAM, address, str(rank), str(workdir),
            name, str(steps),
          ],
          env=environment, stdout=log, stderr=log,
        )
        for rank in range(_PROCESSES)
      ]  # fmt: skip

  def _inode(self) -> int:
    return self._metrics.stat().st_ino if self._metrics.exists() else 0

  def wait_for(self, step: int) -> None:
    """Returns when this start has logged a step from there on.

    Raises:
      RuntimeError: a process ended before.
    """
    deadline = time.monotonic() + _PATIENCE_S
    # A start writes the log anew: what lies there before is of another one.
    while self._inode() == self._before or self.logged() < step:
      ended = any(p.poll() is not None for p in self._processes)
      if ended or time.monotonic() > deadline:
        self.kill("both")
        raise RuntimeError(f"no step {step}:\n{self.text()}")
      time.sleep(0.005)

  def logged(self) -> int:
    """The last step in the log."""
    return max(
      (r["step"] for r in metrics_writer.read(self._metrics)), default=0
    )

  def kill(self, who: str) -> None:
    """SIGKILL to these, and to what is left a moment later."""
    for victim in _VICTIMS[who]:
      self._processes[victim].send_signal(signal.SIGKILL)
    deadline = time.monotonic() + _GRACE_S
    for process in self._processes:
      try:
        process.wait(max(0.0, deadline - time.monotonic()))
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

  def finish(self) -> None:
    """Waits for the end.

    Raises:
      RuntimeError: the processes failed.
    """
    try:
      codes = [process.wait(_PATIENCE_S) for process in self._processes]
    except subprocess.TimeoutExpired:
      codes = [None]
    if any(code != 0 for code in codes):
      self.kill("both")
      raise RuntimeError(f"did not finish:\n{self.text()}")

  def text(self) -> str:
    """The end of what this start printed."""
    return self._log.read_text()[-3000:]

  def resumed_at(self) -> int | None:
    """The step this start went on from; None if it did not come so far."""
    log = self._log.read_text()
    found = re.search(r"resumed at step (\d+)", log)
    return int(found[1]) if found else 0 if " parameters, " in log else None


def _arrays(path: pathlib.Path) -> Any:
  """What was saved there, on this process's one device."""
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  shapes = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here),
    ocp.metadata(path).metadata,
  )
  return jax.device_get(ocp.load(path, shapes))


def same_arrays(one: pathlib.Path, other: pathlib.Path) -> bool:
  """Whether the same bits were saved at two places, by whatever processes."""
  left, right = _arrays(one), _arrays(other)
  same = jax.tree.map(
    lambda a, b: a.dtype == b.dtype and a.tobytes() == b.tobytes(), left, right
  )
  return all(jax.tree.leaves(same))


def _numbers(run: pathlib.Path) -> dict[tuple[int, str], tuple[float, ...]]:
  """What was logged at each step that is no matter of the clock."""
  return {
    (r["step"], r["kind"]): tuple(
      r.get(name) for name in ("loss", "grad_norm", "ndcg@10")
    )
    for r in metrics_writer.read(run / "metrics.jsonl")
  }


def _check(whole: pathlib.Path, killed: pathlib.Path) -> dict[str, Any]:
  """Compares the log and the newest checkpoint with the undisturbed run's."""
  expected, found = _numbers(whole), _numbers(killed)
  equal = all(expected[key] == value for key, value in found.items())
  saved = max(checkpoint.steps(killed / "checkpoints"), default=0)
  if saved:
    place = pathlib.Path("checkpoints") / str(saved)
    equal = equal and same_arrays(whole / place, killed / place)
  return {"logged": len(found), "saved": saved, "equal": equal}


def measure(
  workdir: pathlib.Path, kills: int, seed: int, steps: int
) -> dict[str, Any]:
  """Trains undisturbed and disturbed, and compares.

  Args:
    workdir: an empty directory.
    kills: how often to kill.
    seed: of the moments.
    steps: of a run; checkpoints fall on every third.

  Returns:
    What was done, kill by kill, and whether all was equal.

  Raises:
    RuntimeError: a run failed by itself.
  """
  rng = np.random.default_rng(seed)
  clock = time.monotonic()
  whole = _Run(workdir, _WHOLE, steps)
  whole.wait_for(1)
  start_s = time.monotonic() - clock
  whole.finish()
  rows = []
  points = np.sort(rng.integers(1, max(2, steps - 10), kills)).tolist()
  for step in points:
    who = str(rng.choice(list(_VICTIMS)))
    starting = bool(rng.random() < _STARTING)
    run = _Run(workdir, _KILLED, steps)
    if starting:
      time.sleep(rng.uniform(0.0, start_s))
    else:
      run.wait_for(step)
      time.sleep(rng.uniform(0.0, 0.3))
    run.kill(who)
    row = {"killed": who, "in": "start" if starting else "steps"}
    row["resumed_at"] = run.resumed_at()
    rows.append(row | _check(whole.folder, run.folder))
  run = _Run(workdir, _KILLED, steps)
  run.finish()
  end = {"resumed_at": run.resumed_at(), **_check(whole.folder, run.folder)}
  best = [files.read_json(r.folder / "best.json") for r in (whole, run)]
  place = pathlib.Path("best") / str(best[0]["step"])
  end["equal"] &= best[0] == best[1]
  end["equal"] &= same_arrays(whole.folder / place, run.folder / place)
  return {
    "processes": _PROCESSES, "devices_of_each": _DEVICES, "steps": steps,
    "seed": seed, "kills": rows, "end": end,
    "equal": end["equal"] and all(row["equal"] for row in rows),
    "seconds": time.monotonic() - clock,
  }  # fmt: skip


def main(argv: list[str]) -> None:
  """Entry point."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  logging.set_verbosity(logging.WARNING)  # orbax tells every file it reads
  with tempfile.TemporaryDirectory() as folder:
    record = measure(
      pathlib.Path(folder), _KILLS.value, _SEED.value, _STEPS.value
    )
  names = ("killed", "in", "resumed_at", "logged", "saved", "equal")
  table = rich.table.Table("kill", *names, box=None)
  for number, row in enumerate([*record["kills"], record["end"]], start=1):
    last = number > len(record["kills"])
    values = ("–" if row.get(n) is None else str(row[n]) for n in names)
    table.add_row("end" if last else str(number), *values)
  rich.print(table)
  rich.print(f"equal: {record['equal']}, {record['seconds']:.0f} s")
  if _OUTPUT.value:
    files.write_json(_OUTPUT.value, record)
  if not record["equal"]:
    raise SystemExit(1)


if __name__ == "__main__":
  app.run(main)
