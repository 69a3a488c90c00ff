"""Trained runs that answer the users of the simulated world, and learn on.

A `Model` is a run in memory. It answers through `generator_answer` or, two of
them, through `cascade_answer`; `Model.learn` goes on training it, by the run's
own config: supervised, or aligned (alignment/learner.py) where the run was.
"""

import copy
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from onerec_jax import config as config_lib
from onerec_jax import files, partitioning, workflow_align
from onerec_jax.alignment import learner as learner_lib
from onerec_jax.alignment import policy as policy_lib
from onerec_jax.alignment import requests
from onerec_jax.data import pipeline, shards
from onerec_jax.data import rows as rows_lib
from onerec_jax.data.batch import Batch
from onerec_jax.inference import assemble, retrieval, serving
from onerec_jax.models import registry, reward, two_tower
from onerec_jax.training import loop, optimizer, task
from onerec_jax.training import state as state_lib
from onerec_jax.training import step as step_lib

_NEVER_STEPS = 1 << 30
"""A run without an end, as its schedule is constant."""


class Prompts(NamedTuple):
  """Requests to be answered while a model is aligned.

  Attributes:
    prepared: the log that has them.
    from_ms: earlier ones are left out; None: none are.
  """

  prepared: shards.PreparedData
  from_ms: int | None = None


