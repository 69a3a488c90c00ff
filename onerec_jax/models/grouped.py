"""Rows times the matrix of their group: the product of experts (moe.py).

XLA has it for TPUs (`jax.lax.ragged_dot`), with the gradient of the rows. The
gradient of the matrices it writes as a masked dense product over all groups,
with as many times the arithmetic as there are groups. On TPUs that one is
JAX's Pallas kernel here, `tgmm` of megablox. Elsewhere JAX 0.10 writes all
three dense; on CPUs they are batched products of tiles here, GPUs have XLA's.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import tgmm
from jaxtyping import Array, Bool, Float, Int

_FEWEST_ROWS, _MOST_ROWS, _MOST_BYTES = 128, 512, 2048
"""Of a tile of the kernel: its rows, about those of the mean group, as a tile
that two groups share is computed for both; and at most so much of a row on
either side. Two buffers of inputs and output and the float32 sum are then 12
MiB in bfloat16 and 7 in float32, of the 16 that XLA gives a kernel."""
_LANES = 128


@jax.custom_vjp
def dot(
  rows: Float[Array, "M D"],
  matrices: Float[Array, "E D F"],
  sizes: Int[Array, "E"],
) -> Float[Array, "M F"]:
  """`jax.lax.ragged_dot`, group by group on TPUs and CPUs, its gradient too.

  In a `jax.shard_map` it needs `check_vma=False`, as any kernel.

  Args:
    rows: sorted by group.
    matrices: one of each group, of the rows' type.
    sizes: rows of each group. What comes after the last group's is undefined,
      in the product and in the gradient of `rows`: mask it on both sides.

  Returns:
    [M, F]; M is at least 1.
  """
  return _product(rows, matrices, sizes)


def _product(rows, matrices, sizes):
  return jax.lax.platform_dependent(
    rows, matrices, sizes, cpu=_tiled, default=jax.lax.ragged_dot
  )


def _forward(rows, matrices, sizes):
  return _product(rows, matrices, sizes), (rows, matrices, sizes)


def _backward(saved, out):
  rows, matrices, sizes = saved
  of_rows = _product(out, matrices.swapaxes(1, 2), sizes)
  of_matrices = jax.lax.platform_dependent(
    rows, out, sizes, cpu=_tiled_outer, tpu=outer, default=_dense_outer
  )
  return of_rows, of_matrices, None


dot.defvjp(_forward, _backward)


def outer(
  rows: Float[Array, "M D"],
  out: Float[Array, "M F"],
  sizes: Int[Array, "E"],
  interpret: bool = False,
) -> Float[Array, "E D F"]:
  """rows[group]ᵀ · out[group] of each group, by the TPU kernel.

  Args:
    rows: sorted by group.
    out: likewise.
    sizes: rows of each group; of none the product is 0.
    interpret: run it on other devices, slowly.
  """
  mean = -(-len(rows) // (len(sizes) * _FEWEST_ROWS)) * _FEWEST_ROWS
  tile = min(max(mean, _FEWEST_ROWS), _MOST_ROWS)
  pad = ((0, -len(rows) % tile), (0, 0))
  rows, out = jnp.pad(rows, pad), jnp.pad(out, pad)
  columns = (_columns(x.shape[1], x.dtype.itemsize) for x in (rows, out))
  return tgmm(
    rows.swapaxes(0, 1), out, sizes, rows.dtype, (tile, *columns),
    interpret=interpret,
  )  # fmt: skip


def _columns(width: int, itemsize: int) -> int:
  """Of a tile: the last is computed whole, so that all are of about a size."""
  tiles = -(-width * itemsize // _MOST_BYTES)
  return min(width, -(-width // (tiles * _LANES)) * _LANES)


_CONTRACT_ROWS = jax.lax.RaggedDotDimensionNumbers(
  dot_dimension_numbers=(((0,), (0,)), ((), ())),
  lhs_ragged_dimensions=[0],
  rhs_group_dimensions=[],
)


def _dense_outer(rows, out, sizes):
  return jax.lax.ragged_dot_general(rows, out, sizes, _CONTRACT_ROWS)


class _Tiles(NamedTuple):
  """Rows cut into tiles, each of one group; T rows a tile.

  Attributes:
    group: [tiles] the group of each.
    row: [tiles, T] the row in each place.
    inside: [tiles, T] whether the place holds a row of the tile's group.
    place: [M] where each row went, counted over all tiles.
  """

  group: Int[Array, "tiles"]
  row: Int[Array, "tiles T"]
  inside: Bool[Array, "tiles T"]
  place: Int[Array, "M"]


def _tiles(M: int, sizes: Int[Array, "E"]) -> _Tiles:
  """Tiles of a quarter of the mean group, in eights.

  With many rows a group there are a quarter more places than rows, with few
  rows many times as many. No more than M tiles hold a row.
  """
  E = len(sizes)
  T = 8 * max(-(-M // (4 * E * 8)), 1)
  ends = jnp.cumsum(sizes)
  starts = ends - sizes
  whole = -(-sizes // T)
  first = jnp.cumsum(whole) - whole
  tile, row = jnp.arange(min(M // T + E, M)), jnp.arange(M)
  of_tile, of_row = (
    jnp.minimum(jnp.searchsorted(upto, x, side="right"), E - 1)
    for upto, x in ((first + whole, tile), (ends, row))
  )
  at = starts[of_tile] + (tile - first[of_tile]) * T
  at = at[:, None] + jnp.arange(T)[None]
  place = first[of_row] * T + row - starts[of_row]
  inside = at < ends[of_tile][:, None]
  return _Tiles(of_tile, jnp.minimum(at, M - 1), inside, place)


def _tiled(rows, matrices, sizes):
  """As `dot`, of any device: a batched product, a matrix a tile.

  The copies of matrices are up to five times all of them, as are the float32
  sums of `_tiled_outer`; a dense product has a copy of all rows a group.
  """
  tiles = _tiles(len(rows), sizes)
  found = jnp.einsum("ntd,ndf->ntf", rows[tiles.row], matrices[tiles.group])
  return found.reshape(-1, found.shape[2]).at[tiles.place].get(mode="clip")


def _tiled_outer(rows, out, sizes):
  """As `outer`, of any device: the products of tiles, summed by group."""
  tiles = _tiles(len(rows), sizes)
  inside = tiles.inside[:, :, None]
  rows_of, out_of = (jnp.where(inside, x[tiles.row], 0) for x in (rows, out))
  of_tile = jnp.einsum(
    "ntd,ntf->ndf", rows_of, out_of, preferred_element_type=jnp.float32
  )
  summed = jax.ops.segment_sum(
    of_tile, tiles.group, len(sizes), indices_are_sorted=True
  )
  return summed.astype(rows.dtype)
