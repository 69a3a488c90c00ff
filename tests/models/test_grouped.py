"""The product of groups against a loop, and its TPU program's arithmetic."""

import importlib.util
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.models import grouped

# Groups without rows; rows of no group at the end; groups that share tiles.
SIZES = [[0, 700, 3, 0, 512, 0], [128, 128, 128, 128, 128, 128], [0] * 6]
ROWS = 1300


def draw(D, F):
  rng = np.random.default_rng(D)
  return tuple(
    rng.normal(size=shape).astype(np.float32)
    for shape in ((ROWS, D), (6, D, F), (ROWS, F))
  )


def by_loop(rows, matrices, out, sizes):
  """Product, and the gradients of its rows and matrices for `out`'s."""
  product, of_rows = np.zeros_like(out), np.zeros_like(rows)
  of_matrices = np.zeros_like(matrices)
  start = 0
  for group, size in enumerate(sizes):
    here = slice(start, start + size)
    product[here] = rows[here] @ matrices[group]
    of_rows[here] = out[here] @ matrices[group].T
    of_matrices[group] = rows[here].T @ out[here]
    start += size
  return product, of_rows, of_matrices


def program(product, outer):
  """`dot` and its gradient of these parts."""

  def run(rows, matrices, out, sizes):
    of_rows = product(out, matrices.swapaxes(1, 2), sizes)
    return product(rows, matrices, sizes), of_rows, outer(rows, out, sizes)

  return jax.jit(run)


def of_dot(rows, matrices, out, sizes):
  found, gradient = jax.vjp(lambda *x: grouped.dot(*x, sizes), rows, matrices)
  return found, *gradient(out)


outer_by_tiles = jax.jit(grouped._tiled_outer)
PROGRAMS = {
  "on this device": jax.jit(of_dot),
  "by tiles": program(grouped._tiled, grouped._tiled_outer),
  # What GPUs run.
  "by XLA": program(jax.lax.ragged_dot, grouped._dense_outer),
}


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize(
  ("rows", "sizes"),
  [
    *((ROWS, sizes) for sizes in SIZES),
    (1, [1]),
    (7, [0, 3, 4, 0]),
    (5, [0, 0, 0, 2, 0, 0, 1, 0, 0]),
    (960, [2, 500, 18, 200, 3, 237]),
  ],
)
def test_product_and_gradients_are_a_loop_over_groups(rows, sizes, name):
  D, F = 8, 12
  rng = np.random.default_rng(rows)
  given = [
    rng.normal(size=shape).astype(np.float32)
    for shape in ((rows, D), (len(sizes), D, F), (rows, F))
  ]
  found = PROGRAMS[name](*given, jnp.asarray(sizes, jnp.int32))
  inside = (np.arange(rows) < sum(sizes))[:, None]
  of = [np.where(inside, x, 0) for x in found[:2]]
  for value, expected in zip((*of, found[2]), by_loop(*given, sizes)):
    np.testing.assert_allclose(value, expected, atol=2e-4)


def test_bfloat16_products_are_summed_in_float32():
  """A group of 1,024 rows of 1: a sum in bfloat16 would stop at 256."""
  rows, out = jnp.ones((1024, 8), jnp.bfloat16), jnp.ones((1024, 4))
  sizes = jnp.asarray([0, 1024], jnp.int32)
  found = outer_by_tiles(rows, out.astype(jnp.bfloat16), sizes)
  assert found.dtype == jnp.bfloat16
  assert not found[0].any()
  assert (found[1] == 1024).all()


def test_what_is_not_finite_stays_in_its_group():
  rows, matrices, out = draw(8, 12)
  out[:128] = np.inf
  sizes = jnp.asarray([128] * 6, jnp.int32)
  found = outer_by_tiles(rows, out, sizes)
  assert not np.isfinite(found[0]).any()
  assert np.isfinite(found[1:]).all()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize(("D", "F"), [(128, 256), (1100, 600)])
def test_the_kernel_is_a_loop_over_groups(D, F, sizes):
  """One tile of columns; several, of which the last is not whole."""
  rows, matrices, out = draw(D, F)
  given = jnp.asarray(rows), jnp.asarray(out), jnp.asarray(sizes, jnp.int32)
  found = grouped.outer(*given, interpret=True)
  _, _, expected = by_loop(rows, matrices, out, sizes)
  np.testing.assert_allclose(found, expected, atol=2e-4)


# Before jax starts, so in a process of its own.
PROGRAM = """
import json
from launch import compile_tpu  # sets the environment
import jax, jax.numpy as jnp
from jax.experimental import topologies
from onerec_jax.models import grouped

def flops(groups, of):
  def loss(rows, matrices, sizes):
    return jnp.sum(grouped.dot(rows, matrices, sizes).astype(jnp.float32) ** 2)
  device = topologies.get_topology_desc(
    platform="tpu", topology_name="v5p:2x2x1").devices[0]
  place = jax.sharding.SingleDeviceSharding(device)
  shape = lambda *size, dtype=of: jax.ShapeDtypeStruct(
    size, dtype, sharding=place)
  program = jax.jit(jax.grad(loss, (0, 1))).lower(
    shape(ROWS, D), shape(groups, D, F), shape(groups, dtype=jnp.int32))
  return program.compile().cost_analysis()["flops"]

ROWS, D, F = SHAPE
print(json.dumps([flops(8, of) for of in (jnp.bfloat16, jnp.float32)]))
"""


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_on_tpus_more_groups_are_no_more_arithmetic():
  """Eight's is that of one, and tiles of full size fit a chip, in either type.

  Full are those of 512 rows a group.
  """
  shape = 8 * 512, 1024, 1100
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM.replace("SHAPE", str(shape))],
    capture_output=True, text=True,
    env=dict(os.environ, JAX_COMPILATION_CACHE_DIR=""),
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  # The product, and the gradients of its rows and of the matrices.
  expected = 3 * 2 * np.prod(shape)
  found = json.loads(done.stdout.splitlines()[-1])
  assert found == pytest.approx([expected] * 2, rel=0.05)
