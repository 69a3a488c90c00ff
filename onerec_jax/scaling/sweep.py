"""Sweeps: many runs from one file, each named, skipped when done, resumable.

An experiment file has `get_sweep(arg) -> dict[str, Config]`: the name of a run
→ its config, in the order they run. All share one work directory, hence one
data set; a run is <workdir>/models/<name>, as any other. What is done is what
the runs' directories say; the manifest <workdir>/sweeps/<sweep>.json tells it
in one place.
"""

import copy
import dataclasses
import functools
import importlib.util
import pathlib
import re
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

from onerec_jax import checkpoint, files, runs
from onerec_jax import config as config_lib
from onerec_jax.inference import assemble
from onerec_jax.training import loop

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Sweep:
  """The runs of an experiment file.

  Attributes:
    spec: <file>:<argument>.
    name: of the manifest.
    configs: in order; each config's name is its run's.
  """

  spec: str
  name: str
  configs: Sequence[config_lib.Config]

  def config(self, index: int) -> config_lib.Config:
    """The config of a run.

    Raises:
      ValueError: there is no such run.
    """
    if not 0 <= index < len(self.configs):
      raise ValueError(
        f"{self.spec} has no run {index}; its {len(self.configs)} runs count "
        "from 0"
      )
    return self.configs[index]

  def select(self, pattern: str) -> list[int]:
    """Indices of the runs whose name holds a match of a regular expression.

    Raises:
      ValueError: no regular expression, or no run matches.
    """
    try:
      found = [
        index
        for index, config in enumerate(self.configs)
        if re.search(pattern, config.name)
      ]
    except re.error as error:
      message = f"{pattern!r} is no regular expression: {error}"
      raise ValueError(message) from error
    if not found:
      names = ", ".join(config.name for config in self.configs)
      raise ValueError(f"no run of {self.spec} matches {pattern!r}: {names}")
    return found


def changed(
  base: config_lib.Config, changes: Mapping[str, Any]
) -> config_lib.Config:
  """A copy of a config with some fields set.

  Args:
    base: stays as it is.
    changes: dotted path → value, as {"model.d_model": 64}; in order, so that a
      new `model` can be set first and then a field of it.

  Raises:
    ValueError: an unknown field, named.
  """
  config = copy.deepcopy(base)
  for path, value in changes.items():
    *parents, last = path.split(".")
    node: Any = config
    for number, name in enumerate([*parents, last], start=1):
      known = (
        [field.name for field in dataclasses.fields(node)]
        if dataclasses.is_dataclass(node)
        else []
      )
      if name not in known:
        where = ".".join(["config", *path.split(".")[: number - 1]])
        raise ValueError(
          f"{path!r} changes a field {name!r} that {where} does not have; it "
          f"has {', '.join(known) or 'none'}"
        )
      if number <= len(parents):
        node = getattr(node, name)
    setattr(node, last, copy.deepcopy(value))
  return config


def expand(spec: str) -> Sweep:
  """Reads an experiment file's sweep.

  Args:
    spec: <file> or <file>:<argument>; the argument goes to get_sweep.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: it has no get_sweep, or its runs cannot share a directory.
  """
  path, _, arg = spec.partition(":")
  if not pathlib.Path(path).is_file():
    raise FileNotFoundError(f"no file {path!r}, which --sweep={spec} names")
  found = importlib.util.spec_from_file_location("sweep_file", path)
  module = importlib.util.module_from_spec(found)
  found.loader.exec_module(module)
  if not hasattr(module, "get_sweep"):
    raise ValueError(
      f"{path} has no get_sweep(arg) -> dict[str, Config]; a file of one run "
      "goes to launch.train --config"
    )
  name = "_".join([pathlib.Path(path).stem, *re.findall(r"[\w.-]+", arg)])
  configs = []
  for run, config in module.get_sweep(arg).items():
    try:
      runs.check_name(run)
    except ValueError as error:
      raise ValueError(f"{spec}: {error}") from error
    configs.append(changed(config, {"name": run}))
  if not configs:
    raise ValueError(f"{spec}: get_sweep returned no run")
  for config in configs[1:]:
    if config.prepare != configs[0].prepare:
      raise ValueError(
        f"{spec}: runs {configs[0].name} and {config.name} prepare other data, "
        "and a work directory holds one; make them two sweeps, told apart by "
        "the argument"
      )
  return Sweep(spec, name, configs)


@dataclasses.dataclass
class Entry:
  """A run in the manifest.

  Attributes:
    name: of the run.
    fingerprint: of its config.
    command: that trains it alone, or goes on with it.
    state: `pending` or `done`.
  """

  name: str
  fingerprint: str
  command: list[str]
  state: str

  def __str__(self) -> str:
    return f"{self.state:7} {self.name}"


