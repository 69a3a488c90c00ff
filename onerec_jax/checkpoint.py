"""Saving and restoring: training checkpoints, and parameters alone.

A training checkpoint holds the state and, as metadata, the data iterator's
place and the loop's bookkeeping. Orbax writes each under a temporary name and
renames it when complete, so a killed process leaves the last whole one.

The iterator's place is one value for all processes, not a file of each: any
number of them may go on from there.
"""

import pathlib
import shutil
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from onerec_jax import files

FORMAT_VERSION = 2
"""1 kept the iterator's place in a file of each process."""
_BRIEF = 400
"""Characters of another library's message in one of ours."""


class TrainingCheckpoints:
  """The checkpoints of one run; a context manager.

  Args:
    directory: made if absent.
    keep: how many of the latest stay.
  """

  def __init__(self, directory: files.PathLike, keep: int):
    policies = ocp.training.preservation_policies
    self._directory = pathlib.Path(directory).absolute()
    self._checkpointer = ocp.training.Checkpointer(
      self._directory,
      preservation_policy=policies.LatestN(keep),
      cleanup_tmp_directories=True,
    )

  def __enter__(self) -> "TrainingCheckpoints":
    return self

  def __exit__(self, *exception) -> None:
    self._checkpointer.close()

  @property
  def latest_step(self) -> int | None:
    """Step of the newest whole checkpoint."""
    latest = self._checkpointer.latest
    return None if latest is None else latest.step

  def save(
    self, step: int, state: Any, iterator: Any, metadata: dict[str, Any]
  ) -> None:
    """Writes in the background; the next save or the exit waits for it.

    Args:
      step: updates made so far.
      state: a pytree of arrays.
      iterator: a grain iterator at the batch that comes next; its state is
        made of JSON values, the same in every process.
      metadata: JSON values.
    """
    self._checkpointer.wait()
    self._checkpointer.save_checkpointables_async(
      step,
      {"state": state},
      force=True,
      overwrite=True,
      custom_metadata={
        "format_version": FORMAT_VERSION,
        "iterator": iterator.get_state(),
        **metadata,
      },
    )

  def wait(self) -> None:
    """Returns when the last save is on disk."""
    self._checkpointer.wait()

  def metadata(self, step: int) -> dict[str, Any]:
    """The metadata a checkpoint was saved with.

    Raises:
      ValueError: the checkpoint is of a newer format, or damaged.
    """
    metadata = self._checkpointer.checkpointables_metadata(step)
    values = metadata.custom_metadata
    if not values:
      raise ValueError(
        f"checkpoint {self._directory}/{step} has lost its metadata: "
        + self._without(step)
      )
    version = values.get("format_version", 0)
    if version > FORMAT_VERSION:
      raise ValueError(
        f"checkpoint {self._directory}/{step} has format {version}; this "
        f"version reads up to {FORMAT_VERSION}: update onerec_jax"
      )
    return values

  def restore(self, step: int, abstract_state: Any, iterator: Any) -> Any:
    """Reads a state into the given shapes and shardings.

    Args:
      step: of a checkpoint.
      abstract_state: shapes with shardings; may be those of another mesh and
        of another number of processes.
      iterator: a fresh iterator of the same data; moved to its old place.

    Returns:
      The state.

    Raises:
      ValueError: the checkpoint does not fit the model.
    """
    # Format 1 had no place here; its iterators counted the steps.
    place = self.metadata(step).get("iterator", {"next_index": step})
    try:
      iterator.set_state(place)
      return self._checkpointer.load_checkpointables(
        step, {"state": abstract_state}
      )["state"]
    except Exception as error:
      raise ValueError(
        f"cannot restore {self._directory}/{step}: {_brief(error)}; give the "
        f"config it was written with, or {self._without(step)}"
      ) from error

  def _without(self, step: int) -> str:
    """What to do where a checkpoint is damaged."""
    older = [one for one in steps(self._directory) if one < step]
    if not older:
      return f"delete {self._directory} to start this run anew"
    return (
      f"if it is damaged, delete {self._directory}/{step} to go on from step "
      f"{older[-1]}"
    )


def _brief(error: BaseException) -> str:
  """The cause of what Orbax says, which itself may list every parameter."""
  while error.__cause__ is not None:
    error = error.__cause__
  text = " ".join(str(error).split())
  return text if len(text) <= _BRIEF else f"{text[:_BRIEF]} …"


def save_params(directory: files.PathLike, params: Any) -> None:
  """Writes parameters alone, replacing what was there."""
  directory = pathlib.Path(directory).absolute()
  # Not by orbax's `overwrite`: each process then asks whether something is
  # there, the first removes it, and whoever asks later waits at another barrier
  # than the first, for ever.
  if jax.process_index() == 0 and directory.exists():
    shutil.rmtree(directory)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(f"replace {directory}")
  ocp.save(directory, params)


def load_params(directory: files.PathLike, abstract_params: Any) -> Any:
  """Reads parameters into the given shapes and shardings.

  Raises:
    FileNotFoundError: nothing was saved there.
    ValueError: they do not fit the model.
  """
  directory = pathlib.Path(directory).absolute()
  if not directory.is_dir():
    raise FileNotFoundError(
      f"no parameters in {directory}: train the model first "
      "(python -m launch.train)"
    )
  try:
    return ocp.load(directory, abstract_params)
  except Exception as error:
    raise ValueError(
      f"cannot load {directory}: {_brief(error)}; it was written for another "
      "config or is damaged: train the model again"
    ) from error


def abstract(tree: Any, shardings: Any) -> Any:
  """Shapes with shardings, to restore into."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def steps(directory: files.PathLike) -> Sequence[int]:
  """Steps with a whole checkpoint, ascending."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    return []
  return sorted(
    int(path.name) for path in directory.iterdir() if path.name.isdigit()
  )


def save_best(run: files.PathLike, done: int, params: Any) -> None:
  """Keeps the parameters of the best validation.

  Written beside the old ones; best.json, renamed into place, then points to
  them, so that a kill leaves one whole best model.
  """
  run = pathlib.Path(run)
  save_params(run / "best" / str(done), params)
  if jax.process_index() == 0:
    files.write_json(run / "best.json", {"step": done})
    for old in steps(run / "best"):
      if old != done:
        shutil.rmtree(run / "best" / str(old))


def load_best(run: files.PathLike, abstract_params: Any) -> Any:
  """Parameters of the best validation, into the given shapes and shardings.

  Raises:
    FileNotFoundError: the run has not validated yet.
  """
  run = pathlib.Path(run)
  if not (run / "best.json").exists():
    raise FileNotFoundError(
      f"{run} holds no trained model yet: run python -m launch.train"
    )
  best = files.read_json(run / "best.json")["step"]
  return load_params(run / "best" / str(best), abstract_params)
