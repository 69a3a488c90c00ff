"""Where a run's metrics go: a JSONL file always, TensorBoard if installed."""

import json
import math
import pathlib
from typing import Any

import jax
from rich.console import Console

from onerec_jax import files


class MetricsWriter:
  """Appends records to metrics.jsonl and prints them; process 0 only.

  Args:
    directory: of the run.
    resume_step: records after this step are dropped: a killed run may have
      written them, and the resumed one will write them again.
  """

  def __init__(self, directory: files.PathLike, resume_step: int):
    self._active = jax.process_index() == 0
    self._console = Console(stderr=True, highlight=False)
    self._tensorboard = None
    if not self._active:
      return
    self.path = pathlib.Path(directory) / "metrics.jsonl"
    kept = [
      json.dumps(record)
      for record in read(self.path)
      if record["step"] <= resume_step
    ]
    files.write_bytes(self.path, "".join(k + "\n" for k in kept).encode())
    self._file = open(self.path, "a", buffering=1)  # noqa: SIM115
    try:
      from tensorboardX import SummaryWriter  # optional extra
    except ImportError:
      return
    self._tensorboard = SummaryWriter(str(pathlib.Path(directory) / "events"))

  def write(self, step: int, kind: str, values: dict[str, Any]) -> None:
    """Records scalars.

    Args:
      step: updates made so far.
      kind: `train` or `validation`.
      values: name → number.
    """
    if not self._active:
      return
    # JSON has no NaN: a metric that is not finite is written as null.
    clean = {
      name: value if math.isfinite(value) else None
      for name, value in values.items()
    }
    record = {"step": step, "kind": kind, **clean}
    self._file.write(json.dumps(record) + "\n")
    if self._tensorboard is not None:
      for name, value in values.items():
        self._tensorboard.add_scalar(f"{kind}/{name}", value, step)

  def say(self, text: str) -> None:
    """Prints a line of progress."""
    if self._active:
      self._console.print(text, soft_wrap=True)

  def close(self) -> None:
    """Flushes everything."""
    if not self._active:
      return
    self._file.close()
    if self._tensorboard is not None:
      self._tensorboard.close()


def read(path: files.PathLike) -> list[dict[str, Any]]:
  """Records of a metrics.jsonl; a last line cut short by a kill is left out."""
  path = pathlib.Path(path)
  if not path.exists():
    return []
  records = []
  lines = path.read_text().splitlines()
  for number, line in enumerate(lines, start=1):
    try:
      records.append(json.loads(line))
    except json.JSONDecodeError as error:
      if number == len(lines):
        break
      raise ValueError(f"{path}, line {number}: not JSON ({error})") from error
  return records
