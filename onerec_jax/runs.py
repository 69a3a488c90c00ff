"""The directory of a run: whose it is, and what is refused before it starts."""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from onerec_jax import checkpoint, files, model_configs, partitioning
from onerec_jax import config as config_lib
from onerec_jax.data import reuse
from onerec_jax.inference import assemble
from onerec_jax.training import loop, metrics_writer

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
POPULARITY = "popularity"
"""The baseline's name among those of runs."""
_RESERVED = (POPULARITY, "cascade", "logging", "oracle", "uniform")
"""Names of what is no run: the baseline, and arms of a test (online_arms)."""


def record(
  system: assemble.System, workdir: files.PathLike, others: Sequence[str] = ()
) -> dict[str, Any]:
  """What a run is made of; a run with another record is another run.

  Args:
    system: of the run.
    workdir: the work directory.
    others: names of the runs whose parameters it is made from.

  Raises:
    FileNotFoundError: one of those has no parameters.
  """
  sids = system.semantic_ids
  found = {
    "config": config_lib.to_dict(system.config),
    "prepared": system.prepared.manifest["fingerprint"],
    "semantic_ids": sids.fingerprint if sids else "",
  }
  if others:
    found["made_from"] = {name: parameters(workdir, name) for name in others}
  return found


def parameters(workdir: files.PathLike, name: str) -> str:
  """A fingerprint of a run's best parameters, without reading them.

  Of the run's record, their step and what they scored then: a run trained anew
  under the same name has another.

  Raises:
    FileNotFoundError: there are none.
  """
  run = assemble.run_directory(workdir, name)
  if not ((run / "config.json").exists() and (run / "best.json").exists()):
    raise FileNotFoundError(
      f"no trained run {name!r} in {run.parent}: train it with python -m "
      "launch.train"
    )
  best = files.read_json(run / "best.json")
  scored = [
    line
    for line in metrics_writer.read(run / "metrics.jsonl")
    if line["kind"] == "validation" and line["step"] == best["step"]
  ]
  made = _identity(files.read_json(run / "config.json"))
  return files.fingerprint({"record": made, "best": best, "scored": scored})


def _identity(record: dict[str, Any]) -> dict[str, Any]:
  """The part of a record that must not change under one name.

  Where raw files lie and over which devices a run is spread are none of it,
  so that a run goes on on another machine.
  """
  config = dict(record["config"])
  config["prepare"] = {
    name: value
    for name, value in config["prepare"].items()
    if name not in reuse.PLACES
  }
  del config["mesh"]
  return record | {"config": config}


def claim(run: pathlib.Path, found: dict[str, Any]) -> None:
  """Writes a run's config.json, or refuses a directory of another run.

  Args:
    run: the run's directory.
    found: its `record`.

  Raises:
    ValueError: the directory holds a run with other settings, named.
  """
  path = run / "config.json"
  kept = checkpoint.steps(run / "checkpoints") or (run / "best.json").exists()
  # A run that failed before it kept anything does not take its name with it.
  if not (path.exists() and kept):
    if jax.process_index() == 0:
      files.write_json(path, found)
    return
  old = files.read_json(path)
  # A field that has come since has its default there.
  old["config"] = config_lib.to_dict(config_lib.from_dict(old["config"]))
  if old["prepared"] != found["prepared"]:
    raise ValueError(
      f"{run} holds a run of other data than is prepared now; give this one "
      f"another --config.name, or delete {run}"
    )
  changes = config_lib.differences(_identity(old), _identity(found), "")
  if changes:
    raise ValueError(
      f"{run} holds a run with other settings ({changes}); give this one "
      f"another --config.name, or delete {run}"
    )


def once(
  system: assemble.System,
  workdir: files.PathLike,
  train: Callable[[Mesh, pathlib.Path], loop.Progress],
  others: Sequence[str] = (),
) -> None:
  """Trains a run, or resumes it, or finds it done.

  Args:
    system: of the run.
    workdir: the work directory.
    train: (mesh, the run's directory) → how it went.
    others: names of the runs whose parameters it is made from.

  Raises:
    FileNotFoundError: one of those has no parameters.
    ValueError: the run's directory holds a run with other settings, or the
      batch does not divide over the devices.
  """
  config = system.config
  run = assemble.run_directory(workdir, config.name)
  finished = (run / "finished.json").exists()
  if not finished:
    mesh = partitioning.make_mesh(config.mesh)
    check(config, mesh, system.prepared.num_items)
  claim(run, record(system, workdir, others))
  if finished:
    print(f"{config.name}: trained already, skipped ({run})")
    return
  progress = train(mesh, run)
  if jax.process_index() == 0:
    files.write_json(run / "finished.json", dataclasses.asdict(progress))


