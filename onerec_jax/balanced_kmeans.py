"""K-means whose clusters are of equal or of bounded size; see kmeans.py."""

import functools
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from onerec_jax import kmeans


@functools.partial(jax.jit, static_argnames="max_elements")
def capped_assign(
  points: Float[Array, "I D"],
  centroids: Float[Array, "K D"],
  capacity: int | Int[Array, ""],
  valid: Bool[Array, "I"],
  *,
  max_elements: int = kmeans.MAX_ELEMENTS,
) -> tuple[Int[Array, "I"], Float[Array, "I"]]:
  """Greedy by distance: at most `capacity` points a cluster.

  The result is that of taking all (point, cluster) pairs from the shortest
  on and accepting each whose point is free and whose cluster has room. It is
  computed in parallel by deferred acceptance, which has the same, unique
  outcome because both sides rank by one distance: every point asks the
  nearest cluster still open to it, an over-full cluster keeps its nearest
  `capacity` and from then on is closed beyond the last of them. Ties go to
  the lower point index.

  Args:
    points: [I, D].
    centroids: [K, D].
    capacity: points a cluster may hold; K · capacity must reach I.
    valid: [I] false rows are padding: they get code K - 1 and take no room.
    max_elements: bound on the distances held at once.

  Returns:
    Codes [I] and squared distances [I].
  """
  rows, num_codes = points.shape[0], centroids.shape[0]
  chunks = kmeans.num_chunks(rows, num_codes, max_elements)
  row = jnp.arange(rows, dtype=jnp.int32)
  pieces = kmeans.split(points, chunks), kmeans.split(row, chunks)

  def body(state: tuple) -> tuple:
    limit, last = state[:2]
    codes, distances = _nearest_open(pieces, centroids, limit, last)
    codes, distances = kmeans.join(codes, rows), kmeans.join(distances, rows)
    asked = jnp.where(valid, codes, num_codes)
    asked_sorted, by_distance, by_row = jax.lax.sort(
      (asked, distances, row), num_keys=3
    )
    bounds = jnp.searchsorted(asked_sorted, jnp.arange(num_codes + 1))
    over = jnp.diff(bounds) > capacity
    kept = jnp.minimum(bounds[:-1] + capacity - 1, rows - 1)
    limit = jnp.where(over, by_distance[kept], limit)
    last = jnp.where(over, by_row[kept], last)
    return limit, last, codes, distances, jnp.any(over)

  # The body runs at least once, so that codes and distances are set.
  state = (
    jnp.full((num_codes,), jnp.inf),
    jnp.full((num_codes,), rows, jnp.int32),
    jnp.zeros((rows,), jnp.int32),
    jnp.zeros((rows,)),
    jnp.array(True),
  )
  state = jax.lax.while_loop(lambda state: state[4], body, state)
  codes = jnp.where(valid, state[2], num_codes - 1)
  return codes, state[3]


def _nearest_open(
  pieces: tuple[Array, Array], centroids: Array, limit: Array, last: Array
) -> tuple[Array, Array]:
  """Of pieces (points, rows): the nearest clusters not closed to them yet.

  A cluster takes what is nearer than its limit [K] and, at the limit, rows up
  to its last [K].
  """

  def one(chunk: tuple) -> tuple[Array, Array]:
    distances = kmeans.squared_distances(chunk[0], centroids)
    is_open = (distances < limit[None]) | (
      (distances == limit[None]) & (chunk[1][:, None] <= last[None])
    )
    return kmeans.arg_min(jnp.where(is_open, distances, jnp.inf))

  return jax.lax.map(one, pieces)


