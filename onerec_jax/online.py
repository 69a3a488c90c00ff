"""Recommenders that serve the simulated world day by day, and learn from it.

An *arm* is a recommender in its own copy of the world. Its users come back at
the same moments and answer by the same random numbers in every arm (common
random numbers), so that each user is compared with themselves; what differs is
what they are shown. After each day the arm's events join its log, the log is
prepared again, and the arm's models go on training on it: same catalogue, same
semantic IDs, same codes of features. Or its own days are what it is asked about
and no more: what it imitates stays the log, what it is aligned on are histories
of its own making. Or what joins is what the policy that made the log would have
shown that day, in a copy of the world of its own: a stream without the arm's
own samples (OneRec-V2, arXiv 2508.20900, Table 6).
"""

import dataclasses
import pathlib
from typing import Any

import pyarrow.parquet as pq
import rich
import rich.box
import rich.table
from jax.sharding import Mesh
from rich import progress

from onerec_jax import config as config_lib
from onerec_jax import files, online_arms, online_models, partitioning, runs
from onerec_jax.alignment import checks
from onerec_jax.data import prepare, rebucket, shards
from onerec_jax.data.datasets import simulator
from onerec_jax.evaluation import ab_plots
from onerec_jax.evaluation import ab_test as figures
from onerec_jax.inference import serving
from onerec_jax.models import registry
from onerec_jax.online_arms import Arm
from onerec_jax.simulation import policies
from onerec_jax.simulation.state import DAY_MS, DAY_ZERO_MS, State
from onerec_jax.simulation.step import Events, run, step
from onerec_jax.simulation.world import World
from onerec_jax.tokenizer import histories as lifelong_histories
from onerec_jax.training import optimizer

SAMPLES = ("own", "prompts", "logging")
"""What joins an arm's log: its own days; the same, to be asked about and not to
be imitated; or those of the logging policy."""
_NEVER_MS = DAY_ZERO_MS + 100_000 * DAY_MS


class Log:
  """An arm's log on disk: prepared anew with every day.

  Args:
    world: the world.
    events: what was logged before the test.
    config: how the models' data were prepared.
    manifest: of the models' data.
    directory: of the arm.
  """

  def __init__(
    self,
    world: World,
    events: Events,
    config: config_lib.PrepareConfig,
    manifest: dict[str, Any],
    directory: files.PathLike,
  ):
    self._world, self._manifest = world, manifest
    self._directory = pathlib.Path(directory)
    self._days = 0
    (self._directory / "log").mkdir(parents=True)
    items, users = (
      self._directory / f"{n}.parquet" for n in ("items", "users")
    )
    pq.write_table(simulator.items_table(world), items)
    pq.write_table(simulator.users_table(world), users)
    # Everything that happened is there to learn from.
    self._config = dataclasses.replace(
      config,
      dataset="tables",
      events=str(self._directory / "log"),
      items=str(items),
      users=str(users),
      split="time",
      validation_from_ms=_NEVER_MS,
      test_from_ms=_NEVER_MS,
    )
    self._write(events)

  def _write(self, events: Events) -> None:
    path = self._directory / "log" / f"{self._days:05d}.parquet"
    pq.write_table(simulator.events_table(self._world, events), path)
    self._days += 1

  def append(self, events: Events) -> shards.PreparedData:
    """The log with one day more; raises as `prepared`."""
    self._write(events)
    return self.prepared(self._directory)

  def prepared(self, directory: pathlib.Path) -> shards.PreparedData:
    """The log as it is by now, with the models' codes of features.

    Args:
      directory: where to write it.

    Raises:
      ValueError: items came to have other dense ids.
    """
    raw = prepare.prepare(self._config, directory / "raw")
    found = rebucket.rebucket(
      shards.PreparedData.open(raw, verify=False),
      self._manifest,
      directory / prepare.PREPARED,
    )
    prepared = shards.PreparedData.open(found, verify=False)
    serving.check(prepared, self._world)
    return prepared


@dataclasses.dataclass(frozen=True)
class Settings:
  """Of a test.

  Attributes:
    days: how many are played.
    from_day: the day the test begins; until then the log is as it was.
    updates: steps that each model trains on after each day; 0: it is frozen.
    learning_rate: of these; 0: a tenth of the run's own peak (INFERRED; V1
      anneals for its reinforcement stage too).
    samples: of SAMPLES: whose days the models train on.
    directory: for the arms' logs.
  """

  days: int
  from_day: int
  updates: int
  learning_rate: float
  samples: str
  directory: pathlib.Path


def play(
  arms: list[Arm],
  workdir: files.PathLike,
  world: World,
  state: State,
  events: Events,
  settings: Settings,
) -> list[list[Events]]:
  """Lets every arm serve its copy of the world.

  Args:
    arms: by online_arms.make_arm.
    workdir: of their runs.
    world: the world.
    state: the morning of the first day; each arm starts from it.
    events: the log until then.
    settings: of the test.

  Returns:
    For each arm its events, a log a day.
  """
  logs = [
    _log_of(arm, world, events, settings.directory / f"arm_{place}")
    if arm.models and settings.updates
    else None
    for place, arm in enumerate(arms)
  ]
  imitated = [
    log.prepared(settings.directory / f"arm_{place}" / "before")
    if log is not None and settings.samples == "prompts"
    else None
    for place, log in enumerate(logs)
  ]
  states, before = [state] * len(arms), state
  logging = policies.LoggingPolicy.create(world)
  days: list[list[Events]] = [[] for _ in arms]
  for day in progress.track(range(settings.days), "serving", transient=True):
    joins = None
    if settings.updates and settings.samples == "logging":
      before, joins = step(world, before, logging)
    for place, arm in enumerate(arms):
      states[place], today = step(world, states[place], arm.policy, arm.observe)
      days[place].append(today)
      # The last day's feedback would train nobody's next day.
      if logs[place] is not None and day + 1 < settings.days:
        prepared = logs[place].append(today if joins is None else joins)
        _learn(arm, prepared, workdir, settings, day, imitated[place])
  return days