def finished_runs(workdir: files.PathLike) -> list[str]:
  """Names of the runs that have parameters, oldest first."""
  best = pathlib.Path(workdir).glob("models/*/best.json")
  return [
    path.parent.name
    for path in sorted(best, key=lambda path: path.stat().st_mtime)
  ]


def current_runs(workdir: files.PathLike) -> list[str]:
  """Runs to be measured where none is named; says what it leaves out.

  Those that recommend, were trained on the data that are prepared now, and are
  asked for what the latest of them is.
  """
  current: list[str] = []
  for name in reversed(finished_runs(workdir)):
    reason = _left_out(workdir, name, current[:1])
    if reason:
      print(f"{name}: {reason}, left out", file=sys.stderr)
      continue
    if not (assemble.run_directory(workdir, name) / "finished.json").exists():
      print(f"{name}: not trained to its end, as far as it is", file=sys.stderr)
    current.append(name)
  return current[::-1]


def _left_out(workdir: files.PathLike, name: str, latest: list[str]) -> str:
  """Why a run is not to be measured beside the latest; empty: it is."""
  if not assemble.same_data(workdir, name):
    return "trained on other data than is prepared now"
  if not assemble.recommends(workdir, name):
    return "a reward model, whose figures launch.train prints"
  asked = [
    config_lib.from_dict(assemble.read_record(workdir, one)["config"])
    for one in (name, *latest)
  ]
  if asked[0].pipeline.imitate != asked[-1].pipeline.imitate:
    return (
      f"asked for other events than {latest[0]} (pipeline.imitate="
      f"{asked[0].pipeline.imitate}; --models={name} measures it)"
    )
  return ""


def say_if_all_is_imitated(system: assemble.System) -> None:
  """Prints that a log of exposures is imitated, what nobody took as well."""
  config, manifest = system.config, system.prepared.manifest
  shown = {"click", "dislike"} & {*manifest["event_features"]}
  if (
    config.pipeline.imitate != "all"
    or config.pipeline.targets == "session"  # those that prepare.session marks
    or manifest.get("prepare", {}).get("where")
    or isinstance(config.model, model_configs.RewardConfig)
    or not shown
    or jax.process_index()
  ):
    return
  events = manifest["num_events"]
  others = events - manifest["marked_events"]["positive"]
  if others:
    print(
      f"{config.name}: all {events:,} events are imitated and asked for, "
      f"{others:,} of them not positive ({manifest['positive']}); if those "
      "were only shown or disliked, --config.pipeline.imitate=positive leaves "
      "them out",
      file=sys.stderr,
    )


def say_if_stopped(workdir: files.PathLike, name: str) -> None:
  """Prints that a run is its start, where its gate let nothing through."""
  path = assemble.run_directory(workdir, name) / "finished.json"
  if not path.exists() or jax.process_index():
    return
  progress = files.read_json(path)
  if progress.get("stopped") and not progress["best_step"]:
    print(
      f"{name}: stopped by its gate ({progress['stopped']}): its parameters "
      "are the start's"
    )


def check_name(name: str) -> None:
  """Refuses a name that programs would read as several, or as another's.

  Raises:
    ValueError: it is no directory's, or means something else.
  """
  if name in _RESERVED or not _NAME.fullmatch(name):
    raise ValueError(
      f"config.name={name!r} cannot be a run's: want letters, digits, _ . and "
      f"-, and none of {', '.join(_RESERVED)}, which name others"
    )


def check(config: config_lib.Config, mesh: Mesh, num_items: int) -> None:
  """Refuses what could not train, before anything is compiled.

  Raises:
    ValueError: what does not fit, and what to change.
  """
  check_name(config.name)
  _check_leak(config)
  _check_sessions(config)
  _check_cutoffs(config, num_items)
  _check_select(config)
  _check_batch(config, mesh)
  _check_training(config.training)
  if not config.optimizer.clip_norm > 0:
    raise ValueError(
      f"optimizer.clip_norm={config.optimizer.clip_norm} must be above 0, or "
      "no gradient is left; --config.optimizer.clip_norm=inf clips none"
    )


def _check_training(settings: config_lib.TrainingConfig) -> None:
  """Refuses what would lose checkpoints, or turn a guard off in silence."""
  for name in ("keep_checkpoints", "log_every"):
    value = getattr(settings, name)
    if value < 1:
      raise ValueError(
        f"training.{name}={value} must be at least 1; change "
        f"--config.training.{name}"
      )
  if settings.on_nan not in ("error", "skip"):
    raise ValueError(f"training.on_nan={settings.on_nan!r}: want error or skip")


