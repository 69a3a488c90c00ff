"""What is refused before an alignment starts, and what to change."""

import math
from collections.abc import Callable, Iterator, Mapping

import jax
from jax.sharding import Mesh

from onerec_jax import config as config_lib
from onerec_jax import files
from onerec_jax.alignment import (
  feedback,
  objectives,
  reward_models,
  rewards,
  rollouts,
)
from onerec_jax.alignment_config import AlignmentConfig
from onerec_jax.data import pipeline
from onerec_jax.inference import assemble
from onerec_jax.models import generator

_POSITIVE = "must be above 0", lambda x: x > 0
_NOT_NEGATIVE = "must be at least 0", lambda x: x >= 0
_WEIGHT = "must be at least 0 and finite", lambda x: 0 <= x < math.inf
_SHARE = "must be in [0, 1]", lambda x: 0 <= x <= 1

_BOUNDS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
  "beta": _POSITIVE,
  "temperature": _POSITIVE,
  # At ½ labels say nothing, and rDPO divides by 1 − 2ε.
  "noise": ("must be in [0, 0.5)", lambda x: 0 <= x < 0.5),
  "epsilon": _NOT_NEGATIVE,
  "delta": _NOT_NEGATIVE,
  # 0 is a control's.
  "weight": _WEIGHT,
  "feedback_weight": _WEIGHT,
  "format_weight": _WEIGHT,
  "likelihood": _WEIGHT,
  "margin": ("must be finite", math.isfinite),
  "sync_every": _NOT_NEGATIVE,
  "gate": _NOT_NEGATIVE,
  "share": _SHARE,
  "factor": _SHARE,
}
"""Numbers of AlignmentConfig; NaN is in no bounds."""


def check(system: assemble.System, workdir: files.PathLike) -> None:
  """Refuses what could not be aligned, before anything is compiled.

  Raises:
    FileNotFoundError: there is no such start or reward model.
    ValueError: what does not fit, and what to change.
  """
  settings = system.config.alignment
  if not isinstance(system.model, generator.Generator):
    raise ValueError(
      f"model.system={system.config.model.system} generates no semantic IDs; "
      "only generators can be aligned"
    )
  _check_start(system, workdir)
  known = sorted([*objectives.PAIRS, *objectives.GROUPS])
  for told in (*_about_numbers(settings), *_about_unread(settings)):
    raise ValueError(f"alignment.{told}")
  if settings.objective:
    if settings.objective not in known:
      raise ValueError(
        f"alignment.objective={settings.objective!r}: want one of {known}"
      )
    for told in (
      *_about_answers(system),
      *_about_format(system),
      *_about_requests(system.config),
      *_about_rewards(settings),
    ):
      raise ValueError(f"alignment.{told}")
    for name in rewards.runs_of(settings.rewards):
      reward_models.check_lifelong(workdir, name, system)
  elif not settings.feedback:
    raise ValueError(
      "neither alignment.objective nor alignment.feedback is set, so there is "
      f"nothing to align: set one; objectives are {known}"
    )
  if settings.feedback:
    _check_feedback(system)


def check_rows(requests: int, mesh: Mesh) -> None:
  """Refuses requests that cannot be laid out over a mesh."""
  rows = mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]
  if requests < 1 or requests % rows:
    raise ValueError(
      f"alignment.requests={requests} is no multiple of the {rows} devices "
      "along data, fsdp and expert; change --config.alignment.requests"
    )


def _check_start(system: assemble.System, workdir: files.PathLike) -> None:
  """Refuses a start of another model or other data."""
  name, config = system.config.alignment.start, system.config
  path = assemble.run_directory(workdir, name) / "config.json"
  if not name or not path.exists():
    raise FileNotFoundError(
      f"alignment.start={name!r} is no run in {path.parent.parent}: train one "
      "with python -m launch.train, and name it"
    )
  if name == config.name:
    raise ValueError(
      f"the run {name!r} would start from itself: give this one another "
      "--config.name"
    )
  record = files.read_json(path)
  # A field that has come since has its default there.
  started = config_lib.from_dict(record["config"])
  own, sids = system.prepared.manifest["fingerprint"], system.semantic_ids
  for what, its, mine in (
    ("model", *(config_lib.to_dict(c)["model"] for c in (started, config))),
    ("prepared data", record["prepared"], own),
    ("semantic IDs", record["semantic_ids"], sids.fingerprint),
    # What is imitated is also what evaluation asks for.
    ("pipeline.imitate", started.pipeline.imitate, config.pipeline.imitate),
  ):
    changes = config_lib.differences(its, mine, what)
    if changes:
      raise ValueError(
        f"alignment.start={name!r} has another {what} than this config "
        f"({changes}); give both the same"
      )


def _about_numbers(settings: AlignmentConfig) -> Iterator[str]:
  """What is out of its bounds."""
  for name, (bounds, within) in _BOUNDS.items():
    value = getattr(settings, name)
    if not within(value):
      yield f"{name}={value} {bounds}"