@jax.jit
def balanced_assign(
  points: Float[Array, "I D"],
  centroids: Float[Array, "K D"],
  order: Int[Array, "K"],
  valid: Bool[Array, "I"],
) -> tuple[Int[Array, "I"], Float[Array, "I"]]:
  """One sweep of OneRec's Algorithm 1 (arXiv 2502.18965).

  The clusters, one after another, take the nearest w points of those left.
  INFERRED, where K does not divide I: the first I mod K clusters in `order`
  take one more, so that sizes differ by at most one.

  Args:
    points: [I, D].
    centroids: [K, D].
    order: [K] the order in which clusters choose.
    valid: [I] false rows are padding: they get code 0 and take no room.

  Returns:
    Codes [I] and squared distances [I].
  """
  rows, num_codes = points.shape[0], centroids.shape[0]
  width = math.ceil(rows / num_codes)
  num_valid = jnp.sum(valid)
  norms = jnp.sum(points**2, axis=1)

  def take(turn: Array, state: tuple) -> tuple:
    codes, distances, left = state
    centroid = centroids[order[turn]]
    product = jnp.einsum(
      "id,d->i", points, centroid, precision=jax.lax.Precision.HIGHEST
    )
    distance = jnp.maximum(norms - 2 * product + jnp.sum(centroid**2), 0)
    score, chosen = jax.lax.top_k(jnp.where(left, -distance, -jnp.inf), width)
    size = num_valid // num_codes + (turn < num_valid % num_codes)
    mine = jnp.arange(width) < size
    # Rows beyond the size point out of range, and such writes are dropped.
    chosen = jnp.where(mine, chosen, rows)
    return (
      codes.at[chosen].set(order[turn], mode="drop"),
      distances.at[chosen].set(-score, mode="drop"),
      left.at[chosen].set(False, mode="drop"),
    )

  start = (jnp.zeros((rows,), jnp.int32), jnp.zeros((rows,)), valid)
  codes, distances, _ = jax.lax.fori_loop(0, num_codes, take, start)
  return codes, distances


@functools.partial(
  jax.jit, static_argnames=("num_codes", "iterations", "init", "max_elements")
)
def balanced_fit(
  points: Float[Array, "I D"],
  num_codes: int,
  key: PRNGKeyArray,
  valid: Bool[Array, "I"] | None = None,
  *,
  iterations: int = 20,
  init: str = "random",
  max_elements: int = kmeans.MAX_ELEMENTS,
) -> kmeans.Clusters:
  """Balanced k-means: OneRec Algorithm 1 (arXiv 2502.18965), one level.

  INFERRED: the order in which clusters choose is drawn anew each sweep (the
  late ones get what is left), so sweeps rarely repeat exactly and it is
  `iterations` that ends the fit. Arguments and errors as in `kmeans.fit`.

  Returns:
    Clusters of sizes that differ by at most one; centroids are the means of
    their members.
  """
  valid, initialise = kmeans.checked_start(points, num_codes, valid, init)

  def assign_once(centroids: Array, key: Array) -> tuple[Array, Array]:
    order = jax.random.permutation(key, num_codes).astype(jnp.int32)
    return balanced_assign(points, centroids, order, valid)

  start = initialise(points, num_codes, key, valid)
  return kmeans.sweeps(
    points, start, valid, key, iterations, assign_once, max_elements
  )


@functools.partial(
  jax.jit, static_argnames=("num_codes", "iterations", "init", "max_elements")
)
def capped_fit(
  points: Float[Array, "I D"],
  num_codes: int,
  key: PRNGKeyArray,
  capacity: int | Int[Array, ""],
  valid: Bool[Array, "I"] | None = None,
  *,
  iterations: int = 20,
  init: str = "k-means++",
  max_elements: int = kmeans.MAX_ELEMENTS,
) -> kmeans.Clusters:
  """K-means whose clusters hold at most `capacity` points (`capped_assign`).

  Arguments and errors as in `kmeans.fit`; K · capacity must reach the points.

  Returns:
    Clusters; centroids are the means of their members.
  """
  valid, initialise = kmeans.checked_start(points, num_codes, valid, init)

  def assign_once(centroids: Array, key: Array) -> tuple[Array, Array]:
    return capped_assign(
      points, centroids, capacity, valid, max_elements=max_elements
    )

  start = initialise(points, num_codes, key, valid)
  return kmeans.sweeps(
    points, start, valid, key, iterations, assign_once, max_elements
  )
