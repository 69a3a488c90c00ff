"""K-means in JAX, on one device or many; balanced ones: balanced_kmeans.py.

Points may be sharded along their first axis (`shard`): every step is written
so that GSPMD keeps them so, and only [I] vectors and [K, D] sums travel.
Distances are computed in chunks, so no [I, K] matrix has to fit in memory.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

MAX_ELEMENTS = 1 << 26
"""Distances held at once (float32: 256 MB over all devices)."""


class Clusters(NamedTuple):
  """The result of a fit.

  Attributes:
    centroids: [K, D].
    codes: [I] cluster of each point.
    distances: [I] squared distance of each point to its centroid.
    iterations: sweeps made.
  """

  centroids: Float[Array, "K D"]
  codes: Int[Array, "I"]
  distances: Float[Array, "I"]
  iterations: Int[Array, ""]


def shard(
  points: Float[np.ndarray, "I D"], mesh: jax.sharding.Mesh, axis: str = "data"
) -> tuple[Float[Array, "I2 D"], Bool[Array, "I2"]]:
  """Puts points on a mesh axis.

  Args:
    points: [I, D] on the host.
    mesh: the devices.
    axis: the mesh axis that splits the points.

  Returns:
    The points, padded with zero rows to a multiple of the axis, and which
    rows are real.
  """
  rows = points.shape[0]
  padded = math.ceil(rows / mesh.shape[axis]) * mesh.shape[axis]
  points = np.pad(points, ((0, padded - rows), (0, 0)))
  by_rows = jax.sharding.NamedSharding(mesh, jax.P(axis))
  return (
    jax.device_put(points, by_rows),
    jax.device_put(np.arange(padded) < rows, by_rows),
  )


def split(x: Array, chunks: int) -> Array:
  """[I, …] → [chunks, I / chunks, …], zero-padded.

  A chunk takes every chunks-th row, not a run of rows: the major part of the
  row axis, along which devices split it, then stays whole in each chunk.
  """
  rows = math.ceil(x.shape[0] / chunks)
  pad = [(0, rows * chunks - x.shape[0])] + [(0, 0)] * (x.ndim - 1)
  x = jnp.pad(x, pad).reshape(rows, chunks, *x.shape[1:])
  return jnp.moveaxis(x, 1, 0)


def join(x: Array, rows: int) -> Array:
  """The inverse of `split`."""
  return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])[:rows]


def num_chunks(rows: int, codes: int, max_elements: int) -> int:
  """Into how many pieces points go, so that their distances fit in memory."""
  return max(1, math.ceil(rows * codes / max_elements))


def squared_distances(
  points: Float[Array, "I D"], centroids: Float[Array, "K D"]
) -> Float[Array, "I K"]:
  """Of every point to every centroid, never below 0."""
  # Full float32 products: the fast lower-precision ones of accelerators turn
  # near ties, and the later levels work on residuals that are small already.
  product = jnp.einsum(
    "id,kd->ik", points, centroids, precision=jax.lax.Precision.HIGHEST
  )
  norms = jnp.sum(points**2, axis=1, keepdims=True)
  return jnp.maximum(norms - 2 * product + jnp.sum(centroids**2, 1)[None], 0)


def arg_min(distances: Float[Array, "I K"]) -> tuple[Array, Array]:
  """First index of the least element and the element, along axis 1."""
  # Two plain reductions: XLA's argmin carries pairs, which CPUs do slowly.
  least = jnp.min(distances, axis=1, keepdims=True)
  column = jax.lax.broadcasted_iota(jnp.int32, distances.shape, 1)
  code = jnp.min(
    jnp.where(distances <= least, column, distances.shape[1]), axis=1
  )
  return jnp.minimum(code, distances.shape[1] - 1), least[:, 0]


@functools.partial(jax.jit, static_argnames="max_elements")
def assign(
  points: Float[Array, "I D"],
  centroids: Float[Array, "K D"],
  *,
  max_elements: int = MAX_ELEMENTS,
) -> tuple[Int[Array, "I"], Float[Array, "I"]]:
  """The nearest centroid of each point (the lowest index among ties).

  Args:
    points: [I, D].
    centroids: [K, D].
    max_elements: bound on the distances held at once.

  Returns:
    Codes [I] (int32) and squared distances [I].
  """
  rows = points.shape[0]
  chunks = num_chunks(rows, centroids.shape[0], max_elements)
  codes, distances = jax.lax.map(
    lambda chunk: arg_min(squared_distances(chunk, centroids)),
    split(points, chunks),
  )
  return join(codes, rows), join(distances, rows)


def _update(
  points: Float[Array, "I D"],
  codes: Int[Array, "I"],
  distances: Float[Array, "I"],
  valid: Bool[Array, "I"],
  num_codes: int,
  max_elements: int,
) -> Float[Array, "K D"]:
  """Cluster means; an empty cluster takes one of the farthest points."""
  chunks = num_chunks(points.shape[0], num_codes, max_elements)

  def add(totals: tuple[Array, Array], chunk: tuple) -> tuple[tuple, None]:
    x, code, real = chunk
    # A product with one-hot rows, not a scatter: it splits over devices.
    one_hot = jax.nn.one_hot(code, num_codes) * real[:, None]
    sums = jnp.einsum(
      "ik,id->kd", one_hot, x, precision=jax.lax.Precision.HIGHEST
    )
    return (totals[0] + sums, totals[1] + jnp.sum(one_hot, axis=0)), None

  start = (jnp.zeros((num_codes, points.shape[1])), jnp.zeros((num_codes,)))
  (sums, counts), _ = jax.lax.scan(
    add,
    start,
    (
      split(points, chunks),
      split(codes, chunks),
      split(valid.astype(jnp.float32), chunks),
    ),
  )
  means = sums / jnp.maximum(counts, 1)[:, None]
  empty = counts == 0

  def repair(means: Array) -> Array:
    _, far = jax.lax.top_k(jnp.where(valid, distances, -1.0), num_codes)
    order = jnp.cumsum(empty) - 1
    return jnp.where(empty[:, None], points[far[order]], means)

  return jax.lax.cond(jnp.any(empty), repair, lambda means: means, means)


@functools.partial(jax.jit, static_argnames="max_elements")
def plain_step(
  points: Float[Array, "I D"],
  centroids: Float[Array, "K D"],
  valid: Bool[Array, "I"],
  *,
  max_elements: int = MAX_ELEMENTS,
) -> tuple[Float[Array, "K D"], Int[Array, "I"], Float[Array, "I"]]:
  """One Lloyd step.

  Args:
    points: [I, D].
    centroids: [K, D].
    valid: [I] false rows are padding and do not count.
    max_elements: bound on the distances held at once.

  Returns:
    New centroids [K, D] (an empty cluster takes one of the points that lie
    farthest from their own centroid), and the codes and squared distances
    [I] to the old ones.
  """
  codes, distances = assign(points, centroids, max_elements=max_elements)
  updated = _update(
    points, codes, distances, valid, centroids.shape[0], max_elements
  )
  return updated, codes, distances


@functools.partial(jax.jit, static_argnames="num_codes")
def random_init(
  points: Float[Array, "I D"],
  num_codes: int,
  key: PRNGKeyArray,
  valid: Bool[Array, "I"],
) -> Float[Array, "K D"]:
  """K different rows of the points, at random."""
  noise = jnp.where(valid, jax.random.uniform(key, valid.shape), -1.0)
  return points[jax.lax.top_k(noise, num_codes)[1]]


@functools.partial(jax.jit, static_argnames="num_codes")
def plus_plus_init(
  points: Float[Array, "I D"],
  num_codes: int,
  key: PRNGKeyArray,
  valid: Bool[Array, "I"],
) -> Float[Array, "K D"]:
  """K-means++: rows drawn with probability ∝ squared distance to those drawn.

  Where fewer than K rows differ, repeats are drawn at random.
  """

  def draw(log_weights: Array, k: Array) -> Array:
    # Gumbel noise, not a cumulative sum: the draw is an arg-max, which is the
    # same however the rows are split over devices.
    noise = jax.random.gumbel(jax.random.fold_in(key, k), valid.shape)
    return points[jnp.argmax(jnp.where(valid, log_weights + noise, -jnp.inf))]

  def body(k: Array, state: tuple) -> tuple:
    centroids, nearest = state
    # The offset keeps zero distances in the running when all are zero.
    centroid = draw(jnp.log(nearest + 1e-30), k)
    distance = jnp.sum((points - centroid[None]) ** 2, axis=1)
    return centroids.at[k].set(centroid), jnp.minimum(nearest, distance)

  first = draw(jnp.zeros(valid.shape), jnp.int32(0))
  nearest = jnp.sum((points - first[None]) ** 2, axis=1)
  centroids = jnp.zeros((num_codes, points.shape[1])).at[0].set(first)
  return jax.lax.fori_loop(1, num_codes, body, (centroids, nearest))[0]


def sweeps(
  points: Array,
  centroids: Array,
  valid: Array,
  key: Array,
  iterations: int,
  assign_once: Callable[[Array, Array], tuple[Array, Array]],
  max_elements: int,
) -> Clusters:
  """Alternates assignment and means until no code changes."""

  def body(state: tuple) -> tuple:
    clusters, _ = state
    sweep_key = jax.random.fold_in(key, clusters.iterations)
    codes, distances = assign_once(clusters.centroids, sweep_key)
    changed = jnp.any((codes != clusters.codes) & valid)
    centroids = _update(
      points, codes, distances, valid, clusters.centroids.shape[0], max_elements
    )
    sweep = clusters.iterations + 1
    return Clusters(centroids, codes, distances, sweep), changed

  rows = points.shape[0]
  start = Clusters(
    centroids,
    jnp.full((rows,), -1, jnp.int32),
    jnp.zeros((rows,)),
    jnp.int32(0),
  )
  return jax.lax.while_loop(
    lambda state: state[1] & (state[0].iterations < iterations),
    body,
    (start, jnp.array(True)),
  )[0]


_INITS = {"k-means++": plus_plus_init, "random": random_init}


def checked_start(
  points: Array, num_codes: int, valid: Array | None, init: str
) -> tuple[Array, Callable]:
  """The default mask and the initialiser, after checks."""
  if num_codes > points.shape[0]:
    raise ValueError(
      f"{num_codes} clusters of {points.shape[0]} points; ask for fewer codes"
    )
  if init not in _INITS:
    raise ValueError(f"unknown init {init!r}; known: {sorted(_INITS)}")
  if valid is None:
    valid = jnp.ones((points.shape[0],), bool)
  return valid, _INITS[init]


@functools.partial(
  jax.jit, static_argnames=("num_codes", "iterations", "init", "max_elements")
)
def fit(
  points: Float[Array, "I D"],
  num_codes: int,
  key: PRNGKeyArray,
  valid: Bool[Array, "I"] | None = None,
  *,
  iterations: int = 20,
  init: str = "k-means++",
  max_elements: int = MAX_ELEMENTS,
) -> Clusters:
  """Plain k-means (OneRec-V1, arXiv 2506.13695 §2.1: RQ-Kmeans, one level).

  Args:
    points: [I, D], possibly sharded along I.
    num_codes: K.
    key: of the initialisation.
    valid: [I] false rows are padding.
    iterations: at most so many sweeps; fewer when no code changes.
    init: `k-means++` or `random` (INFERRED; the report names neither).
    max_elements: bound on the distances held at once.

  Returns:
    Clusters whose codes are the arg-min over the returned centroids.

  Raises:
    ValueError: K exceeds the number of points, or an unknown init.
  """
  valid, initialise = checked_start(points, num_codes, valid, init)
  nearest = functools.partial(assign, points, max_elements=max_elements)
  clusters = sweeps(
    points,
    initialise(points, num_codes, key, valid),
    valid,
    key,
    iterations,
    lambda centroids, key: nearest(centroids),
    max_elements,
  )
  codes, distances = nearest(clusters.centroids)
  return clusters._replace(codes=codes, distances=distances)
