"""The whole way, step by step: each skips what is done and still true.

prepare → tokenize (→ compress) → train → evaluate → report. launch/*.py call
these; so may you, from Python.
"""

import functools
import pathlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from onerec_jax import config as config_lib
from onerec_jax import (
  files,
  model_configs,
  partitioning,
  runs,
  semantic_ids,
)
from onerec_jax.data import pipeline, prepare, shards, splits
from onerec_jax.data.batch import Batch
from onerec_jax.evaluation import held_out, protocol, sessions
from onerec_jax.evaluation import rewards as reward_figures
from onerec_jax.evaluation.result import Evaluation, location
from onerec_jax.inference import assemble, retrieval
from onerec_jax.models import registry, reward
from onerec_jax.tokenizer import histories
from onerec_jax.tokenizer import tokenize as tokenizer
from onerec_jax.training import loop, losses

_WATCHED = ("recall", "ndcg", "valid_rate", "coverage")
"""Metrics worth a curve while training."""
POPULARITY = runs.POPULARITY


def assembled(
  config: config_lib.Config, workdir: files.PathLike
) -> assemble.System:
  """Prepares and tokenizes where that is not done yet.

  Of several processes the first does it and the others then find it done.
  """
  several = jax.process_count() > 1
  if several and jax.process_index() > 0:
    multihost_utils.sync_global_devices("assembled")
  prepared = shards.PreparedData.open(prepare.prepare(config.prepare, workdir))
  sids = None
  if registry.needs_semantic_ids(config.model):
    sids = tokenizer.tokenize(config.tokenizer, prepared, workdir)
    if config.pipeline.pathways.lifelong:
      prepared.snapshots = histories.compress(config, prepared, sids, workdir)
  if several and jax.process_index() == 0:
    multihost_utils.sync_global_devices("assembled")
  return assemble.assemble(config, prepared, sids)


def validator(system: assemble.System, mesh: Mesh) -> loop.Validate:
  """Gives params → validation metrics on a fixed sample of users.

  Of requests instead for sessions (`pipeline.targets`) and reward models.

  Raises:
    ValueError: the validation split holds no target.
  """
  config = system.config
  if isinstance(system.model, reward.RewardModel):
    return reward_figures.validator(system, mesh)
  retrieve = _retriever(system, mesh)
  mean_loss = _held_out_loss(system, mesh)
  if config.pipeline.targets == "session":
    return sessions.validator(config, system.prepared, retrieve, mean_loss)
  users = pipeline.sample_users(
    system.prepared,
    config.evaluation.validation_users,
    splits.VALIDATION,
    config.pipeline,
  )
  if next(_batches(config, system.prepared, "validation", users), None) is None:
    raise ValueError(
      f"{config.name}: the validation split has nothing to ask, so no "
      "parameters could be chosen; a user needs three events to be validated, "
      "or with prepare.split=time events in that span: prepare with other "
      "boundaries, or more data"
    )

  def validate(params: Any) -> dict[str, float]:
    found = _evaluate(
      config, system.prepared, _answers(system),
      lambda batch: retrieve(params, batch), "validation", users,
      progress=False,
    )  # fmt: skip
    watched = {
      name: value
      for name, value in found.metrics.items()
      if name.removeprefix("filtered/").split("@")[0] in _WATCHED
    }
    batches = _batches(config, system.prepared, "validation", users)
    return watched | {"loss": mean_loss(params, batches)}

  return validate


def _held_out_loss(
  system: assemble.System, mesh: Mesh
) -> Callable[[Any, Iterator], float]:
  """(params, evaluation batches) → mean training loss, without dropout."""
  loss_fn = losses.make_loss(system.model)

  @jax.jit
  def sums(params, batch, catalogue, index):
    found = loss_fn(params, batch, catalogue, index, None)
    return found["loss"], found["count"]

  tables = jax.device_put(
    (system.catalogue, system.index), partitioning.replicated(mesh)
  )
  rows = partitioning.batch_sharding(mesh)

  def mean(params: Any, batches: Iterator) -> float:
    with jax.set_mesh(mesh):
      found = [
        sums(params, jax.device_put(batch, rows), *tables)
        for batch, _ in batches
      ]
    total, count = np.sum(jax.device_get(found), axis=0)
    return float(total / count)

  return mean


