"""The alignment step: answers, rewards, and one joint loss.

OneRec's IPA (arXiv 2502.18965 §1.5), V1's ECPO beside its supervised stream
(arXiv 2506.13695 §2.4-2.5) and V2's GBPO on feedback (arXiv 2508.20900 §3.6)
are one step of one jitted function:

  1. every `sync_every` steps the sampler becomes a copy of the policy;
  2. the sampler answers requests (rollouts.py), and rewards judge the answers;
  3. loss = next-token + weight · objective(answers)
                       + feedback_weight · GBPO(logged targets)

with one backward pass. The sampler is the reference of DPO too: IPA's M_t. The
loop around it is that of training, with a gate (training/task.py).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from onerec_jax import config as config_lib
from onerec_jax.alignment import ecpo, feedback, objectives, rewards, rollouts
from onerec_jax.alignment.requests import JointBatch
from onerec_jax.alignment_config import AlignmentConfig
from onerec_jax.data import batch as batch_lib
from onerec_jax.data.batch import Catalogue
from onerec_jax.models import registry
from onerec_jax.training import losses, step, task
from onerec_jax.training import state as state_lib
from onerec_jax.training.state import TrainState

_ANSWERS, _FEEDBACK = 0x616E7377, 0x66656564
"""Streams of random numbers beside those of `step.train_step`: of microbatch i
that has the key's i-th split, which is its fold_in of i. So no small numbers;
these are "answ" and "feed" in ASCII."""


@struct.dataclass
class AlignState(TrainState):
  """What an alignment step changes.

  Attributes:
    sampler: parameters that answer; None where the model is not asked.
  """

  sampler: Any


class Alignment(task.Task):
  """The task of the training loop; `index` there is (prefix index, reward).

  Args:
    config: the experiment.
    model: generative.
    start: gives the parameters to start from, laid out over the mesh; called
      once, as the step donates them, and by a resumed run not at all.
    steps_per_epoch: of the logged data.
  """

  def __init__(
    self,
    config: config_lib.Config,
    model: registry.Model,
    start: Callable[[], Any],
    steps_per_epoch: int,
  ):
    super().__init__(config, model)
    self.gate = config.alignment.gate
    self._start, self._epoch = start, steps_per_epoch

  def plan(
    self,
    tx: optax.GradientTransformation,
    example: JointBatch,
    catalogue: Catalogue,
    mesh: Mesh,
  ) -> tuple[AlignState, Callable[[], AlignState]]:
    """As of any run, with the start's parameters."""
    asks = bool(self.config.alignment.objective)
    shapes, _ = super().plan(tx, example, catalogue, mesh)

    def make() -> AlignState:
      params = self._start()
      made = state_lib.with_params(params, tx, shapes)
      sampler = jax.tree.map(jnp.copy, params) if asks else None
      return AlignState(**vars(made), sampler=sampler)

    return AlignState(
      **vars(shapes), sampler=shapes.params if asks else None
    ), make

  def step(self, tx: optax.GradientTransformationExtraArgs) -> step.StepFn:
    """The joint step."""
    settings = self.config.alignment
    return functools.partial(
      align_step,
      model=self.model,
      config=settings,
      sync_every=settings.sync_every or self._epoch,
      **self.options(tx),
    )

  def flops(self) -> float:
    """With the answers: searched once, and learned from as targets are."""
    total, settings = super().flops(), self.config.alignment
    if not settings.objective:
      return total
    pipeline = self.config.pipeline
    pathways = pipeline.pathways
    size = rollouts.session_items(self.model)
    learned = settings.group
    if settings.objective in objectives.PAIRS:
      learned = 1 + settings.losers
    # Items share their BOS; of a session it is one position of many.
    count = registry.group_flops if size == 1 else registry.forward_flops
    for passes, answers in ((1.0, settings.group), (3.0, learned)):
      total += passes * count(
        self.model,
        settings.requests,
        pathways.positions if pathways.on else pipeline.max_history + 1,
        answers * size,
      )
    return total


def align_step(
  state: AlignState,
  batch: JointBatch,
  catalogue: Catalogue,
  tables: tuple[Any, rewards.Reward | None],
  *,
  model: nn.Module,
  config: AlignmentConfig,
  sync_every: int,
  seed: int,
  **options: Any,
) -> tuple[AlignState, losses.Sums]:
  """One update. Randomness is a function of (seed, state.step) alone.

  Args:
    state: before it.
    batch: logged targets, and requests to answer.
    catalogue: the items.
    tables: the prefix index, and the reward; None where nothing is judged.
    model: generative.
    config: the alignment's part of the config.
    sync_every: steps from one copy of the policy to the sampler to the next.
    seed: of the run.
    **options: as of `step.train_step`.

  Returns:
    The next state and sums as of `step.train_step`; over `count` they are
    means over targets, and those of answers means over requests.
  """
  of_answers, of_feedback = streams(seed, state.step)
  # As step.train_step divides by it: what is to be a mean is multiplied by it.
  total = jnp.maximum(jnp.sum(batch_lib.target_weights(batch)), 1.0)
  figures = {}
  if batch.requests is not None:
    sampler = jax.lax.cond(
      state.step % sync_every == 0,
      lambda: state.params,
      lambda: state.sampler,
    )
    state = state.replace(sampler=sampler)
    group, figures = _ask(
      model, sampler, batch.requests, catalogue, tables, of_answers, config
    )
    figures["sampler_age"] = state.step % sync_every
    group = group.replace(scale=group.scale * total)
    batch = batch.replace(requests=None, group=group)
  if config.feedback:
    found = feedback.advantages(batch, config.feedback, of_feedback)
    targets = jnp.maximum(jnp.sum(batch.targets > 0), 1)
    figures["positive"] = jnp.sum(found > 0) / targets
    figures["negative"] = jnp.sum(found < 0) / targets
    batch = batch.replace(advantages=found * total / targets)
  state, sums = step.train_step(
    state, batch, catalogue, tables[0],
    loss_fn=functools.partial(joint_loss, model, config), seed=seed, **options,
  )  # fmt: skip
  return state, sums | {name: total * x for name, x in figures.items()}


