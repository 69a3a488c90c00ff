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


@pytest.mark.parametrize("sizes", SIZES)
def test_product_and_gradients_are_a_loop_over_groups(sizes):
  rows, matrices, out = draw(8, 12)
  inside = (np.arange(ROWS) < sum(sizes))[:, None]

  def product(rows, matrices):
    found = grouped.dot(rows, matrices, jnp.asarray(sizes, jnp.int32))
    return jnp.where(inside, found, 0)

  found, gradient = jax.vjp(product, jnp.asarray(rows), jnp.asarray(matrices))
  of_rows, of_matrices = gradient(jnp.asarray(out))
  expected = by_loop(rows, matrices, out, sizes)
  np.testing.assert_allclose(found, expected[0], atol=1e-4)
  np.testing.assert_allclose(
    np.where(inside, of_rows, 0), expected[1], atol=1e-4
  )
  np.testing.assert_allclose(of_matrices, expected[2], atol=2e-4)


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
print(json.dumps(
  [flops(n, of) for of in (jnp.bfloat16, jnp.float32) for n in (2, 16)]))
"""


@pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed"
)
def test_on_tpus_more_groups_are_no_more_arithmetic():
  """And tiles of full size fit a chip, in either type."""
  shape = 8192, 1024, 1100
  done = subprocess.run(
    [sys.executable, "-c", PROGRAM.replace("SHAPE", str(shape))],
    capture_output=True, text=True,
    env=dict(os.environ, JAX_COMPILATION_CACHE_DIR=""),
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  # The product, and the gradients of its rows and of the matrices.
  expected = 3 * 2 * np.prod(shape)
  found = json.loads(done.stdout.splitlines()[-1])
  assert found == pytest.approx([expected] * 4, rel=0.05)
