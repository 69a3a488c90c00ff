"""Aligns a trained run with what users prefer: a new run beside it.

What it trains, keeps and writes is as of any run (workflow.py), so evaluation,
reports and serving take it by name. docs/alignment.md tells how to use it.
"""

import functools
import importlib
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from onerec_jax import config as config_lib
from onerec_jax import files, partitioning, runs, workflow
from onerec_jax.alignment import (
  checks,
  learner,
  requests,
  reward_models,
  rewards,
  rollouts,
)
from onerec_jax.data import features, pipeline
from onerec_jax.inference import assemble
from onerec_jax.training import loop


def align(
  config: config_lib.Config,
  workdir: files.PathLike,
  system: assemble.System | None = None,
) -> assemble.System:
  """Aligns the config's model, or resumes that, or finds it done.

  Args:
    config: the experiment; `alignment.start` names the run to start from.
    workdir: the work directory.
    system: `workflow.assembled(config, workdir)`, if already at hand.

  Returns:
    The system; its parameters are in <workdir>/models/<name>/best.

  Raises:
    FileNotFoundError: there is no such start, or it has no parameters yet.
    ValueError: settings that do not fit each other, the start or the data.
  """
  system = system or workflow.assembled(config, workdir)
  checks.check(system, workdir)
  settings, seed = config.alignment, config.training.seed

  def train_on(mesh: Mesh, run: pathlib.Path) -> loop.Progress:
    checks.check_rows(settings.requests, mesh)
    logged, steps_per_epoch = pipeline.training_dataset(
      system.prepared,
      config.pipeline,
      seed,
      partitioning.local_rows(mesh, config.pipeline.batch_size),
    )
    asked = reward = None
    if settings.objective:
      reward = make_reward(system, workdir, mesh)
      held = partitioning.local_rows(mesh, settings.requests)
      asked = requests.dataset(
        system.prepared, config.pipeline, settings.requests, seed, held
      )
      _say_if_never_renewed(config, steps_per_epoch)
    start = assemble.run_directory(workdir, settings.start)
    task = learner.Alignment(
      config,
      system.model,
      lambda: assemble.load_params(system, start, mesh),
      steps_per_epoch,
    )
    return loop.train(
      config, run, system.model, requests.beside(logged, asked),
      steps_per_epoch, system.catalogue, (system.index, reward),
      workflow.validator(system, mesh), mesh, task,
    )  # fmt: skip

  judges = rewards.runs_of(settings.rewards) if settings.objective else []
  runs.once(system, workdir, train_on, [settings.start, *judges])
  return system


def _say_if_never_renewed(
  config: config_lib.Config, steps_per_epoch: int
) -> None:
  """Prints that all answers are the start's, where they are."""
  interval = config.alignment.sync_every or steps_per_epoch
  steps = loop.num_steps(config.training, steps_per_epoch)
  if interval >= steps and jax.process_index() == 0:
    print(
      f"{config.name}: the sampler is renewed after {interval} steps and the "
      f"run has {steps}: answers and reference stay the start's; set "
      "--config.alignment.sync_every to less, unless that is meant"
    )


def make_reward(
  system: assemble.System, workdir: files.PathLike, mesh: Mesh
) -> rewards.Reward:
  """The weighted sum of `alignment.rewards`, as one callable pytree.

  Raises:
    ValueError: none is named, or one cannot be had.
  """
  settings, parts = system.config.alignment, []
  for text in settings.rewards:
    try:
      name, weight = rewards.parse(text)
      parts.append((weight, _reward(name, system, workdir, mesh)))
    except ValueError as error:
      raise ValueError(f"alignment.rewards: {text!r}: {error}") from error
  if not parts:
    raise ValueError(
      "alignment.rewards is empty: name a reward model's run, or a function "
      "as module:function; --config.alignment.rewards=\"('session_reward=1',)\""
    )
  weights = tuple(weight for weight, _ in parts)
  total = jax.tree_util.Partial(
    functools.partial(_weighted, settings.rewards, weights),
    tuple(part for _, part in parts),
  )
  if not settings.suppressed:
    return total
  limited = functools.partial(_industrial, settings.share, settings.factor)
  return jax.tree_util.Partial(limited, total, _suppressed(system))


def _reward(
  name: str, system: assemble.System, workdir: files.PathLike, mesh: Mesh
) -> rewards.Reward:
  if ":" not in name:
    run, _, head = name.partition("/")
    return reward_models.load(
      workdir, run, mesh, {head: 1.0} if head else None,
      system.config.pipeline, rollouts.session_items(system.model),
    )  # fmt: skip
  module, _, function = name.partition(":")
  try:
    found = getattr(importlib.import_module(module), function)
  except (ImportError, AttributeError) as error:
    raise ValueError(f"cannot import it ({error})") from error
  if isinstance(found, jax.tree_util.Partial):
    return found
  return jax.tree_util.Partial(found)


# Weights and bounds are no arguments of the step: what is bound by
# functools.partial is part of the program, what Partial binds is not.


def _weighted(texts, weights, parts, histories, candidates):
  # Numbered, as one may be named twice.
  named = {
    f"{i}, {text!r},": (weight, part)
    for i, (text, weight, part) in enumerate(zip(texts, weights, parts), 1)
  }
  return rewards.weighted(named)(histories, candidates)


def _industrial(share, factor, reward, suppressed, histories, candidates):
  limited = rewards.industrial(reward, suppressed, share, factor)
  return limited(histories, candidates)


def _suppressed(system: assemble.System) -> jax.Array:
  """Bool [I + 1]: the items of `alignment.suppressed`."""
  wanted = system.config.alignment.suppressed
  name, _, value = wanted.partition("=")
  specs = {
    feature: spec
    for feature, spec in system.prepared.manifest["bucketing"]["item"].items()
    if spec["kind"] == "codes"
  }
  spec = specs.get(name)
  codes = () if spec is None else features.bucket_codes(spec, [value])
  if not np.any(codes):
    raise ValueError(
      f"alignment.suppressed={wanted!r} names no items: want feature=value of "
      f"one of {sorted(specs)} with a value of the training data"
    )
  return jnp.asarray(system.catalogue.features[name] == codes[0])