def streams(seed: int, step: Int[Array, ""]) -> tuple[jax.Array, jax.Array]:
  """Keys of a step's answers and of what is drawn among its feedback."""
  key = jax.random.fold_in(jax.random.key(seed), step)
  return tuple(jax.random.fold_in(key, n) for n in (_ANSWERS, _FEEDBACK))


def _ask(
  model: nn.Module,
  sampler: Any,
  requests: batch_lib.Batch,
  catalogue: Catalogue,
  tables: tuple[Any, rewards.Reward],
  key: jax.Array,
  config: AlignmentConfig,
) -> tuple[objectives.Group, dict[str, Array]]:
  """What to learn from the sampler's answers, and what to watch of them."""
  index, reward = tables
  of_search, of_format = (jax.random.fold_in(key, n) for n in (1, 2))
  answers = rollouts.answer(
    model, sampler, requests, catalogue, index, of_search, config
  )
  earned = reward(requests, answers.items)
  # Of no number there is no mean, and one would silence its whole group.
  judged = answers.replace(legal=answers.legal & jnp.isfinite(earned))
  group = make_group(requests, judged, earned, of_format, config)
  figures = _figures(judged, earned)
  figures["legality"] = jnp.mean(answers.legal)
  unjudged = jnp.sum(answers.legal) - jnp.sum(judged.legal)
  figures["unjudged"] = unjudged / jnp.maximum(jnp.sum(answers.legal), 1)
  return group, figures


def make_group(
  requests: batch_lib.Batch,
  answers: rollouts.Rollouts,
  earned: Float[Array, "B R"],
  key: jax.Array,
  config: AlignmentConfig,
) -> objectives.Group:
  """What the objective needs of judged answers, and no more."""
  group = objectives.Group(
    requests, answers.codes, answers.log_probability, answers.legal,
    advantages=None, format=None, scale=jnp.full(len(earned), 1 / len(earned)),
  )  # fmt: skip
  if config.objective in objectives.PAIRS:
    places, usable = objectives.pairs_of(earned, answers.legal, config.losers)
    pick = lambda x: jnp.take_along_axis(
      x, places.reshape(places.shape + (1,) * (x.ndim - 2)), axis=1
    )
    return group.replace(
      codes=pick(group.codes), old=pick(group.old), counts=pick(group.counts),
      advantages=jnp.broadcast_to(usable[:, None], places.shape) * 1.0,
    )  # fmt: skip
  judged = None
  if config.format_samples:
    judged = _format(answers, key, config)
  return group.replace(
    advantages=ecpo.advantages(earned, answers.legal), format=judged
  )


def _format(
  answers: rollouts.Rollouts, key: jax.Array, config: AlignmentConfig
) -> Float[Array, "B R"]:
  count = config.format_samples
  if config.format_choice == "random":
    return rewards.format_advantages(answers.items, key, count)
  return rewards.most_probable(answers.items, answers.log_probability, count)


def _figures(
  answers: rollouts.Rollouts, earned: Float[Array, "B R"]
) -> dict[str, Array]:
  """What to watch of the sampler's answers, means over requests.

  `entropy`: the mean of −log p over legal answers, the sampler's entropy where
  these are samples. `reward_spread`: the standard deviation in a group.
  `zero_spread`: the share of groups with none, from which nothing is learned.
  """
  legal = answers.legal
  count = jnp.maximum(jnp.sum(legal, axis=1), 1)
  mean = lambda x: jnp.sum(jnp.where(legal, x, 0.0), axis=1) / count
  spread = ecpo.spread(earned, legal)[1][:, 0]
  best = jnp.max(jnp.where(legal, earned, -jnp.inf), axis=1)
  found = {
    "entropy": mean(-answers.log_probability),
    "reward_mean": mean(earned),
    "reward_max": jnp.where(jnp.any(legal, axis=1), best, 0.0),
    "reward_spread": spread,
    "zero_spread": spread == 0,
  }
  return {name: jnp.mean(values) for name, values in found.items()}


def joint_loss(
  model: nn.Module,
  config: AlignmentConfig,
  params: Any,
  batch: JointBatch,
  catalogue: Catalogue,
  index: Any,
  key: jax.Array | None,
) -> losses.Sums:
  """A losses.LossFn once `model` and `config` are bound.

  Its `loss` is the joint one, `next_token` the supervised part alone.
  """
  levels, sown = losses.code_losses(model, params, batch, catalogue, index, key)
  sums = losses.sum_of_levels(levels, batch_lib.target_weights(batch)) | sown
  sums["next_token"] = sums["loss"]
  if batch.advantages is not None:
    given = -jnp.stack(levels, axis=-1), batch, batch.advantages
    if config.feedback_loss == "pairs":
      of_targets = feedback.pair_loss(*given)
    else:
      of_targets = feedback.loss(*given, config.logged_policy)
    sums["feedback"] = jnp.sum(jnp.where(batch.targets > 0, of_targets, 0.0))
    sums["loss"] += config.feedback_weight * sums["feedback"]
  if batch.group is not None:
    group = batch.group
    new = rollouts.log_probability(
      model, params, group.requests, group.codes, catalogue, index
    )
    found = {"objective": objectives.loss(new, group, config)}
    found |= objectives.guards(new, group, config)
    sums |= {name: jnp.sum(group.scale * x) for name, x in found.items()}
    sums["loss"] += config.weight * sums["objective"]
  return sums
