"""AdamW with the paper's learning-rate rule, warm-up, clipping, decay mask."""

import math
from typing import Any

import jax
import optax

from onerec_jax import config as config_lib


def paper_learning_rate(num_parameters: int) -> float:
  """5e-4 · √(1e8 / N): reproduces the lr column of V2's Table 5."""
  return 5e-4 * math.sqrt(1e8 / num_parameters)


def make_schedule(
  config: config_lib.OptimizerConfig, num_parameters: int, num_steps: int
) -> optax.Schedule:
  """Learning rate by step: linear warm-up, then cosine to zero or constant.

  Args:
    config: the optimizer's part of the config.
    num_parameters: N of the rule, parameters in blocks.
    num_steps: of the whole run.

  Raises:
    ValueError: an unknown schedule.
  """
  peak = config.learning_rate or paper_learning_rate(num_parameters)
  warmup = min(config.warmup_steps, num_steps - 1)
  if config.schedule == "cosine":
    return optax.warmup_cosine_decay_schedule(0.0, peak, warmup, num_steps)
  if config.schedule != "constant":
    raise ValueError(
      f"optimizer.schedule={config.schedule!r}: want cosine or constant"
    )
  if warmup == 0:
    # optax's own would stay at zero for ever.
    return optax.constant_schedule(peak)
  return optax.warmup_constant_schedule(0.0, peak, warmup)


def decay_mask(params: Any) -> Any:
  """True at the matrices of projections; norms and tables are not decayed.

  A table row that no batch touches would shrink by decay alone.
  """

  def is_matrix(path: Any, leaf: Any) -> bool:
    del leaf
    return any(getattr(key, "key", None) == "kernel" for key in path)

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(
  config: config_lib.OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Clips by global norm, then AdamW."""
  return optax.chain(
    optax.clip_by_global_norm(config.clip_norm),
    optax.adamw(
      schedule,
      b1=config.b1,
      b2=config.b2,
      weight_decay=config.weight_decay,
      mask=decay_mask,
    ),
  )