def _check_batch(config: config_lib.Config, mesh: Mesh) -> None:
  """Refuses a batch that cannot be laid out, before jax says so its own way."""
  size = config.pipeline.batch_size
  rows = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
  if size % rows:
    # On a resumed run the batch is given, and what hosts are left may not fit.
    raise ValueError(
      f"pipeline.batch_size={size} is no multiple of the {rows} devices along "
      "data, fsdp and expert; start on a number of devices that divides it, "
      "give some of them to --config.mesh.tensor, or in a new run change "
      "--config.pipeline.batch_size"
    )
  pieces = config.training.microbatches
  if pieces > 1 and isinstance(config.model, model_configs.TwoTowerConfig):
    raise ValueError(
      f"training.microbatches={pieces}: the other targets of a batch are a two "
      "tower's negatives, and a piece has fewer; set it to 1, and lower "
      "--config.pipeline.batch_size where memory is short"
    )
  if pieces < 1 or size % pieces:
    raise ValueError(
      f"pipeline.batch_size={size} is no multiple of training.microbatches="
      f"{pieces}; change --config.pipeline.batch_size or "
      "--config.training.microbatches"
    )


def _check_cutoffs(config: config_lib.Config, num_items: int) -> None:
  if max(config.evaluation.cutoffs) > num_items:
    raise ValueError(
      f"evaluation.cutoffs={config.evaluation.cutoffs} ask for more than the "
      f"{num_items} items there are; set, say, "
      f"--config.evaluation.cutoffs='(1,)' --config.evaluation.select=ndcg@1"
    )
  searched = (
    isinstance(config.model, model_configs.GeneratorConfig)
    and config.pipeline.targets != "session"  # whose cutoff is their length
  )
  if searched and max(config.evaluation.cutoffs) > config.evaluation.beam_width:
    raise ValueError(
      f"evaluation.cutoffs={config.evaluation.cutoffs} ask for more than the "
      f"evaluation.beam_width={config.evaluation.beam_width} beams that are "
      "searched; raise --config.evaluation.beam_width"
    )


def _check_select(config: config_lib.Config) -> None:
  """Refuses a figure that no validation has, or that is best when low."""
  select = config.evaluation.select
  rewards = isinstance(config.model, model_configs.RewardConfig)
  if select == "loss":
    better = "auc" if rewards else "ndcg@10"
    raise ValueError(
      "evaluation.select=loss: the checkpoint of the highest figure is kept, "
      "and a loss is best when low; set, say, "
      f"--config.evaluation.select={better}"
    )
  if rewards:
    if "@" in select:
      raise ValueError(
        f"evaluation.select={select!r} is a figure of recommendations, and a "
        "reward model makes none: set --config.evaluation.select=auc"
      )
    return
  cutoffs = config.evaluation.cutoffs
  if config.pipeline.targets == "session":
    cutoffs = (config.pipeline.session_items,)
  if not select.endswith(tuple(f"@{k}" for k in cutoffs)):
    raise ValueError(
      f"evaluation.select={select!r} is at none of the cutoffs {cutoffs} that "
      f"are measured: set, say, --config.evaluation.select=ndcg@{cutoffs[-1]}"
    )


def _check_leak(config: config_lib.Config) -> None:
  """Refuses an encoder through which earlier targets would see later events."""
  if (
    isinstance(config.model, model_configs.EncoderDecoderConfig)
    and not config.model.causal_encoder
    and config.pipeline.targets not in ("request", "session")
  ):
    raise ValueError(
      "model.causal_encoder=False lets every context position see the whole "
      f"row, and pipeline.targets={config.pipeline.targets} has targets at "
      "many of its times: set --config.pipeline.targets=request or "
      "--config.model.causal_encoder=True"
    )


def _check_sessions(config: config_lib.Config) -> None:
  """Refuses sessions that rows, or the requests of the data, do not hold."""
  wanted = getattr(config.model, "session_items", 1)
  given = config.pipeline.session_items
  if config.pipeline.targets != "session":
    if wanted > 1:
      raise ValueError(
        f"model.session_items={wanted} needs targets in sessions: set "
        "--config.pipeline.targets=session"
      )
  elif given < 1 or given % wanted or config.pipeline.row_targets % given:
    raise ValueError(
      f"pipeline.session_items={given} must be a multiple of "
      f"model.session_items={wanted} and divide pipeline.row_targets="
      f"{config.pipeline.row_targets}"
    )
