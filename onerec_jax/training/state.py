"""The training state, its shapes and its place on the mesh."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import Mesh

from onerec_jax import checkpoint, partitioning
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.models import registry


@struct.dataclass
class TrainState:
  """What a step changes.

  Attributes:
    step: updates made, int32.
    params: float32.
    opt_state: of optax.
    skipped: updates skipped for a loss or gradient that was not finite.
  """

  step: Any
  params: Any
  opt_state: Any
  skipped: Any


def abstract_params(
  model: registry.Model, batch: Batch, catalogue: Catalogue
) -> Any:
  """Boxed parameter shapes; `batch` and `catalogue` may be shapes too."""
  return jax.eval_shape(model.init, jax.random.key(0), batch, catalogue)[
    "params"
  ]


def plan(
  model: registry.Model,
  tx: optax.GradientTransformation,
  batch: Batch,
  catalogue: Catalogue,
  seed: int,
  mesh: Mesh,
) -> tuple[TrainState, Callable[[], TrainState]]:
  """What the state of a run looks like, and how to make a fresh one.

  A run that goes on reads its state into the shapes and makes none: the two of
  them would not fit where one just does.

  Args:
    model: the model.
    tx: the optimizer.
    batch: an example of the batches, or its shapes.
    catalogue: likewise.
    seed: of the parameters.
    mesh: the mesh.

  Returns:
    (shapes with shardings, a function that makes the state where they say;
    it takes arrays for `batch` and `catalogue`).
  """

  def init(key: jax.Array, batch: Batch, catalogue: Catalogue) -> TrainState:
    params = model.init(key, batch, catalogue)["params"]
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), zero)

  arguments = jax.random.key(seed), batch, catalogue
  boxed = jax.eval_shape(init, *arguments)
  places = partitioning.tree_shardings(boxed, mesh)
  unbox = lambda tree: _like(places, tree)
  # Of the very function whose shapes were asked for: it is traced once.
  make = jax.jit(init, out_shardings=_like(boxed, places))
  shapes = checkpoint.abstract(unbox(boxed), places)
  return shapes, lambda: unbox(make(*arguments))


def _like(tree: Any, values: Any) -> Any:
  """The leaves of `values` in the structure of `tree`."""
  return jax.tree.unflatten(jax.tree.structure(tree), jax.tree.leaves(values))


def with_params(
  params: Any, tx: optax.GradientTransformation, shapes: TrainState
) -> TrainState:
  """The state before the first step from these parameters.

  Args:
    params: laid out as `shapes` say; not copied.
    tx: the optimizer.
    shapes: as of `plan`.
  """
  init = jax.jit(tx.init, out_shardings=shardings(shapes.opt_state))
  zero = jax.jit(
    lambda: jnp.zeros((), jnp.int32), out_shardings=shapes.step.sharding
  )
  return TrainState(zero(), params, init(params), zero())


def shardings(shapes: Any) -> Any:
  """The places in a tree of shapes with shardings."""
  return jax.tree.map(lambda x: x.sharding, shapes)


def num_parameters(params: Any) -> int:
  """Entries of all arrays."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
