"""What the steps of a run do; the loop around them is one for all runs."""

import functools
from collections.abc import Callable
from typing import Any

import optax
from jax.sharding import Mesh

from onerec_jax import config as config_lib
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.models import registry
from onerec_jax.training import losses, state, step


class Task:
  """Supervised training; alignment/learner.py makes another of it.

  Args:
    config: the experiment.
    model: what to train.

  Attributes:
    gate: None: the best validation is kept. A number: the parameters that the
      run starts from are validated and kept first, and then the latest ones;
      the run stops once `evaluation.select` is more than this share below the
      start's.
  """

  gate: float | None = None

  def __init__(self, config: config_lib.Config, model: registry.Model):
    self.config, self.model = config, model

  def plan(
    self,
    tx: optax.GradientTransformation,
    example: Batch,
    catalogue: Catalogue,
    mesh: Mesh,
  ) -> tuple[Any, Callable[[], Any]]:
    """Shapes of the state and how to make it; all as of `state.plan`."""
    seed = self.config.training.seed
    return state.plan(self.model, tx, example, catalogue, seed, mesh)

  def step(self, tx: optax.GradientTransformationExtraArgs) -> step.StepFn:
    """The pure step, to be compiled for a mesh (`step.compile_step`)."""
    return functools.partial(
      step.train_step, loss_fn=losses.make_loss(self.model), **self.options(tx)
    )

  def options(
    self, tx: optax.GradientTransformationExtraArgs
  ) -> dict[str, Any]:
    """Arguments of `step.train_step` but the loss."""
    settings = self.config.training
    return {
      "tx": tx,
      "seed": settings.seed,
      "microbatches": settings.microbatches,
      "balance_rate": registry.balance_rate(self.config.model),
    }

  def flops(self) -> float:
    """Multiply-adds ×2 of a step's matrix products."""
    pipeline = self.config.pipeline
    # Forward plus backward: three times the forward matrix products.
    return 3.0 * registry.forward_flops(
      self.model,
      pipeline.batch_size,
      pipeline.row_positions,
      pipeline.row_targets,
    )
