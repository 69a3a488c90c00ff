"""Flags that several programs share, and what they do before starting."""

import contextlib
import dataclasses
import difflib
import functools
import os
import pathlib
import re
import signal
import sys
from collections.abc import Callable, Iterator

import jax
from absl import app, flags, logging
from ml_collections import config_flags

from onerec_jax import alignment_config, model_configs
from onerec_jax import config as config_lib

_ROOT = pathlib.Path(__file__).resolve().parents[1]
OWN_DATA = str(_ROOT / "experiments" / "tables" / "lazy_decoder.py")

_WORKDIR = flags.DEFINE_string(
  "workdir", "", "Work directory; default: runs/<data set> (made if absent)."
)


def program(main: Callable[[], None]) -> Callable[[list[str]], None]:
  """Makes a function an absl main: bad input is one line, not a traceback.

  --verbosity=1 shows the traceback all the same.
  """

  @functools.wraps(main)
  def checked(argv: list[str]) -> None:
    if len(argv) > 1:
      raise app.UsageError(f"unexpected argument {argv[1]!r}")
    try:
      main()
    except (ValueError, OSError, FloatingPointError) as error:
      told = _missing_experiment(error) or str(error)
      expected = ValueError | FileNotFoundError | FloatingPointError
      known = isinstance(error, expected) or told != str(error)
      if not known or logging.get_verbosity() > 0:
        raise
      sys.exit(f"error: {told}")
    except KeyboardInterrupt:
      print("interrupted; the same command goes on", file=sys.stderr)
      sys.stdout.flush()
      # A shell's loop ends only if its program died of the signal.
      signal.signal(signal.SIGINT, signal.SIG_DFL)
      signal.raise_signal(signal.SIGINT)

  return checked


def run(main: Callable[[list[str]], None]) -> None:
  """`app.run`; a config field that is not there is one line, too."""
  app.run(main, flags_parser=_parse)


def _parse(argv: list[str]) -> list[str]:
  try:
    with _unknown_fields_named():
      return app.parse_flags_with_usage(argv)
  except OSError as error:  # where a field of the missing file is set, too
    told = _missing_experiment(error)
    if not told:
      raise
    sys.exit(f"error: {told}")


@contextlib.contextmanager
def _unknown_fields_named() -> Iterator[None]:
  """Makes what ml_collections raises for --config.<field> one line."""
  try:
    yield
  except KeyError as error:
    found = re.search(
      r"Field (\w+) not found on dataclass|<class [^>]*>\.(\w+) does not exist",
      str(error),
    )
    if found is None:
      raise
    name = found[1] or found[2]
    near = difflib.get_close_matches(name, _config_fields(), 1)
    hint = f"did you mean {near[0]}? " if near else ""
    sys.exit(
      f"error: the config has no field {name!r}; {hint}"
      "config.py, model_configs.py and alignment_config.py of onerec_jax have "
      "them all"
    )


def _missing_experiment(error: Exception) -> str:
  """One line for a --config that is no file; empty for any other error."""
  found = re.search(
    r"Attempted \[[^]]*\]:\s+(\S+)\s+\[Errno 2\][^']*'\1'", str(error)
  )
  if found is None:
    return ""
  there = map(str, pathlib.Path().glob("experiments/*/[!_]*.py"))
  near = difflib.get_close_matches(found[1], there, 1)
  hint = f"; did you mean {near[0]}?" if near else ""
  return f"--config: there is no file {found[1]}{hint}"


def _config_fields() -> set[str]:
  """Names of all fields of all parts of a config."""
  return {
    field.name
    for module in (config_lib, model_configs, alignment_config)
    for part in vars(module).values()
    if dataclasses.is_dataclass(part)
    for field in dataclasses.fields(part)
  }


def define_config():
  """--config=<experiment file>[:argument], --config.<field>=<value>."""
  # Fields are looked up in the default file here, in another at parsing.
  with _unknown_fields_named():
    return config_flags.DEFINE_config_file(
      "config",
      default=OWN_DATA,
      help_string="Experiment file, as experiments/beauty/lazy_decoder.py; "
      "change any field by --config.<path>=<value>, "
      "as --config.training.num_epochs=3.",
    )


def define_distributed():
  """--distributed: join the other processes of a pod or cluster."""
  return flags.DEFINE_bool(
    "distributed",
    False,
    "Join the other processes of a TPU pod, SLURM job or Open MPI run.",
  )


def seeds(flag: str, values: list[str]) -> list[list[str]]:
  """What the values of a flag name: each model by its runs, joined by `+`.

  Raises:
    app.UsageError: there is none, or a part is empty or comes twice.
  """
  if not values:
    raise app.UsageError(f"--{flag} is needed, as --{flag}=sft,aligned")
  for name in values:
    joined = name.split("+")
    if "" in joined or len({*joined}) < len(joined):
      raise app.UsageError(
        f"--{flag} has {name!r}: `+` joins seeds, runs that differ"
      )
  return [name.split("+") for name in values]


def workdir(config: config_lib.Config | None = None) -> pathlib.Path:
  """The work directory in force.

  Raises:
    app.UsageError: none was named, and there is no data set to name it after.
  """
  if _WORKDIR.value:
    return pathlib.Path(_WORKDIR.value)
  if config is None:
    raise app.UsageError("--workdir is needed, as --workdir=runs/mine")
  return pathlib.Path("runs") / config.prepare.dataset


def start(distributed: bool = False) -> None:
  """Compilation cache; joins the cluster, if asked for.

  The cache is this user's own, or where $JAX_COMPILATION_CACHE_DIR says.
  """
  # Orbax tells every file it writes; --verbosity=0 shows that again.
  if not flags.FLAGS["verbosity"].present:
    logging.set_verbosity(logging.WARNING)
  if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
    # The cache is trusted code: never a directory others can write to.
    cache = pathlib.Path(
      os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    )
    place = str(cache / "onerec_jax/jax")
    jax.config.update("jax_compilation_cache_dir", place)
  jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
  if distributed:
    jax.distributed.initialize()
