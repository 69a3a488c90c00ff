"""Hash functions as random numbers; lookups against loops, on any mesh."""

import collections
import functools
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import NamedSharding, PartitionSpec

from onerec_jax import config as config_lib
from onerec_jax import partitioning
from onerec_jax.models import id_table


def _murmur(word):
  """The finaliser with Python's integers."""
  word = (word ^ (word >> 16)) * 0x85EBCA6B % 2**32
  word = (word ^ (word >> 13)) * 0xC2B2AE35 % 2**32
  return word ^ (word >> 16)


def _row(item, num_rows, function):
  salt = (function + 1) * 0x9E3779B9 % 2**32
  return _murmur(_murmur((item + salt) % 2**32) ^ salt) % num_rows


def test_rows_are_fixed_for_good():
  """Another function would make every checkpoint's table meaningless."""
  ids = np.asarray([0, 1, 2, 1000, 2**31 - 1], np.int32)
  for function in range(id_table.NUM_FUNCTIONS):
    found = id_table.hash_rows(jnp.asarray(ids), 100_000_000, function)
    assert found.dtype == jnp.int32
    expected = [_row(int(i), 100_000_000, function) for i in ids]
    assert found.tolist() == expected


@pytest.mark.parametrize("stride", [1, 4096, 1 << 14])
@pytest.mark.parametrize("function", range(id_table.NUM_FUNCTIONS))
def test_rows_are_uniform(stride, function):
  """χ² of consecutive ids, and of ids that end in the same bits."""
  ids = jnp.arange(131_072, dtype=jnp.int32) * stride
  rows = id_table.hash_rows(ids, 1280, function)
  counts = np.bincount(np.asarray(rows), minlength=1280)
  assert len(counts) == 1280
  expected = len(ids) / 1280
  chi2 = float(np.sum((counts - expected) ** 2) / expected)
  # 1279 degrees of freedom: within five standard deviations.
  assert abs(chi2 - 1279) < 5 * math.sqrt(2 * 1279)


def test_the_two_functions_are_independent():
  """χ² of pairs of rows; and as few items alike as chance makes."""
  ids = jnp.arange(1, 200_001, dtype=jnp.int32)
  first, second = (np.asarray(id_table.hash_rows(ids, 32, f)) for f in (0, 1))
  counts = np.bincount(first * 32 + second, minlength=1024)
  expected = len(ids) / 1024
  chi2 = float(np.sum((counts - expected) ** 2) / expected)
  assert abs(chi2 - 1023) < 5 * math.sqrt(2 * 1023)

  rows = np.stack([id_table.hash_rows(ids, 16_384, f) for f in (0, 1)])
  alike = collections.Counter(map(tuple, np.sort(rows, axis=0).T.tolist()))
  pairs = sum(n * (n - 1) // 2 for n in alike.values())
  expected = (200_000 / 16_384) ** 2  # I² / R²; Poisson
  assert abs(pairs - expected) < 5 * math.sqrt(expected)


@pytest.mark.parametrize("num_rows", [0, 128])
def test_lookup_is_a_sum_of_rows(num_rows):
  module = id_table.ItemTable(num_items=300, features=3, num_rows=num_rows)
  ids = np.random.default_rng(0).integers(0, 301, (2, 50)).astype(np.int32)
  ids[0, :3] = 0
  # Beyond what was trained.
  ids[1, :3] = 301, 383, 1000
  ids = jnp.asarray(ids)
  params = nn.unbox(module.init(jax.random.key(0), ids))["params"]
  table = np.asarray(params["table"])
  assert table.shape == (num_rows or 384, 3)
  found = module.apply({"params": params}, ids)
  for place in np.ndindex(ids.shape):
    item = int(ids[place])
    rows = [_row(item, num_rows, f) for f in (0, 1)] if num_rows else [item]
    known = 0 < item <= 300
    expected = sum(table[row] for row in rows) if known else np.zeros(3)
    np.testing.assert_allclose(found[place], expected, rtol=1e-6, atol=1e-7)


_MESHES = {
  "fsdp": (1, 8, 1, 1),
  "all": (1, 2, 2, 2),
  "data": (2, 2, 2, 1),
}


@functools.cache
def _on(mesh_sizes, rows_of_batch):
  """(mesh, embeddings, gradient of the table, HLO) of one lookup."""
  rng = np.random.default_rng(1)
  table = rng.normal(size=(256, 4)).astype(np.float32)
  rows = rng.integers(-1, 256, (rows_of_batch, 6, 2)).astype(np.int32)
  weights = rng.normal(size=(rows_of_batch, 6, 4)).astype(np.float32)

  def loss(table, rows, weights):
    found = id_table.sum_of_rows(table, rows)
    return jnp.sum(found * weights), found

  mesh = partitioning.make_mesh(config_lib.MeshConfig(*mesh_sizes))
  with jax.set_mesh(mesh):
    whole = partitioning.replicated(mesh)
    over_batch = partitioning.batch_sharding(mesh)
    if rows_of_batch % partitioning.shards("batch"):
      over_batch = whole
    place = NamedSharding(mesh, PartitionSpec("fsdp"))
    step = jax.jit(
      jax.grad(loss, has_aux=True),
      in_shardings=(place, over_batch, over_batch),
      out_shardings=(place, whole),
    ).lower(table, rows, weights).compile()  # fmt: skip
    gradient, found = step(table, rows, weights)
  expected = np.zeros((rows_of_batch, 6, 4))
  expected_gradient = np.zeros((256, 4))
  for b, s, n in np.ndindex(rows.shape):
    if rows[b, s, n] >= 0:
      expected[b, s] += table[rows[b, s, n]]
      expected_gradient[rows[b, s, n]] += weights[b, s]
  return found, expected, gradient, expected_gradient, step.as_text()


@pytest.mark.parametrize("mesh", _MESHES)
@pytest.mark.parametrize("rows_of_batch", [8, 3])
def test_a_sharded_table_reads_and_learns_as_loops_say(mesh, rows_of_batch):
  """Also where the batch does not divide over the mesh."""
  found, expected, gradient, expected_gradient, _ = _on(
    _MESHES[mesh], rows_of_batch
  )
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(gradient, expected_gradient, rtol=1e-5, atol=1e-6)


def test_no_device_ever_holds_the_whole_table():
  """Of 8 devices: neither the table of 256 × 4 nor its gradient."""
  text = _on(_MESHES["fsdp"], 8)[-1]
  assert re.search(r"f32\[32,4\]", text)
  assert not re.search(r"f32\[256,4\]", text)
