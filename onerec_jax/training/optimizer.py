"""AdamW with the paper's learning-rate rule, warm-up, clipping, decay mask.

Item-id tables may have an optimizer and a learning rate of their own.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn

from onerec_jax import config as config_lib
from onerec_jax.training import adam


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


def make_table_schedule(
  config: config_lib.OptimizerConfig, num_parameters: int, num_steps: int
) -> optax.Schedule:
  """`make_schedule` with the peak of item-id tables; arguments as there."""
  peak = config.table_learning_rate or config.learning_rate
  config = dataclasses.replace(config, learning_rate=peak)
  return make_schedule(config, num_parameters, num_steps)


def decay_mask(params: Any) -> Any:
  """True at the matrices of projections; norms and tables are not decayed.

  A table row that no batch touches would shrink by decay alone.
  """

  def is_matrix(path: Any, leaf: Any) -> bool:
    del leaf
    return any(getattr(key, "key", None) == "kernel" for key in path)

  return jax.tree_util.tree_map_with_path(is_matrix, params)


def make_optimizer(
  config: config_lib.OptimizerConfig,
  schedule: optax.Schedule,
  table_schedule: optax.Schedule | None = None,
) -> optax.GradientTransformation:
  """Clips by global norm, then AdamW; item-id tables may have their own.

  Its `update` takes `finite`: where that is False, updates are zero and the
  state stays as it was.

  Args:
    config: the optimizer's part of the config.
    schedule: learning rate by step.
    table_schedule: of item-id tables; None: as the rest.

  Raises:
    ValueError: an unknown table optimizer.
  """
  kinds = {"adamw": _table_adam, "rowwise_adagrad": _rowwise_adagrad}
  if config.table_optimizer not in kinds:
    raise ValueError(
      f"optimizer.table_optimizer={config.table_optimizer!r}: want one of "
      f"{sorted(kinds)}"
    )
  update = adam.adamw(
    schedule, config.b1, config.b2, config.weight_decay, decay_mask
  )
  if config.table_optimizer != "adamw" or config.table_learning_rate:
    tables = kinds[config.table_optimizer](config, table_schedule or schedule)
    update = _with_tables(update, _if_finite(tables))
  return optax.chain(adam.clip_by_global_norm(config.clip_norm), update)


class TablesState(NamedTuple):
  """States of the two optimizers, each of its own parameters."""

  rest: Any
  tables: Any


def _if_finite(
  inner: optax.GradientTransformation,
) -> optax.GradientTransformationExtraArgs:
  """Takes `finite` as adam.adamw does."""

  def update(updates, state, params, *, finite=True, **_):
    found = inner.update(updates, state, params)
    before = jax.tree.map(jnp.zeros_like, updates), state
    return jax.tree.map(
      lambda new, old: jnp.where(finite, new, old), found, before
    )

  return optax.GradientTransformationExtraArgs(inner.init, update)


def _with_tables(
  rest: optax.GradientTransformationExtraArgs,
  tables: optax.GradientTransformationExtraArgs,
) -> optax.GradientTransformationExtraArgs:
  """One optimizer for item-id tables and one for the rest.

  Each sees a tree in which the other's leaves are None, so that it keeps
  nothing for them.
  """

  def init(params: Any) -> TablesState:
    of_tables = _select(params, tables=True)
    if not jax.tree.leaves(of_tables):
      raise ValueError(
        "optimizer.table_optimizer and optimizer.table_learning_rate are of "
        "item-id tables, and this model has none; set model.item_embedding, or "
        "leave them at their defaults"
      )
    return TablesState(
      rest.init(_select(params, tables=False)), tables.init(of_tables)
    )

  def update(
    updates: Any, state: TablesState, params: Any, **finite: Any
  ) -> Any:
    of_rest, rest_state = rest.update(
      _select(updates, tables=False), state.rest,
      _select(params, tables=False), **finite,
    )  # fmt: skip
    of_tables, tables_state = tables.update(
      _select(updates, tables=True), state.tables,
      _select(params, tables=True), **finite,
    )  # fmt: skip
    merged = jax.tree.map(
      lambda a, b: b if a is None else a,
      of_rest,
      of_tables,
      is_leaf=lambda leaf: leaf is None,
    )
    return merged, TablesState(rest_state, tables_state)

  return optax.GradientTransformationExtraArgs(init, update)


def _is_boxed(leaf: Any) -> bool:
  return isinstance(leaf, nn.LogicallyPartitioned)


def _select(params: Any, tables: bool) -> Any:
  """Item-id tables, or all but those; the others' places hold None."""

  def keep(path: Any, leaf: Any) -> Any:
    names = [getattr(key, "key", None) for key in path[-2:]]
    return leaf if (names == ["item", "table"]) == tables else None

  return jax.tree_util.tree_map_with_path(keep, params, is_leaf=_is_boxed)


def _table_adam(
  config: config_lib.OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """AdamW's step; tables are not decayed."""
  return optax.adam(schedule, b1=config.b1, b2=config.b2)


def _rowwise_adagrad(
  config: config_lib.OptimizerConfig, schedule: optax.Schedule
) -> optax.GradientTransformation:
  """Adagrad with one number a row, the practice of large id tables.

    v_r ← v_r + mean_j g_rj²;  w_r ← w_r − η g_r / (√v_r + ε)

  State is 1 / width of Adagrad's. A row whose gradient is zero keeps v and w
  bit by bit, so this is also what an update of only the looked-up rows would
  do; a row-wise Adam's v would fade, and momentum go on moving the row.
  """
  del config
  return optax.chain(
    _scale_by_row_sums(), optax.scale_by_learning_rate(schedule)
  )


class RowSums(NamedTuple):
  """v: a float32 [rows] for each table [rows, width]."""

  sums: Any


_EPSILON = 1e-10
"""ε; far below the root of v in any row with a gradient."""


def _scale_by_row_sums() -> optax.GradientTransformation:
  def init(params: Any) -> RowSums:
    return RowSums(jax.tree.map(_row_zeros, params, is_leaf=_is_boxed))

  def update(updates: Any, state: RowSums, params: Any) -> Any:
    del params
    sums = jax.tree.map(
      lambda v, g: v + jnp.mean(jnp.square(g), axis=-1), state.sums, updates
    )
    scaled = jax.tree.map(
      lambda v, g: g / (jnp.sqrt(v) + _EPSILON)[:, None], sums, updates
    )
    return scaled, RowSums(sums)

  return optax.GradientTransformation(init, update)


def _row_zeros(table: Any) -> Any:
  """Zeros [rows] that lie on the mesh as the table's rows do."""
  if not _is_boxed(table):
    return jnp.zeros(table.shape[:1], jnp.float32)
  return table.replace(
    value=_row_zeros(table.value), names=tuple(table.names[:1])
  )