@dataclasses.dataclass
class Manifest:
  """A sweep as it stood when this was made.

  Attributes:
    path: where `save` puts it.
    sweep: the sweep's <file>:<argument>.
    entries: the runs, in order.
  """

  path: pathlib.Path
  sweep: str
  entries: list[Entry]

  def pending(self, indices: Sequence[int]) -> dict[int, str]:
    """Those of some runs that are not done: index → name."""
    entries = {i: self.entries[i] for i in indices}
    return {i: e.name for i, e in entries.items() if e.state != "done"}

  def save(self) -> None:
    """Writes it, whole or not at all."""
    files.write_json(
      self.path,
      {
        "format_version": FORMAT_VERSION,
        "sweep": self.sweep,
        "runs": [dataclasses.asdict(entry) for entry in self.entries],
      },
    )


def is_done(workdir: files.PathLike, name: str) -> bool:
  """Whether a run was trained to its end."""
  return (assemble.run_directory(workdir, name) / "finished.json").exists()


def survey(
  sweep: Sweep, workdir: files.PathLike, command: Sequence[str]
) -> Manifest:
  """What is done of a sweep; writes nothing.

  Args:
    sweep: the sweep.
    workdir: the work directory.
    command: that trains a run, but for --index.

  Raises:
    ValueError: a run was begun with other settings under the same name.
  """
  entries = []
  for index, config in enumerate(sweep.configs):
    run = assemble.run_directory(workdir, config.name)
    if (run / "best.json").exists() or checkpoint.steps(run / "checkpoints"):
      # Of a run that kept something; for such a one nothing is written.
      old = files.read_json(run / "config.json")
      runs.claim(run, old | {"config": config_lib.to_dict(config)})
    entries.append(
      Entry(
        config.name,
        config_lib.fingerprint(config),
        [*command, f"--index={index}"],
        "done" if is_done(workdir, config.name) else "pending",
      )
    )
  path = pathlib.Path(workdir) / "sweeps" / f"{sweep.name}.json"
  return Manifest(path, sweep.spec, entries)


def run_locally(
  manifest: Manifest, workdir: files.PathLike, indices: Sequence[int]
) -> None:
  """Trains runs one after the other, each in a process of its own.

  So memory is freed, and what breaks one does not end the others. A run that
  exits with status 75 was preempted and is started again.

  Args:
    manifest: of `survey`; saved after each run.
    workdir: the work directory.
    indices: of the runs; those done are skipped.

  Raises:
    ValueError: at the end, naming the runs that failed.
    SystemExit: with status 75 after SIGTERM, once the run in progress has
      saved its state.
  """
  # Flushed, to stand between what the runs print.
  say = functools.partial(print, flush=True)
  todo = list(manifest.pending(indices))
  say(
    f"{manifest.sweep}: {len(todo)} runs to train, "
    f"{len(indices) - len(todo)} done before"
  )
  manifest.save()
  failed, begin = [], time.perf_counter()
  for number, index in enumerate(todo):
    entry = manifest.entries[index]
    left = ""
    if number:
      mean = (time.perf_counter() - begin) / number
      left = f", about {mean * (len(todo) - number) / 60:.0f} min left"
    say(f"[{number + 1}/{len(todo)}] {entry.name}{left}")
    status = loop.PREEMPTED
    while status == loop.PREEMPTED:
      status = _run(entry.command)
    if is_done(workdir, entry.name):
      entry.state = "done"
      manifest.save()
    if status or entry.state != "done":
      say(f"{entry.name} ended with status {status}; the others go on")
      failed.append(entry.name)
  if failed:
    raise ValueError(
      f"failed: {', '.join(failed)}; see above, and run the same command again"
    )


def _run(command: list[str]) -> int:
  """A command's exit status; SIGTERM and Ctrl-C are passed on to it."""
  got = []
  child = None

  def stop(signum, frame):
    del frame
    got.append(signum)
    if child is not None:
      child.send_signal(signum)

  previous = {
    one: signal.signal(one, stop)
    for one in (signal.SIGTERM, signal.SIGINT)
    if signal.getsignal(one) is not signal.SIG_IGN  # as under nohup
  }
  try:
    # In a group of its own, or a terminal's Ctrl-C would come to it twice, and
    # the second does not wait until all is saved.
    child = subprocess.Popen(command, process_group=0)
    for signum in got:  # between the two lines above
      child.send_signal(signum)
    status = child.wait()
  finally:
    for one, handler in previous.items():
      signal.signal(one, handler)
  if signal.SIGINT in got:
    raise KeyboardInterrupt
  if got:
    raise SystemExit(loop.PREEMPTED)
  return status