def _log_of(
  arm: Arm, world: World, events: Events, directory: pathlib.Path
) -> Log:
  system = arm.models[0].system
  return Log(
    world, events, system.config.prepare, system.prepared.manifest, directory
  )


def _learn(
  arm: Arm,
  prepared: shards.PreparedData,
  workdir: files.PathLike,
  settings: Settings,
  day: int,
  imitated: shards.PreparedData | None = None,
) -> None:
  """Lets an arm's models learn from its log.

  Args:
    arm: the arm.
    prepared: its log.
    workdir: of the runs.
    settings: of the test.
    day: of the test, from 0.
    imitated: the log to train on, if not its own; of its own the days of the
      test are asked about.
  """
  logs = [prepared] if imitated is None else [imitated, prepared]
  prompts = None
  if imitated is not None:
    since = DAY_ZERO_MS + settings.from_day * DAY_MS
    prompts = online_models.Prompts(prepared, since)
  for model in arm.models:
    config, sids = model.system.config, model.system.semantic_ids
    if config.pipeline.pathways.lifelong:
      for log in logs:
        log.snapshots = lifelong_histories.compress(
          config, log, sids, workdir, log.directory.parent
        )
    rate = settings.learning_rate or 0.1 * (
      config.optimizer.learning_rate
      or optimizer.paper_learning_rate(
        registry.block_parameters(model.system.model)
      )
    )
    model.learn(logs[0], workdir, settings.updates, rate, day, prompts)


def ab_test(
  workdir: files.PathLike, control: str, treatment: str, settings: Settings
) -> list[dict[str, Any]]:
  """Plays a test and writes what it found.

  Writes ab_test.json (figures, days, requests, settings), forest.png, days.png
  and requests.png, and prints the table.

  Args:
    workdir: of the runs.
    control: an arm, see online_arms.make_arm.
    treatment: another, or the same.
    settings: of the test; `from_day` 0 is the day after the log.

  Returns:
    Rows of evaluation.ab_test.compare.

  Raises:
    ValueError: runs of no world or of several, models that were trained on
      days of the test or cannot train on these devices, or results there
      already.
  """
  if settings.directory.exists() and any(settings.directory.iterdir()):
    raise ValueError(
      f"{settings.directory} holds something already; give another --output"
    )
  config = online_arms.world_of(workdir, (control, treatment))
  world = World.create(config)
  from_day = settings.from_day or config.num_days
  if not 0 < from_day <= config.num_days:
    raise ValueError(
      f"--from_day={from_day}: the log has the days 0 to {config.num_days - 1}"
    )
  settings = dataclasses.replace(settings, from_day=from_day)
  until = None
  if from_day < config.num_days:
    until = DAY_ZERO_MS + from_day * DAY_MS
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  arms = [
    online_arms.make_arm(name, workdir, world, until, mesh)
    for name in (control, treatment)
  ]
  if settings.updates:
    for arm in arms:
      _check_learners(arm, mesh)
    asked = [
      m.system.config.alignment.objective for a in arms for m in a.models
    ]
    if settings.samples == "prompts" and not any(asked):
      raise ValueError(
        "--samples=prompts is for models that are aligned on their own answers "
        "(alignment.objective), and neither arm has one"
      )
  logging = policies.LoggingPolicy.create(world)
  state, logged = run(world, logging, from_day)
  settings.directory.mkdir(parents=True, exist_ok=True)
  played = play(arms, workdir, world, state, logged, settings)
  rows = figures.compare(world, *played, logged, from_day)
  names = (f"control: {control}", f"treatment: {treatment}")
  by_arm = dict(zip(names, played))
  days = figures.by_day(world, by_arm, logged, from_day)
  requests = figures.by_request(world, by_arm)
  told = vars(settings) | {"directory": str(settings.directory)}
  files.write_json(
    settings.directory / "ab_test.json",
    {
      "control": control, "treatment": treatment, "settings": told,
      "figures": rows, "days": days, "requests": requests,
    },
  )  # fmt: skip
  ab_plots.forest(rows, settings.directory / "forest.png")
  ab_plots.curves(days, settings.directory / "days.png")
  ab_plots.curves(requests, settings.directory / "requests.png", "request")
  _print(rows, *names)
  return rows


def _check_learners(arm: Arm, mesh: Mesh) -> None:
  """Refuses what could not train on, before a day is played."""
  for model in arm.models:
    config = model.system.config
    runs.check(config, mesh, model.system.prepared.num_items)
    if config.alignment.objective:
      checks.check_rows(config.alignment.requests, mesh)


def _print(rows: list[dict[str, Any]], control: str, treatment: str) -> None:
  table = rich.table.Table(
    "mean", "control", "treatment", "relative", "95%",
    title=f"{control} | {treatment}", box=rich.box.SIMPLE,
  )  # fmt: skip
  for before, row in zip([{"unit": ""}, *rows], rows):
    if row["unit"] != before["unit"]:
      table.add_section()
    relative = [row[f"relative{end}"] for end in ("", "_low", "_high")]
    change, low, high = (f"{x:+.2%}" for x in relative)
    table.add_row(
      f"{row['figure']} / {row['unit']}", f"{row['control']:.4f}",
      f"{row['treatment']:.4f}", change, f"{low} … {high}",
    )  # fmt: skip
  rich.print(table)