def _about_unread(settings: AlignmentConfig) -> Iterator[str]:
  """What is set and would not be read."""
  if not settings.objective:
    for name in ("rewards", "suppressed", "format_samples"):
      value = getattr(settings, name)
      if value:
        yield (
          f"{name}={value!r} is about the model's answers, and it is not asked "
          "for any: set alignment.objective, or leave this out"
        )
  if settings.search == "beam" and settings.temperature != 1:
    yield (
      f"temperature={settings.temperature} is of samples: set "
      "alignment.search=sample, or leave it at 1"
    )
  if settings.logged_policy and settings.feedback_loss == "pairs":
    yield (
      "logged_policy=True is read by alignment.feedback_loss=gbpo, not by "
      "pairs: set that, or leave this out"
    )


def _about_requests(config: config_lib.Config) -> Iterator[str]:
  """What is wrong with how many requests are asked."""
  requests, pieces = config.alignment.requests, config.training.microbatches
  if min(requests, pieces) < 1 or requests % pieces:
    yield (
      f"requests={requests} is no multiple of training.microbatches={pieces}, "
      "into which they are split as the batch is; change "
      "--config.alignment.requests or --config.training.microbatches"
    )


def _about_rewards(settings: AlignmentConfig) -> Iterator[str]:
  """What is wrong with the weights of rewards."""
  for text in settings.rewards:
    try:
      _, weight = rewards.parse(text)
    except ValueError as error:
      yield f"rewards: {text!r}: {error}"
    else:
      if settings.suppressed and weight < 0:
        yield (
          f"rewards: {text!r}: alignment.suppressed takes a share of what "
          "answers earn, which raises what is negative; weigh by more than 0"
        )


def _about_answers(system: assemble.System) -> Iterator[str]:
  """What is wrong with the answers that are asked for."""
  settings, model = system.config.alignment, system.model
  if settings.search not in ("beam", "sample"):
    yield f"search={settings.search!r}: want beam or sample"
  of_sessions = rollouts.session_items(model) > 1
  if settings.search == "beam":
    available, which = system.index.num_leaves, "semantic IDs"
    if not settings.constrained:
      available, which = math.prod(model.codebook_sizes), "tuples of codes"
    if settings.group > available:
      yield f"group={settings.group} is more than the {available} {which}"
  elif of_sessions:
    yield "search=sample draws items, not sessions; set alignment.search=beam"
  if of_sessions and not settings.constrained:
    yield (
      "constrained=False: sessions are made of items; set "
      "alignment.constrained=True"
    )
  if not settings.constrained and model.constrained_softmax:
    yield (
      "constrained=False needs a softmax over all codes: set "
      "model.constrained_softmax=False, for the start too"
    )
  if settings.losers != 1 and settings.objective != "s_dpo":
    yield f"losers={settings.losers}: {settings.objective} takes one"
  if not 0 < settings.losers < settings.group:
    yield (
      f"losers={settings.losers} must be at least 1 and below alignment.group="
      f"{settings.group}"
    )


def _about_format(system: assemble.System) -> Iterator[str]:
  """What is wrong with the format reward."""
  settings = system.config.alignment
  if settings.format_choice not in ("random", "probable"):
    yield f"format_choice={settings.format_choice!r}: want random or probable"
  if not settings.format_samples:
    return
  if settings.constrained or settings.objective not in objectives.GROUPS:
    yield (
      "format_samples is for free answers and objectives on groups: set "
      f"alignment.constrained=False and one of {sorted(objectives.GROUPS)}"
    )
  if not 0 < settings.format_samples <= settings.group:
    yield (
      f"format_samples={settings.format_samples} is no part of alignment.group="
      f"{settings.group}"
    )


def _about_label(name: str) -> Iterator[str]:
  """What is wrong with a label as feedback."""
  signals = {label: signal for signal, label in feedback.SIGNALS.items()}
  if name in signals:
    yield (
      f"feedback={name!r} is a number and no flag: set {signals[name]!r}, "
      "which gives +1 to the largest quarter of it"
    )
  if name in feedback.NO_OPINIONS:
    yield (
      f"feedback={name!r} says nothing of what users liked: set one of "
      f"{sorted(feedback.SIGNALS)} or a flag of the data, as 'like'"
    )


def _check_feedback(system: assemble.System) -> None:
  """Refuses feedback that batches will not carry."""
  settings = system.config.alignment
  for told in _about_label(settings.feedback):
    raise ValueError(f"alignment.{told}")
  if not system.config.pipeline.labels:
    raise ValueError(
      f"alignment.feedback={settings.feedback!r} reads labels: set "
      "--config.pipeline.labels=True"
    )
  if settings.feedback_loss not in feedback.LOSSES:
    raise ValueError(
      f"alignment.feedback_loss={settings.feedback_loss!r}: want one of "
      f"{feedback.LOSSES}"
    )
  needed = [feedback.label_of(settings.feedback)]
  if settings.feedback_loss == "pairs":
    needed.append("dislike")
  if settings.logged_policy:
    needed.append("log_probability")
  have = pipeline.training_rows(system.prepared, system.config.pipeline)[0]
  missing = sorted(set(needed) - set(have["labels"]))
  if missing:
    made = "; ".join(map(feedback.made_of, missing))
    raise ValueError(
      f"alignment.feedback={settings.feedback!r} needs the labels {missing}, "
      f"and the data have {sorted(have['labels'])}; {made}: prepare tables "
      "with these (docs/your_data.md), or set what the data have"
    )
  if "dislike" not in have["labels"] and jax.process_index() == 0:
    print(
      f"{system.config.name}: the events have no column dislike, so no target "
      "has a negative advantage; prepare the data with one, unless that is "
      "meant"
    )
