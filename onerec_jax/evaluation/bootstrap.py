"""Paired bootstrap over users: intervals for means and for differences.

A user's queries share a history and a taste, so they are drawn together:
resampling queries one by one would give intervals too narrow wherever a user
has several. Two models measured on the same queries are resampled with the
same draws (paired), so what is common to both cancels.
"""

import dataclasses

import numpy as np
from jaxtyping import Float, Int

RESAMPLES = 1000
LEVEL = 0.95
# Draws held at once: 32 MB of weights, whatever the number of users.
_BLOCK = 1 << 22


@dataclasses.dataclass(frozen=True)
class Interval:
  """A mean over queries and its percentile interval.

  Attributes:
    mean: of the sample itself.
    low: lower end.
    high: upper end.
    above_zero: share of resamples whose mean is above 0.
  """

  mean: float
  low: float
  high: float
  above_zero: float


def resampled_means(
  values: Float[np.ndarray, "Q M"],
  users: Int[np.ndarray, "Q"],
  *,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> Float[np.ndarray, "R M"]:
  """Means over queries when the users are drawn again with replacement.

  mean_r = Σ_u w_ru s_u / Σ_u w_ru n_u, with s_u the sum of a user's values,
  n_u their number and w_r ~ Multinomial(U, 1/U); the same draws for all M
  columns.

  Args:
    values: [Q, M] per-query metrics.
    users: [Q] the user of each query, any integers.
    resamples: R.
    seed: the draws are a pure function of (seed, users, resamples).

  Returns:
    [R, M] float64.

  Raises:
    ValueError: no queries.
  """
  if not len(values):
    raise ValueError("nothing to resample: there are no queries")
  _, owner = np.unique(users, return_inverse=True)
  number = np.bincount(owner).astype(np.float64)
  num_users = len(number)
  # Distance from the mean: exact for constant columns, and no cancellation.
  centre = values.mean(axis=0, dtype=np.float64)
  sums = np.stack(
    [
      np.bincount(owner, weights=column)
      for column in (values - centre[None, :]).T
    ],
    axis=1,
  )
  rng = np.random.default_rng(seed)
  block = max(1, _BLOCK // num_users)
  means = []
  for start in range(0, resamples, block):
    rows = min(block, resamples - start)
    drawn = rng.integers(num_users, size=(rows, num_users))
    drawn += np.arange(rows)[:, None] * num_users
    weight = np.bincount(drawn.ravel(), minlength=rows * num_users)
    weight = weight.reshape(rows, num_users).astype(np.float64)
    means.append((weight @ sums) / (weight @ number)[:, None])
  return np.concatenate(means) + centre[None, :]


def intervals(
  values: Float[np.ndarray, "Q M"],
  users: Int[np.ndarray, "Q"],
  *,
  level: float = LEVEL,
  resamples: int = RESAMPLES,
  seed: int = 0,
) -> list[Interval]:
  """Percentile bootstrap intervals of means over queries, one a column.

  For the difference of two models, give the per-query differences.

  Args:
    values: [Q, M] per-query metrics, or differences of two models' metrics.
    users: [Q] the user of each query.
    level: of the intervals.
    resamples: how many.
    seed: of the draws, which all columns share.

  Returns:
    M means with their intervals.

  Raises:
    ValueError: no queries, or the level is not between 0 and 1.
  """
  if not 0.0 < level < 1.0:
    raise ValueError(f"the level must lie between 0 and 1, not {level}")
  means = resampled_means(values, users, resamples=resamples, seed=seed)
  ends = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
  centre = values.mean(axis=0, dtype=np.float64)
  above = np.mean(means > 0, axis=0)
  return [Interval(*map(float, row)) for row in zip(centre, *ends, above)]
