"""The training state, its shapes and its place on the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
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


def create(
  model: registry.Model,
  tx: optax.GradientTransformation,
  batch: Batch,
  catalogue: Catalogue,
  seed: int,
  mesh: Mesh,
) -> tuple[TrainState, Any, Any]:
  """A fresh state, laid out over the mesh as it is made.

  Args:
    model: the model.
    tx: the optimizer.
    batch: an example of the batches, or its shapes.
    catalogue: likewise.
    seed: of the parameters.
    mesh: the mesh.

  Returns:
    (state, its shardings, its shapes with shardings).
  """

  def init(key: jax.Array, batch: Batch, catalogue: Catalogue) -> TrainState:
    params = model.init(key, batch, catalogue)["params"]
    zero = jnp.zeros((), jnp.int32)
    return TrainState(zero, params, tx.init(params), zero)

  key = jax.random.key(seed)
  boxed = jax.eval_shape(init, key, batch, catalogue)
  shardings = partitioning.tree_shardings(boxed, mesh)
  make = jax.jit(lambda *args: nn.unbox(init(*args)), out_shardings=shardings)
  state = make(key, batch, catalogue)
  return state, shardings, checkpoint.abstract(state, shardings)


def num_parameters(params: Any) -> int:
  """Entries of all arrays."""
  return sum(leaf.size for leaf in jax.tree.leaves(params))
