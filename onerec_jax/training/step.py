"""One pure training step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from onerec_jax import partitioning
from onerec_jax.data import batch as batch_lib
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.models import moe
from onerec_jax.training import losses
from onerec_jax.training.state import TrainState

StepFn = Callable[
  [TrainState, Batch, Catalogue, Any], tuple[TrainState, losses.Sums]
]


def _gradients(
  loss_fn: losses.LossFn,
  params: Any,
  batch: Batch,
  catalogue: Catalogue,
  index: Any,
  key: jax.Array,
  microbatches: int,
) -> tuple[Any, losses.Sums]:
  """Gradients of the mean loss, and sums over the batch."""
  total = jnp.maximum(jnp.sum(batch_lib.target_weights(batch)), 1.0)

  def mean_loss(params, batch, key):
    sums = loss_fn(params, batch, catalogue, index, key)
    # Divided by the whole batch's count, microbatch gradients just add up.
    return sums["loss"] / total, sums

  grad = jax.grad(mean_loss, has_aux=True)
  if microbatches == 1:
    return grad(params, batch, key)
  # Every microbatches-th row, so that each device's rows stay where they are.
  pieces = jax.tree.map(
    lambda x: x.reshape(-1, microbatches, *x.shape[1:]).swapaxes(0, 1), batch
  )
  keys = jax.random.split(key, microbatches)

  def accumulate(carry, piece):
    return jax.tree.map(jnp.add, carry, grad(params, *piece)), None

  first = jax.tree.map(lambda x: x[0], (pieces, keys))
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype),
    jax.eval_shape(grad, params, *first),
  )
  carry, _ = jax.lax.scan(accumulate, zeros, (pieces, keys))
  return carry


def train_step(
  state: TrainState,
  batch: Batch,
  catalogue: Catalogue,
  index: Any,
  *,
  loss_fn: losses.LossFn,
  tx: optax.GradientTransformationExtraArgs,
  seed: int,
  microbatches: int = 1,
  balance_rate: float = 0.0,
) -> tuple[TrainState, losses.Sums]:
  """One update. Randomness is a function of (seed, state.step) alone.

  An update whose loss or gradient is not finite is left out and counted; what
  to do about it is the loop's decision, which does not have to be asked here.
  Where there are experts, their balancing biases move by `balance_rate`
  towards equal loads (models/moe.py).

  Returns:
    The next state and sums over the batch (see losses.Sums), with `grad_norm`
    and `nonfinite` (0 or 1) beside them, and `max_expert_load` (1: balanced)
    in place of `loads`.
  """
  key = jax.random.fold_in(jax.random.key(seed), state.step)
  grads, sums = _gradients(
    loss_fn, state.params, batch, catalogue, index, key, microbatches
  )
  norm = optax.global_norm(grads)
  finite = jnp.isfinite(norm) & jnp.isfinite(sums["loss"])
  updates, opt_state = tx.update(
    grads, state.opt_state, state.params, finite=finite
  )
  params = optax.apply_updates(state.params, updates)
  loads = sums.pop("loads", None)
  if loads:
    params = moe.balance(params, loads, jnp.where(finite, balance_rate, 0.0))
    sums["max_expert_load"] = moe.max_load(loads)
  nonfinite = 1 - finite.astype(jnp.int32)
  state = state.replace(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    skipped=state.skipped + nonfinite,
  )
  return state, dict(sums, grad_norm=norm, nonfinite=nonfinite)


def compile_step(
  step: StepFn, shardings: Any, mesh: Mesh, catalogue: Catalogue, index: Any
) -> StepFn:
  """Jits a step for a mesh: state donated, everything's place said.

  Args:
    step: `train_step` with its keyword arguments bound.
    shardings: of the state.
    mesh: the mesh.
    catalogue: as passed at each call; its arrays are replicated.
    index: likewise.
  """
  whole = partitioning.replicated(mesh)
  rows = partitioning.batch_sharding(mesh)
  tables = jax.tree.map(lambda _: whole, (catalogue, index))
  return jax.jit(
    step,
    in_shardings=(shardings, rows, *tables),
    out_shardings=(shardings, whole),
    donate_argnums=0,
  )
