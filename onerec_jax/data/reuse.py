"""Whether prepared data that are there already stay, go, or are in the way."""

import pathlib
from typing import Any

from rich import console as rich_console

from onerec_jax import config as config_lib
from onerec_jax import files
from onerec_jax.config import PrepareConfig
from onerec_jax.data import schema, shards

PLACES = ("data_dir", "events", "items", "users", "engine")
"""Where files lie is no part of what they say: their content is hashed. Nor is
what runs the SQL: the shards come out the same."""
_LATER = ("user_ids",)
"""Settings that came when there were data and runs: as they are by default they
leave those what they were."""


def check_files(config: PrepareConfig) -> None:
  """Refuses files that would not be read.

  Raises:
    ValueError: files of a data set that brings its own, or no events.
  """
  given = [name for name in ("events", "items", "users") if vars(config)[name]]
  if given and config.dataset != "tables":
    raise ValueError(
      f"prepare.{given[0]} is read by data set 'tables', and this is "
      f"{config.dataset!r}: add --config.prepare.dataset=tables"
    )
  if given and not config.events:
    raise ValueError(
      f"prepare.{given[0]} without events: name these again with "
      "--config.prepare.events"
    )


def check_dataset(config: PrepareConfig, directory: pathlib.Path) -> None:
  """Refuses to replace another data set, which runs may have been trained on.

  Raises:
    ValueError: that is what would happen.
  """
  there = shards.read_manifest(directory)["dataset"]
  if there != config.dataset:
    raise ValueError(
      f"{directory} holds data set {there!r}, and this is {config.dataset!r}: "
      "take another --workdir, or to go on with what is there add "
      "--config.prepare.dataset=tables"
    )


def as_it_is(config: PrepareConfig, directory: pathlib.Path) -> pathlib.Path:
  """The directory of what is prepared already, whatever it came from.

  Raises:
    ValueError: there is nothing, or the config asks for something else.
  """
  try:
    manifest = shards.read_manifest(directory)
  except FileNotFoundError as error:
    raise ValueError(
      f"nothing is prepared in {directory}, and data set 'tables' was given no "
      "events; name them with --config.prepare.events=FILE.csv (or .parquet)"
    ) from error
  # Data of an earlier version do not say how they were prepared.
  there = manifest.get("prepare", {})
  usual = settings(PrepareConfig(dataset="tables"))
  for name, value in settings(config).items():
    if name in ("dataset", "simulation"):
      continue
    known = there.get(name, usual[name] if name in _LATER else value)
    if value not in (usual[name], known):
      raise ValueError(
        f"{directory} was prepared with prepare.{name}={known!r}, and "
        f"this is {value!r}: name the events again with "
        "--config.prepare.events to prepare anew, or set "
        f"--config.prepare.{name}={known!r}"
      )
  return directory


def settings(config: PrepareConfig) -> dict[str, Any]:
  """How data are prepared, wherever they lie."""
  values = config_lib.to_dict(config)
  return {name: value for name, value in values.items() if name not in PLACES}


def fingerprint(config: PrepareConfig, tables: schema.Tables) -> str:
  """Of the settings and the files' content: what makes prepared data."""
  values, usual = settings(config), settings(PrepareConfig())
  for name in _LATER:
    if values[name] == usual[name]:
      del values[name]
  return files.fingerprint(
    shards.FORMAT_VERSION, values, schema.checksums(tables)
  )


def is_current(
  directory: pathlib.Path, print_: str, console: rich_console.Console
) -> bool:
  """Whether what is there is whole and has this fingerprint; says so.

  Args:
    directory: holds prepared data.
    print_: the fingerprint wanted.
    console: to say it on.
  """
  manifest = shards.read_manifest(directory)
  if manifest["fingerprint"] != print_:
    console.print(
      f"{directory}: inputs or config changed, preparing again", soft_wrap=True
    )
    return False
  try:
    shards.verify(directory, manifest)
  except ValueError as error:
    console.print(f"{error} (doing so)", markup=False, soft_wrap=True)
    return False
  # A path breaks lines anywhere, and who greps the log finds half of it.
  console.print(
    f"{directory}: unchanged, skipped (fingerprint {print_})", soft_wrap=True
  )
  return True