def train(
  config: config_lib.Config,
  workdir: files.PathLike,
  system: assemble.System | None = None,
) -> assemble.System:
  """Trains the config's model, or resumes it, or finds it done.

  Args:
    config: the experiment.
    workdir: the work directory.
    system: `assembled(config, workdir)`, if already at hand.

  Returns:
    The system; its parameters are in <workdir>/models/<name>/best.

  Raises:
    ValueError: the run's directory holds a run with other settings, or the
      batch does not divide over the devices.
  """
  system = system or assembled(config, workdir)

  def train_on(mesh: Mesh, run: pathlib.Path) -> loop.Progress:
    runs.say_if_all_is_imitated(system)
    dataset, steps_per_epoch = pipeline.training_dataset(
      system.prepared,
      config.pipeline,
      config.training.seed,
      partitioning.local_rows(mesh, config.pipeline.batch_size),
    )
    return loop.train(
      config, run, system.model, dataset, steps_per_epoch, system.catalogue,
      system.index, validator(system, mesh), mesh,
    )  # fmt: skip

  runs.once(system, workdir, train_on)
  return system


def _answers(system: assemble.System) -> semantic_ids.SemanticIds | None:
  """The semantic IDs that a model answers with; None: with items themselves."""
  scores_items = hasattr(system.model, "item_scores")
  return None if scores_items else system.semantic_ids


def _retriever(system: assemble.System, mesh: Mesh) -> Any:
  """(params, host batch) → ranked items, rows spread over the mesh."""
  settings = system.config.evaluation
  width = settings.beam_width
  if _answers(system) is None:
    # Scoring all items makes a longer list free, so that taking out what was
    # seen leaves a full one.
    longest = int(system.prepared.lengths.max())
    width = max(width, *settings.cutoffs) + longest
  width = min(width, system.prepared.num_items)
  find = retrieval.make_retrieve(system.model, system.index, width)
  catalogue = jax.device_put(system.catalogue, partitioning.replicated(mesh))
  rows = partitioning.batch_sharding(mesh)

  def retrieve(
    params: Any, batch: Any, allowed: np.ndarray | None = None
  ) -> tuple[np.ndarray, np.ndarray]:
    # Every process asks all queries, so each holds the whole batch and wants
    # the whole answer; with one process this is a plain copy.
    batch, allowed = jax.device_put((batch, allowed), rows)
    with jax.set_mesh(mesh):
      found = find(params, batch, catalogue, allowed)
    return multihost_utils.process_allgather(found, tiled=True)

  return retrieve


