"""Arms of an online test: recommenders by their names, and their world.

An *arm* is a recommender in its own copy of the world; onerec_jax/online.py
plays them against each other.
"""

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from onerec_jax import config as config_lib
from onerec_jax import files, runs
from onerec_jax.data import shards
from onerec_jax.inference import assemble, serving
from onerec_jax.online_models import Model, cascade_answer, generator_answer
from onerec_jax.simulation import policies
from onerec_jax.simulation.state import DAY_MS, DAY_ZERO_MS
from onerec_jax.simulation.step import Observer
from onerec_jax.simulation.world import World

CASCADE = "cascade"
"""An arm of the runs `two_tower` and `p_score` (see `make_arm`)."""
_STAGES = {CASCADE: "two_tower/p_score"}
_ORACLES = {
  "logging": policies.LoggingPolicy.create,
  "oracle": policies.GreedyTruePolicy,
  "uniform": policies.UniformPolicy,
}
"""Arms that are no model; `oracle` knows the truth."""


@dataclasses.dataclass
class Arm:
  """A recommender in its own copy of the world.

  Attributes:
    name: of the arm.
    policy: what it shows.
    observe: sees what came of it; None: nobody does.
    models: its runs; none of an oracle.
  """

  name: str
  policy: policies.Policy
  observe: Observer | None = None
  models: tuple[Model, ...] = ()


def make_arm(
  name: str,
  workdir: files.PathLike,
  world: World,
  until_ms: int | None,
  mesh: Mesh,
) -> Arm:
  """An arm by its name.

  Args:
    name: a run of the work directory; two of them, `retrieval/ranker`;
      `cascade`, which is `two_tower/p_score`; or `logging`, `oracle` (greedy
      by true satisfaction), `uniform`.
    workdir: the work directory.
    world: the world that made its data.
    until_ms: when the test begins; what is stored of later is not known.
      None: after all that is stored.
    mesh: the devices.

  Raises:
    FileNotFoundError: there is no such run.
    ValueError: runs that cannot serve this world.
  """
  if name in _ORACLES:
    return Arm(name, _ORACLES[name](world))
  models = tuple(
    Model(*assemble.load(workdir, run_name, mesh), mesh)
    for run_name in _runs_of(name)
  )
  if until_ms is not None:
    _check_past(models[0].system.prepared, until_ms)
  _check_lifelong(models)
  config, slots = models[0].system.config, world.config.slots
  known = serving.Histories(
    models[0].system.prepared, config.prepare, world, until_ms
  )
  if len(models) == 1:
    answer = generator_answer(models[0], slots)
  else:
    answer = cascade_answer(*models, slots)
  policy = serving.RecommenderPolicy(world, known, answer)
  return Arm(name, policy, known.observe, models)


def _runs_of(name: str) -> list[str]:
  """The runs of an arm; see `make_arm`.

  Raises:
    ValueError: more than two.
  """
  if name in _ORACLES:
    return []
  stages = _STAGES.get(name, name).split("/")
  if len(stages) > 2:
    raise ValueError(f"arm {name!r}: want a run, or retrieval/ranker")
  return stages


def _check_lifelong(models: Sequence[Model]) -> None:
  """Refuses a ranker that reads other compressed histories than are known."""
  known, *others = map(_snapshots, models)
  for model, wanted in zip(models[1:], others):
    if wanted not in ("", known):
      raise ValueError(
        f"{model.system.config.name} reads compressed histories, and the "
        f"stages of a cascade share those of {models[0].system.config.name}: "
        "train both on the same pipeline.pathways.lifelong, lifelong and "
        "semantic IDs"
      )


def _snapshots(model: Model) -> str:
  """The compressed histories that a model reads; empty: none."""
  system = model.system
  if not system.config.pipeline.pathways.lifelong:
    return ""
  return assemble.snapshots_name(
    system.config, system.prepared, system.semantic_ids
  )


def _check_past(prepared: shards.PreparedData, until_ms: int) -> None:
  """Refuses models of data whose training part goes on after a test begins."""
  day = (until_ms - DAY_ZERO_MS) // DAY_MS
  boundaries = prepared.manifest["split_boundaries_ms"]
  if boundaries is None:
    raise ValueError(
      f"--from_day={day}: models of {prepared.directory} were trained on what "
      "comes later, for it is not split by time; leave --from_day out, or "
      "train on --config.prepare.split=time"
    )
  if boundaries["validation_from_ms"] > until_ms:
    ends = (boundaries["validation_from_ms"] - DAY_ZERO_MS) / DAY_MS
    raise ValueError(
      f"--from_day={day}: models of {prepared.directory} were trained on days "
      f"until {ends:.1f}, which would tell them what comes; begin no earlier, "
      f"or train with --config.prepare.validation_from_ms={until_ms}"
    )


def world_of(
  workdir: files.PathLike, arms: Sequence[str]
) -> config_lib.SimulationConfig:
  """The world whose data the arms' runs were trained on.

  Where no arm is a run, that of the latest run of the work directory.

  Args:
    workdir: of the runs.
    arms: their names, see `make_arm`.

  Raises:
    FileNotFoundError: there is no such run.
    ValueError: runs of no world, or of several.
  """
  named = [run for name in arms for run in _runs_of(name)]
  made = {
    run: config_lib.from_dict(
      assemble.read_record(workdir, run)["config"]
    ).prepare
    for run in named or runs.finished_runs(workdir)
  }
  for run in named:
    if made[run].dataset != "simulator":
      raise ValueError(
        f"{run} was trained on {made[run].dataset}: a test is played in the "
        "world of the data set 'simulator'; train a run on it, as "
        "experiments/simulator/lazy_decoder.py"
      )
    if made[run].simulation != made[named[0]].simulation:
      raise ValueError(
        f"{named[0]} and {run} were trained on different worlds: "
        f"{made[named[0]].simulation} is not {made[run].simulation}; train "
        "both with one prepare.simulation"
      )
  worlds = [c.simulation for c in made.values() if c.dataset == "simulator"]
  if not worlds:
    raise ValueError(
      f"{workdir} holds no run on the data set 'simulator', whose world a test "
      "could be played in; train one, as experiments/simulator/lazy_decoder.py"
    )
  return worlds[-1]
