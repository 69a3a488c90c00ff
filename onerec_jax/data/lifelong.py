"""A lifelong history → a few representatives (OneRec-V1 §2.2).

Hierarchical k-means over the item vectors of one user's events: a set of n
events is split into ⌊∛n⌋ clusters, and each cluster again, until none holds
more than M events. A cluster is represented by the event whose item is nearest
to its centre. Sparse features are that event's own, continuous ones are
averaged over the cluster.

INFERRED: M = 20; the largest set is split first, and a set whose clusters would
exceed the cap stays whole, so that the cap cuts no part of a history off; at
least two clusters a split; among equally near events the latest represents;
continuous features are averaged as buckets, which is a geometric mean of
milliseconds. Averaging leaves out what was not recorded.
"""

import heapq
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

from onerec_jax import config as config_lib
from onerec_jax.data import features as features_lib


class Snapshot(NamedTuple):
  """The representatives of what a user did before an event.

  Attributes:
    until: they stand for events before this one.
    event: int32 [R] each representative's place among the user's events,
      ascending.
    size: int32 [R] events of its cluster.
    averages: continuous feature → int32 [R] mean bucket of its cluster.
  """

  until: int
  event: Int[np.ndarray, "R"]
  size: Int[np.ndarray, "R"]
  averages: dict[str, np.ndarray]


def continuous(bucketing: Mapping[str, features_lib.Spec]) -> list[str]:
  """Event features whose buckets have an order, sorted by name.

  Args:
    bucketing: of event features, as in the manifest.
  """
  return sorted(
    name for name, spec in bucketing.items() if spec["kind"] in _ORDERED
  )


_ORDERED = ("log2", "edges")


def compress(
  items: Int[np.ndarray, "n"],
  averaged: Mapping[str, np.ndarray],
  vectors: Float[np.ndarray, "I D"],
  config: config_lib.LifelongConfig,
  cap: int,
) -> Snapshot:
  """The representatives of one history; the same every time.

  Args:
    items: dense item ids of all events so far, oldest first; at least one.
    averaged: continuous feature → int32 [n] buckets, 0 absent.
    vectors: row i is item i + 1.
    config: how.
    cap: the most representatives.
  """
  n = len(items)
  first = max(0, n - config.max_events)
  points = np.asarray(vectors, np.float32)[items[first:] - 1]
  rng = np.random.default_rng([config.seed, n])
  groups = clusters(points, config.max_items, cap, config.iterations, rng)
  labels = np.empty(n - first, np.int64)
  for label, members in enumerate(groups):
    labels[members] = label
  nearest = nearest_to_centres(points, labels)
  order = np.argsort(nearest)
  size = np.bincount(labels)[order].astype(np.int32)
  averages = {
    name: mean_buckets(values[first:], labels)[order]
    for name, values in averaged.items()
  }
  event = (first + nearest[order]).astype(np.int32)
  return Snapshot(n, event, size, averages)


def num_splits(n: int) -> int:
  """⌊∛n⌋, at least 2."""
  root = round(n ** (1 / 3))
  return max(2, root - (root**3 > n))


def clusters(
  points: Float[np.ndarray, "n D"],
  max_items: int,
  cap: int,
  iterations: int,
  rng: np.random.Generator,
) -> list[np.ndarray]:
  """A partition of the points: arrays of row numbers, ascending in each.

  Args:
    points: of the history.
    max_items: M; larger sets are split, unless all their points are one.
    cap: the most sets.
    iterations: of each k-means.
    rng: picks the first centres.
  """
  whole = np.arange(len(points))
  waiting, leaves = [(-len(points), 0, whole)], []
  made = 1
  while waiting:
    _, _, members = heapq.heappop(waiting)
    count = num_splits(len(members))
    total = len(waiting) + len(leaves) + count
    if len(members) <= max_items or total > cap:
      leaves.append(members)
      continue
    codes = _k_means(points[members], count, iterations, rng)
    parts = [members[codes == code] for code in np.unique(codes)]
    if len(parts) == 1:
      leaves.append(members)
      continue
    for part in parts:
      heapq.heappush(waiting, (-len(part), made, part))
      made += 1
  return leaves


def _k_means(
  points: np.ndarray, count: int, iterations: int, rng: np.random.Generator
) -> np.ndarray:
  """Lloyd's algorithm from random points; codes, some perhaps unused."""
  centres = points[rng.choice(len(points), count, replace=False)]
  codes = np.full(len(points), -1)
  one_hot = np.eye(count, dtype=np.float32)
  for _ in range(iterations):
    distances = np.sum(centres**2, axis=1) - 2 * (points @ centres.T)
    new = np.argmin(distances, axis=1)
    if np.array_equal(new, codes):
      break
    codes = new
    # A product with one-hot rows: no scatter is as quick as BLAS.
    sums = one_hot[codes].T @ points
    sizes = np.bincount(codes, minlength=count)[:, None]
    centres = np.where(sizes > 0, sums / np.maximum(sizes, 1), centres)
    centres = centres.astype(np.float32)
  return codes


def nearest_to_centres(
  points: Float[np.ndarray, "n D"], labels: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "R"]:
  """The row nearest to the mean of each label 0, 1, …; the last among ties."""
  by_label = np.argsort(labels, kind="stable")
  starts = np.searchsorted(labels[by_label], np.arange(labels.max() + 1))
  # In float64, so that an item met twice is as near both times.
  wide = points.astype(np.float64)
  sizes = np.bincount(labels)[:, None]
  centres = np.add.reduceat(wide[by_label], starts, axis=0) / sizes
  distances = np.sum((wide - centres[labels]) ** 2, axis=1)
  order = np.lexsort((-np.arange(len(labels)), distances, labels))
  return order[np.searchsorted(labels[order], np.arange(len(sizes)))]


def mean_buckets(
  values: Int[np.ndarray, "n"], labels: Int[np.ndarray, "n"]
) -> Int[np.ndarray, "R"]:
  """The mean of each label's buckets above 0, to the nearest; 0: there is none.

  A mean half way between two buckets goes up.
  """
  present = np.bincount(labels, weights=values > 0)
  sums = np.bincount(labels, weights=values)
  means = np.floor(sums / np.maximum(present, 1) + 0.5)
  return means.astype(np.int32)