class Model:
  """A trained run that answers, and goes on training.

  Args:
    system: the model and what it needs.
    params: its parameters.
    mesh: the devices.
  """

  def __init__(self, system: assemble.System, params: Any, mesh: Mesh):
    self.system, self.params, self.mesh = system, params, mesh
    devices = mesh.size
    self.batch_size = -(-system.config.evaluation.batch_size // devices)
    self.batch_size *= devices
    whole = partitioning.replicated(mesh)
    self.catalogue = jax.device_put(system.catalogue, whole)
    self._names = sorted(rows_lib.feature_sizes(system.prepared))
    self._learner: _Learner | None = None

  def batch(self, histories: list[rows_lib.History]) -> Batch:
    """Requests on the devices, filled up to `batch_size` rows."""
    rows = rows_lib.request_batch(
      histories, self._names, self.system.config.pipeline, self.batch_size
    )
    return jax.device_put(rows, partitioning.batch_sharding(self.mesh))

  def learn(
    self,
    prepared: shards.PreparedData,
    workdir: files.PathLike,
    updates: int,
    learning_rate: float,
    seed: int,
    prompts: Prompts | None = None,
  ) -> None:
    """Trains on: `updates` steps on a log, from the parameters there are.

    The optimizer's state stays from one call to the next, and the step is
    compiled once.

    Args:
      prepared: the log, all of it to be imitated.
      workdir: where reward models lie.
      updates: steps.
      learning_rate: constant, from the first step.
      seed: of the order of rows.
      prompts: what an aligned run is asked while it learns; None: the log's
        own requests.
    """
    if self._learner is None:
      self._learner = _Learner(
        self.system, self.params, self.mesh, workdir, learning_rate
      )
    self.params = self._learner.train(
      prepared, updates, seed, prompts or Prompts(prepared)
    )


class _Continued(task.Task):
  """Supervised training from given parameters."""

  def __init__(self, config, model, params):
    super().__init__(config, model)
    self._params = params

  def plan(self, tx, example, catalogue, mesh):
    """As of any run, with these parameters."""
    shapes, _ = super().plan(tx, example, catalogue, mesh)
    return shapes, lambda: state_lib.with_params(self._params, tx, shapes)


class _Learner:
  """The training step of a run, its state kept in memory."""

  def __init__(self, system, params, mesh, workdir, learning_rate):
    # The step donates its state; the one who serves keeps the parameters.
    params = jax.tree.map(jnp.copy, params)
    self._config = copy.deepcopy(system.config)
    # Warmed up already: a few updates would all be spent on that.
    self._config.optimizer.schedule = "constant"
    self._config.optimizer.warmup_steps = 0
    self._config.optimizer.learning_rate = learning_rate
    self._config.optimizer.table_learning_rate = 0.0
    # In order of time every morning would begin with the oldest rows.
    self._config.pipeline.order = "shuffled"
    self._system, self._mesh = system, mesh
    settings = self._config.alignment
    self._aligns = bool(settings.objective or settings.feedback)
    self._tables = system.index
    if self._aligns:
      judge = None
      if settings.objective:
        judge = workflow_align.make_reward(system, workdir, mesh)
      self._tables = (system.index, judge)
    self._params, self._state, self._step = params, None, None

  def train(self, prepared, updates, seed, prompts) -> Any:
    """Parameters after so many steps more."""
    stream, steps_per_epoch = batches(self._config, prepared, seed, prompts)
    sharding = partitioning.batch_sharding(self._mesh)
    whole = partitioning.replicated(self._mesh)
    if isinstance(self._system.model, two_tower.TwoTower):
      # Of the log as it is by now; the start's has not seen what was launched.
      self._tables = two_tower.log_frequency(prepared.item_counts)
    catalogue, tables = jax.device_put(
      (self._system.catalogue, self._tables), whole
    )
    for _ in range(updates):
      batch = loop.put_batch(next(stream), sharding)
      with jax.set_mesh(self._mesh):
        if self._state is None:
          self._begin(batch, catalogue, tables, steps_per_epoch)
        self._state, sums = self._step(self._state, batch, catalogue, tables)
    if updates and int(self._state.skipped):
      raise FloatingPointError(
        f"{self._config.name}: {int(self._state.skipped)} updates had a loss "
        "or gradient that is not finite; lower --learning_rate"
      )
    del self._params
    self._params = jax.tree.map(jnp.copy, self._state.params)
    return self._params

  def _begin(self, example, catalogue, tables, steps_per_epoch) -> None:
    config, model = self._config, self._system.model
    work = _Continued(config, model, self._params)
    if self._aligns:
      start = lambda: self._params
      work = learner_lib.Alignment(config, model, start, steps_per_epoch)
    length = registry.block_parameters(model), _NEVER_STEPS
    tx = optimizer.make_optimizer(
      config.optimizer,
      optimizer.make_schedule(config.optimizer, *length),
      optimizer.make_table_schedule(config.optimizer, *length),
    )
    shapes, make = work.plan(tx, example, catalogue, self._mesh)
    self._state = make()
    self._step = step_lib.compile_step(
      work.step(tx), state_lib.shardings(shapes), self._mesh, catalogue,
      tables,
    )  # fmt: skip


def batches(
  config: config_lib.Config,
  prepared: shards.PreparedData,
  seed: int,
  prompts: Prompts,
) -> tuple[Iterator[Batch], int]:
  """What a run trains on, supervised or aligned, by its own config.

  Args:
    config: of the run.
    prepared: the log that is imitated.
    seed: of the order of rows and requests.
    prompts: what an aligned run is asked.

  Returns:
    Batches without an end, and how many are an epoch of the log.
  """
  logged, steps_per_epoch = pipeline.training_dataset(
    prepared, config.pipeline, seed
  )
  settings, asked = config.alignment, None
  if settings.objective:
    asked = requests.dataset(
      prompts.prepared, config.pipeline, settings.requests, seed,
      from_ms=prompts.from_ms,
    )  # fmt: skip
  if settings.objective or settings.feedback:
    logged = requests.beside(logged, asked)
  return iter(logged), steps_per_epoch


def generator_answer(model: Model, slots: int) -> serving.Answer:
  """The best items of a run, or its best session.

  Log-probabilities are the generator's, of each item's semantic ID given the
  context and, of a session model, the items before it; those of models that
  score items are unknown.
  """
  system = model.system
  width = slots
  if system.index is not None:
    width = max(slots, system.config.evaluation.beam_width)
  find = retrieval.make_retrieve(system.model, system.index, width)
  score = None
  session = getattr(system.model, "session_items", 1)
  if not hasattr(system.model, "item_scores") and slots % session == 0:

    @jax.jit
    def score(params, batch, catalogue, index, items):
      spread = lambda x: jnp.repeat(x, items.shape[1], axis=1)
      batch = batch.replace(
        targets=items,
        visible_from=spread(batch.visible_from),
        visible_until=spread(batch.visible_until),
      )
      return policy_lib.log_probabilities(
        system.model, params, batch, catalogue, index
      ).sum(axis=-1)

  def answer(batch: Batch, allowed: jax.Array) -> tuple[Any, Any]:
    items, _ = find(model.params, batch, model.catalogue, allowed)
    items = items[:, :slots]
    if score is None:
      return items, jnp.full(items.shape, jnp.nan)
    return items, score(
      model.params, batch, model.catalogue, system.index, items
    )

  return _in_batches(model, lambda histories, allowed: answer(
    model.batch(histories), allowed
  ))  # fmt: skip


def cascade_answer(first: Model, second: Model, slots: int) -> serving.Answer:
  """Retrieves by one run what another ranks.

  Args:
    first: retrieves its `evaluation.beam_width` best items.
    second: a reward model; ranks them by what each would earn.
    slots: of a request.

  Raises:
    ValueError: `second` is none that ranks given items.
  """
  ranker = second.system.model
  if not isinstance(ranker, reward.RewardModel):
    raise ValueError(
      f"{second.system.config.name} cannot rank given items: take a run of a "
      "reward model, such as experiments/simulator/p_score.py"
    )
  width = max(slots, first.system.config.evaluation.beam_width)
  find = retrieval.make_retrieve(first.system.model, first.system.index, width)

  @jax.jit
  def rank(params, batch, catalogue, items):
    heads = ranker.apply(
      {"params": params}, batch, catalogue, items, method="scores"
    )
    worth = reward.value(heads, ranker.value_weights)
    worth = jnp.where(items > 0, worth, -jnp.inf)
    best = jax.lax.top_k(worth, slots)[1]
    return jnp.take_along_axis(items, best, axis=1)

  def answer(histories, allowed):
    items, _ = find(
      first.params, first.batch(histories), first.catalogue, allowed
    )
    ranked = rank(
      second.params, second.batch(histories), second.catalogue, items
    )
    return ranked, jnp.full(ranked.shape, jnp.nan)

  second.batch_size = first.batch_size
  return _in_batches(first, answer)


def _in_batches(
  model: Model, answer: Callable[[list[rows_lib.History], Any], Any]
) -> serving.Answer:
  """Asks in batches of one shape, so that the answer is compiled once."""
  sharding = partitioning.batch_sharding(model.mesh)

  def whole(histories, allowed):
    size, found = model.batch_size, []
    for start in range(0, len(histories), size):
      rows = list(histories[start : start + size])
      # Rows that fill the batch may show anything.
      mask = np.ones((size, allowed.shape[1]), bool)
      mask[: len(rows)] = allowed[start : start + size]
      with jax.set_mesh(model.mesh):
        parts = answer(rows, jax.device_put(mask, sharding))
      found.append([np.asarray(x)[: len(rows)] for x in parts])
    return tuple(np.concatenate(column) for column in zip(*found))

  return whole