def _batches(
  config: config_lib.Config,
  prepared: shards.PreparedData,
  split: str,
  users: np.ndarray | None,
) -> Iterator[tuple[Batch, pipeline.Queries]]:
  # The last batch is filled up anyway: any size fits any number of devices.
  devices = jax.device_count()
  batch_size = -(-config.evaluation.batch_size // devices) * devices
  return pipeline.evaluation_batches(
    prepared, splits.HELD_OUT[split], config.pipeline, batch_size, users
  )


def _evaluate(
  config: config_lib.Config,
  prepared: shards.PreparedData,
  sids: semantic_ids.SemanticIds | None,
  retrieve: protocol.Retrieve,
  split: str,
  users: np.ndarray | None,
  progress: bool,
) -> Evaluation:
  return protocol.evaluate(
    retrieve,
    _batches(config, prepared, split, users),
    protocol.CatalogueInfo.from_codes(
      prepared.item_counts, None if sids is None else sids.codes
    ),
    config.evaluation,
    name=config.name,
    split=split,
    config_fingerprint=config_lib.fingerprint(config),
    progress=progress,
  )  # fmt: skip


def evaluate(
  workdir: files.PathLike, name: str, split: str = "test", beside: str = ""
) -> Evaluation:
  """Measures the best parameters of a run on a whole split, once.

  Args:
    workdir: the work directory.
    name: of the run, or `popularity`.
    split: `validation` or `test`.
    beside: of popularity (`evaluate_popularity`).
  """
  if name == POPULARITY:
    return evaluate_popularity(workdir, split, beside)
  finished = assemble.run_directory(workdir, name) / "finished.json"
  if _is_newer(location(workdir, name, split), finished) and assemble.same_data(
    workdir, name
  ):
    return Evaluation.load(workdir, name, split)
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  system, params = assemble.load(workdir, name, mesh)
  retrieve = _retriever(system, mesh)
  found = _evaluate(
    system.config, system.prepared, _answers(system),
    lambda batch: retrieve(params, batch), split, None, progress=True,
  )  # fmt: skip
  found.save(workdir)
  return found


def evaluate_all(
  workdir: files.PathLike, names: Sequence[str] = (), split: str = "test"
) -> list[Evaluation]:
  """`evaluate` of several; popularity is asked what the first run is.

  Args:
    workdir: the work directory.
    names: of the runs; none: `runs.current_runs`, and popularity.
    split: `validation` or `test`.
  """
  names = names or [*runs.current_runs(workdir), POPULARITY]
  beside = next((name for name in names if name != POPULARITY), "")
  return [evaluate(workdir, name, split, beside) for name in names]


def evaluate_sessions(
  workdir: files.PathLike, name: str, split: str = "test"
) -> Evaluation:
  """Measures the sessions of a run's best parameters on held-out requests.

  Args:
    workdir: the work directory.
    name: of the run; its `pipeline.session_items` is m.
    split: `validation` or `test`.
  """
  finished = assemble.run_directory(workdir, name) / "finished.json"
  kept = location(workdir, name, f"{split}_sessions")
  if _is_newer(kept, finished) and assemble.same_data(workdir, name):
    return Evaluation.load(workdir, name, f"{split}_sessions")
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  system, params = assemble.load(workdir, name, mesh)
  requests = held_out.requests(
    system.prepared,
    splits.HELD_OUT[split],
    system.config.pipeline.session_items,
  )
  found = sessions.evaluate(
    functools.partial(_retriever(system, mesh), params), system.prepared,
    requests, system.config, split=split,
  )  # fmt: skip
  prepared = system.config.prepare
  if prepared.dataset == "simulator":
    found = sessions.with_true_values(
      found, system.prepared, requests, prepared.simulation
    )
  found.save(workdir)
  return found


def _is_newer(path: pathlib.Path, source: pathlib.Path) -> bool:
  """Whether both are there and `path` was written after `source`."""
  return (
    path.exists()
    and source.exists()
    and path.stat().st_mtime_ns >= source.stat().st_mtime_ns
  )


def evaluate_popularity(
  workdir: files.PathLike, split: str = "test", beside: str = ""
) -> Evaluation:
  """The baseline that recommends the most popular items to everybody.

  Args:
    workdir: the work directory.
    split: `validation` or `test`.
    beside: a run: asked what that is, at its cutoffs; default: the latest that
      recommends. Without any, at the default cutoffs that there are items for.
  """
  prepared = shards.PreparedData.open(workdir)
  config = config_lib.Config(name=POPULARITY)
  names = [beside] if beside else runs.finished_runs(workdir)
  trained = [
    config_lib.from_dict(assemble.read_record(workdir, name)["config"])
    for name in names
  ]
  cutoffs = [k for k in config.evaluation.cutoffs if k <= prepared.num_items]
  config.evaluation.cutoffs = tuple(cutoffs) or (1,)
  for run in trained:
    if not isinstance(run.model, model_configs.RewardConfig):
      config.evaluation.cutoffs = run.evaluation.cutoffs
      config.pipeline.imitate = run.pipeline.imitate
  path = location(workdir, POPULARITY, split)
  if _is_newer(path, prepared.directory / shards.MANIFEST):
    found = Evaluation.load(workdir, POPULARITY, split)
    if found.facts["config_fingerprint"] == config_lib.fingerprint(config):
      return found
  longest = int(prepared.lengths.max())
  width = min(max(config.evaluation.cutoffs) + longest, prepared.num_items)
  retrieve = protocol.popularity_retrieve(prepared.item_counts, width)
  found = _evaluate(
    config, prepared, None, retrieve, split, None, progress=True
  )
  found.save(workdir)
  return found
