"""K-means against brute force, and one device against eight."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax import balanced_kmeans, kmeans


def points(seed: int, rows: int = 60, width: int = 5) -> np.ndarray:
  return (
    np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
  )


def distances(x: np.ndarray, c: np.ndarray) -> np.ndarray:
  return np.square(x[:, None].astype(np.float64) - c[None]).sum(-1)


def everyone(x: np.ndarray) -> jax.Array:
  return jnp.ones(len(x), bool)


@pytest.mark.parametrize("max_elements", [1 << 20, 70])
def test_assign_is_the_nearest_in_any_chunking(max_elements):
  x, c = points(0), points(1, 7)
  codes, squared = kmeans.assign(x, c, max_elements=max_elements)
  expected = distances(x, c)
  np.testing.assert_array_equal(codes, expected.argmin(1))
  np.testing.assert_allclose(squared, expected.min(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("max_elements", [1 << 20, 70])
def test_plain_step_moves_to_means_and_ignores_padding(max_elements):
  x, c = points(2), points(3, 4)
  valid = np.arange(60) < 50
  x[50:] = 100.0
  updated, codes, _ = kmeans.plain_step(
    x, c, jnp.array(valid), max_elements=max_elements
  )
  nearest = distances(x, c).argmin(1)
  for k in range(4):
    members = x[valid & (nearest == k)]
    assert len(members)
    np.testing.assert_allclose(updated[k], members.mean(0), atol=1e-5)


def test_empty_clusters_take_the_farthest_points():
  x = points(4)
  c = np.concatenate([x[:2], np.full((2, 5), 50.0, np.float32)])
  updated, _, squared = kmeans.plain_step(x, c, everyone(x))
  far = np.argsort(-np.asarray(squared))[:2]
  np.testing.assert_array_equal(updated[2:], x[far])


def test_fit_finds_separated_clusters_and_stops():
  centres = 20 * points(5, 6)
  x = np.repeat(centres, 10, axis=0) + 0.1 * points(6, 60)
  found = kmeans.fit(x, 6, jax.random.key(0), iterations=50)
  codes = np.asarray(found.codes).reshape(6, 10)
  assert (codes == codes[:, :1]).all()
  assert len(set(codes[:, 0].tolist())) == 6
  assert int(found.iterations) < 10
  again = kmeans.fit(x, 6, jax.random.key(0), iterations=50)
  np.testing.assert_array_equal(found.centroids, again.centroids)


def test_fit_is_a_fixed_point_of_lloyd():
  x = points(7)
  found = kmeans.fit(x, 5, jax.random.key(1), iterations=100)
  nearest = distances(x, np.asarray(found.centroids)).argmin(1)
  np.testing.assert_array_equal(found.codes, nearest)
  means = [x[nearest == k].mean(0) for k in range(5)]
  np.testing.assert_allclose(found.centroids, means, atol=1e-5)


def test_plus_plus_draws_rows_that_differ():
  x = np.repeat(points(8, 5), 12, axis=0)
  drawn = kmeans.plus_plus_init(x, 5, jax.random.key(0), everyone(x))
  assert len(np.unique(np.asarray(drawn), axis=0)) == 5


def test_plus_plus_starts_lower_than_random():
  centres = 20 * points(9, 8)
  x = np.repeat(centres, 8, axis=0) + points(10, 64)

  def loss(init):
    runs = [init(x, 8, jax.random.key(s), everyone(x)) for s in range(8)]
    return np.mean([distances(x, np.asarray(c)).min(1).mean() for c in runs])

  assert loss(kmeans.plus_plus_init) < 0.7 * loss(kmeans.random_init)


def greedy(x, c, capacity):
  """All pairs from the shortest on, as the docstring says."""
  squared = np.asarray(kmeans.squared_distances(jnp.array(x), jnp.array(c)))
  room, codes = [capacity] * len(c), np.full(len(x), -1)
  for pair in np.argsort(squared, axis=None, kind="stable"):
    i, k = divmod(int(pair), len(c))
    if codes[i] < 0 and room[k]:
      codes[i], room[k] = k, room[k] - 1
  return codes


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.floats(1.0, 2.0), st.booleans())
def test_capped_assign_is_greedy_by_distance(seed, slack, duplicates):
  x, c = points(seed, 40, 2), points(seed + 1, 6, 2)
  if duplicates:
    x[::2] = x[0]
  capacity = math.ceil(slack * 40 / 6)
  codes, _ = balanced_kmeans.capped_assign(x, c, capacity, everyone(x))
  assert np.bincount(codes, minlength=6).max() <= capacity
  np.testing.assert_array_equal(codes, greedy(x, c, capacity))


def test_capped_assign_chunked_and_padded_is_the_same():
  x, c = points(11), points(12, 6)
  codes, _ = balanced_kmeans.capped_assign(x, c, 11, everyone(x))
  padded = np.concatenate([x, np.zeros((4, 5), np.float32)])
  valid = jnp.arange(64) < 60
  chunked, _ = balanced_kmeans.capped_assign(
    padded, c, 11, valid, max_elements=50
  )
  np.testing.assert_array_equal(chunked[:60], codes)


def test_capped_fit_never_exceeds_its_capacity():
  x = points(13) ** 3
  found = balanced_kmeans.capped_fit(x, 7, jax.random.key(0), 9)
  assert np.bincount(found.codes, minlength=7).max() <= 9
  free = kmeans.fit(x, 7, jax.random.key(0))
  assert np.bincount(free.codes, minlength=7).max() > 9


@pytest.mark.parametrize("num_codes", [6, 7, 60])
def test_balanced_sizes_differ_by_at_most_one(num_codes):
  x = points(14) ** 3
  found = balanced_kmeans.balanced_fit(
    x, num_codes, jax.random.key(0), iterations=5
  )
  sizes = np.bincount(found.codes, minlength=num_codes)
  assert sizes.sum() == 60
  assert sizes.max() - sizes.min() <= (60 % num_codes > 0)
  means = [x[np.asarray(found.codes) == k].mean(0) for k in range(num_codes)]
  np.testing.assert_allclose(found.centroids, means, atol=1e-4)


def test_balanced_assign_follows_algorithm_1():
  x, c = points(15, 23), points(16, 4)
  order = np.array([2, 0, 3, 1], np.int32)
  codes, _ = balanced_kmeans.balanced_assign(
    x, c, jnp.array(order), everyone(x)
  )
  left, expected = list(range(23)), np.zeros(23, int)
  for turn, k in enumerate(order):
    size = 23 // 4 + (turn < 23 % 4)
    left.sort(key=lambda i: distances(x, c)[i, k])
    expected[left[:size]] = k
    left = left[size:]
  np.testing.assert_array_equal(codes, expected)


@pytest.mark.parametrize("kind", ["none", "equal", "capped"])
def test_sharded_fit_equals_one_device(kind):
  x = points(17, 61)
  fits = {
    "none": kmeans.fit,
    "equal": balanced_kmeans.balanced_fit,
    "capped": lambda *args, **kw: balanced_kmeans.capped_fit(
      *args[:3], 9, *args[3:], **kw
    ),
  }
  mesh = jax.make_mesh(
    (8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,)
  )
  padded = np.pad(x, ((0, 3), (0, 0)))
  valid = np.arange(64) < 61
  sharded, sharded_valid = kmeans.shard(x, mesh)
  assert len(sharded.sharding.device_set) == 8
  key = jax.random.key(2)
  many = fits[kind](sharded, 8, key, sharded_valid, iterations=6)
  one = fits[kind](jnp.array(padded), 8, key, jnp.array(valid), iterations=6)
  np.testing.assert_array_equal(many.codes, one.codes)
  np.testing.assert_allclose(many.centroids, one.centroids, atol=1e-5)


def test_more_clusters_than_points_is_refused():
  with pytest.raises(ValueError, match="9 clusters of 5 points"):
    kmeans.fit(points(0, 5), 9, jax.random.key(0))
  with pytest.raises(ValueError, match="unknown init 'best'"):
    kmeans.fit(points(0, 5), 2, jax.random.key(0), init="best")
