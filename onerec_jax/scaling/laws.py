"""Scaling laws: loss as a function of parameters and training tokens.

  L(N)    = E + A / N^α                  OneRec-V2 (arXiv 2508.20900) §3
  L(N, D) = E + A / N^α + B / D^β        Chinchilla (arXiv 2203.15556)

N is whatever count of parameters the points carry, D whatever count of
training tokens (or targets): the constants mean nothing without saying which.
Both laws are fitted over (ln E, ln A, α, …) as a log-sum-exp, so that E, A and
B stay positive, with ln N and ln D centred, without which ln A and α are all
but collinear.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from scipy import optimize

from onerec_jax.scaling.points import Points

METHODS = ("least_squares", "huber")
"""`least_squares` on the loss gives OneRec-V2's constants from its table;
`huber` on the log loss is Chinchilla's method, deaf to a few bad runs."""
HUBER_DELTA = 1e-3
"""Residual of the log loss from which the Huber loss grows linearly."""
RESAMPLES = 500
LEVEL = 0.9
POINTS_PER_CONSTANT = 10
"""With so many points a constant, points are resampled; else residuals."""
TOKENS_VARY = 2.0
"""Largest over smallest number of tokens from which L(N, D) is fitted."""

_EXPONENTS = (0.05, 0.15, 0.3, 0.5, 0.8, 1.2)
_STARTS = 5


class Interval(NamedTuple):
  """Percentiles of a constant over resamples."""

  low: float
  high: float


@dataclasses.dataclass(frozen=True)
class Law:
  """A fitted law.

  Attributes:
    method: one of METHODS.
    constants: E, A, alpha and, where tokens vary, B, beta.
    intervals: of each constant, by the bootstrap.
    rounding_intervals: of each constant over losses that print the same;
      empty where the losses are exact.
    level: of the intervals.
    resampling: `residuals` or `points`.
    resampled: [R, C] constants of every resample, in the order of
      `constants`.
    residuals: [P] measured − predicted loss.
    r_squared: share of the loss's variance explained.
  """

  method: str
  constants: dict[str, float]
  intervals: dict[str, Interval]
  rounding_intervals: dict[str, Interval]
  level: float
  resampling: str
  resampled: Float[np.ndarray, "R C"]
  residuals: Float[np.ndarray, "P"]
  r_squared: float

  def predict(
    self,
    parameters: Float[np.ndarray, "P"],
    tokens: Float[np.ndarray, "P"] | None = None,
  ) -> Float[np.ndarray, "P"]:
    """Loss at N parameters (and D tokens, which L(N, D) needs).

    Raises:
      ValueError: tokens given to L(N), or missing from L(N, D).
    """
    values = np.array([list(self.constants.values())])
    return self._evaluate(values, parameters, tokens)[0]

  def band(
    self,
    parameters: Float[np.ndarray, "P"],
    tokens: Float[np.ndarray, "P"] | None = None,
  ) -> tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"]]:
    """Percentile interval of the fitted loss at each point, low and high.

    Of the curve, not of a new run: a run's own noise comes on top.
    """
    losses = self._evaluate(self.resampled, parameters, tokens)
    tail = (1 - self.level) / 2
    low, high = np.quantile(losses, [tail, 1 - tail], axis=0)
    return low, high

  def compute_optimal(
    self, flops: Float[np.ndarray, "P"], flops_per_pair: float = 6.0
  ) -> tuple[Float[np.ndarray, "P"], Float[np.ndarray, "P"]]:
    """N and D of the lowest loss at budgets C = flops_per_pair · N · D.

    N = G (C/k)^(β/(α+β)), D = (C/k)^(α/(α+β)) / G, G = (αA / βB)^(1/(α+β)).

    Args:
      flops: C.
      flops_per_pair: k: training FLOPs for a parameter and a token. 6 where D
        counts the tokens that pass the blocks; for a lazy decoder with L codes
        a target and D in targets it is 6·L.

    Raises:
      ValueError: the law has no tokens.
    """
    if "beta" not in self.constants:
      raise ValueError(
        "L(N) has no optimum: it was fitted at one number of tokens; add runs "
        "that vary the tokens and fit L(N, D)"
      )
    c = self.constants
    scale = (c["alpha"] * c["A"] / (c["beta"] * c["B"])) ** (
      1 / (c["alpha"] + c["beta"])
    )
    share = c["beta"] / (c["alpha"] + c["beta"])
    pairs = flops / flops_per_pair
    return scale * pairs**share, pairs ** (1 - share) / scale

  def record(self) -> dict[str, Any]:
    """What a JSON file keeps: all but the resamples."""
    return {
      "method": self.method,
      "constants": self.constants,
      "level": self.level,
      "resampling": self.resampling,
      "intervals": {k: list(v) for k, v in self.intervals.items()},
      "rounding_intervals": {
        k: list(v) for k, v in self.rounding_intervals.items()
      },
      "r_squared": self.r_squared,
      "residuals": self.residuals.tolist(),
    }

  def _evaluate(self, constants, parameters, tokens):
    if (tokens is None) == ("beta" in self.constants):
      raise ValueError(
        f"a law of {list(self.constants)} is asked for a loss "
        f"{'without' if tokens is None else 'with'} tokens"
      )
    loss = constants[:, :1] + 0.0 * parameters[None, :]
    for column, values in enumerate((parameters, tokens)):
      if values is not None:
        scale, exponent = constants[:, 1 + 2 * column : 3 + 2 * column].T
        # In logarithms: A may be too large a number where A / N^α is none.
        log_term = np.log(scale)[:, None] - exponent[:, None] * np.log(values)
        loss = loss + np.exp(log_term)
    return loss


def fit(
  points: Points,
  method: str = "least_squares",
  *,
  resamples: int = RESAMPLES,
  level: float = LEVEL,
  seed: int = 0,
) -> Law:
  """Fits L(N, D) where tokens vary by TOKENS_VARY or more, L(N) otherwise.

  The bootstrap draws points where there are POINTS_PER_CONSTANT a constant.
  With fewer, a draw of points often leaves too few sizes to fit anything; so
  the sizes stay, as whoever chose them meant them to, and residuals are drawn
  and added to the fitted curve. Residuals of P points under C fitted constants
  are too small by √(1 − C/P), and their spread is itself known to only P − C
  degrees of freedom; each resample's residuals are scaled by √(P / χ²), with
  χ² of P − C degrees drawn anew, as in a t-interval.

  Args:
    points: at least one more than there are constants.
    method: one of METHODS.
    resamples: of the bootstrap, and of losses that print the same.
    level: of the intervals.
    seed: the result is a pure function of it and the other arguments.

  Raises:
    ValueError: an unknown method; too few points or sizes; tokens that follow
      parameters, so that no fit can tell their terms apart; a loss that does
      not fall, or falls as one step.
  """
  if method not in METHODS:
    raise ValueError(f"method {method!r}: want one of {list(METHODS)}")
  x, centre, names = _design(points)
  start = _fit_from_grid(x, points.loss, method)
  rng = np.random.default_rng(seed)
  fitted = np.exp(_log_loss(start, x)[0])
  by_points = len(x) >= POINTS_PER_CONSTANT * len(names)
  resampled = []
  for _ in range(resamples):
    draw = _draw(rng, x, points.loss, fitted, len(names), method, by_points)
    resampled.append(_constants(_solve(start, *draw, method)[0], centre))
  _check_bounded(np.array(resampled), level)
  printed = []
  for _ in range(resamples if points.rounding else 0):
    shift = rng.uniform(-points.rounding, points.rounding, len(x))
    solved, _ = _solve(start, x, points.loss + shift, method)
    printed.append(_constants(solved, centre))
  residuals = points.loss - fitted
  return Law(
    method=method,
    constants=dict(zip(names, _constants(start, centre).tolist())),
    intervals=_intervals(names, np.array(resampled), level),
    rounding_intervals=_intervals(names, np.array(printed), level),
    level=level,
    resampling="points" if by_points else "residuals",
    resampled=np.array(resampled),
    residuals=residuals,
    r_squared=float(1 - residuals.var() / points.loss.var()),
  )


def fit_each(
  found: Mapping[str, Points], method: str = "least_squares"
) -> tuple[dict[str, tuple[Points, Law]], list[str]]:
  """`fit` of each architecture; one that cannot be fitted stops no other.

  Returns:
    Name → points and law, and what was said of those that have none.
  """
  fits, refused = {}, []
  for name, points in found.items():
    try:
      fits[name] = points, fit(points, method)
    except ValueError as error:
      refused.append(f"{name}: {error}")
  return fits, refused


def _check_bounded(resampled, level):
  """Refuses constants whose intervals would have no end."""
  unbounded = ~np.isfinite(resampled).all(axis=-1)
  if unbounded.sum() > (1 - level) / 2 * len(resampled):
    raise ValueError(
      f"in {unbounded.sum()} of {len(resampled)} resamples the constants grow "
      "beyond all numbers, as where the loss falls in one step and is flat "
      "around it, which is no power law; train sizes on both sides of the step"
    )


def _draw(rng, x, loss, fitted, constants, method, by_points):
  """One resample of the bootstrap: designs and losses; see `fit`."""
  if by_points:
    rows = rng.integers(len(x), size=len(x))
    return x[rows], loss[rows]
  return x, _residual_draw(rng, fitted, loss, constants, method)


def _design(points):
  """Centred logarithms [P, 1 or 2], their centres, the constants' names."""
  columns = [("parameters", points.parameters)]
  tokens = points.tokens
  if tokens is not None and tokens.max() >= TOKENS_VARY * tokens.min():
    columns.append(("tokens", tokens))
  names = ("E", "A", "alpha", "B", "beta")[: 1 + 2 * len(columns)]
  law = "L(N)" if len(columns) == 1 else "L(N, D)"
  if len(points.loss) <= len(names):
    raise ValueError(
      f"{len(points.loss)} points are too few for {law}: its {len(names)} "
      f"constants and an interval need at least {len(names) + 1}; train more "
      "sizes"
    )
  for name, values in columns:
    if len(np.unique(values)) < 3:
      raise ValueError(
        f"{law} needs at least 3 different numbers of {name}, there are "
        f"{len(np.unique(values))}: a curve with a floor has three constants"
      )
  x = np.log(np.stack([values for _, values in columns], axis=1))
  centre = x.mean(axis=0)
  x = x - centre[None, :]
  if np.linalg.matrix_rank(x, tol=1e-6 * np.abs(x).max()) < x.shape[1]:
    raise ValueError(
      "tokens are a power of parameters in all points, so the two terms of "
      "L(N, D) cannot be told apart; add a run that breaks the pattern, or "
      "leave the tokens out and fit L(N)"
    )
  return x, centre, names


def _log_loss(p, x):
  """Log loss [P] and its gradient [P, C] by p = (ln E, ln A′, α, ln B′, β)."""
  terms = np.concatenate(
    [np.full((len(x), 1), p[0]), p[1::2][None, :] - p[2::2][None, :] * x],
    axis=1,
  )
  total = np.logaddexp.reduce(terms, axis=1)
  share = np.exp(terms - total[:, None])
  gradient = np.empty((len(x), len(p)))
  gradient[:, 0] = share[:, 0]
  gradient[:, 1::2] = share[:, 1:]
  gradient[:, 2::2] = -share[:, 1:] * x
  return total, gradient


def _solve(start, x, loss, method):
  """Constants of the nearest minimum and its value."""
  log_loss = np.log(loss)

  def residuals(p):
    return np.exp(_log_loss(p, x)[0]) - loss

  def jacobian(p):
    total, gradient = _log_loss(p, x)
    return np.exp(total)[:, None] * gradient

  def huber(p):
    total, gradient = _log_loss(p, x)
    r = (total - log_loss) / HUBER_DELTA
    slope = np.clip(r, -1.0, 1.0)
    value = np.sum(np.where(np.abs(r) <= 1, r**2 / 2, np.abs(r) - 0.5))
    return value, (slope / HUBER_DELTA) @ gradient

  # Constants on their way to infinity (no floor in sight) overflow at last.
  with np.errstate(over="ignore", invalid="ignore"):
    if method == "huber":
      found = optimize.minimize(huber, start, jac=True, method="BFGS")
      return found.x, float(found.fun)
    found = optimize.least_squares(
      residuals, start, jacobian, method="lm", xtol=1e-10, ftol=1e-10
    )
    return found.x, float(found.cost)


def _fit_from_grid(x, loss, method):
  """The best minimum from the best starts of a grid over the exponents.

  Raises:
    ValueError: the best fit has a loss that does not fall.
  """
  grids = np.meshgrid(*[_EXPONENTS] * x.shape[1], indexing="ij")
  starts = []
  for exponents in np.stack([g.ravel() for g in grids], axis=1):
    # Given the exponents the rest is linear.
    powers = np.exp(-exponents[None, :] * x)
    scales, misfit = optimize.nnls(
      np.concatenate([np.ones((len(x), 1)), powers], axis=1), loss
    )
    # A term that this exponent does not want starts small, not at log 0.
    scales = np.log(np.maximum(scales, 1e-3 * loss.min()))
    start = np.empty(1 + 2 * x.shape[1])
    start[0], start[1::2], start[2::2] = scales[0], scales[1:], exponents
    starts.append((misfit, start))
  starts.sort(key=lambda pair: pair[0])
  solved = [_solve(p, x, loss, method) for _, p in starts[:_STARTS]]
  best, _ = min(solved, key=lambda pair: pair[1])
  if not np.all(best[2::2] > 0):
    raise ValueError(
      "the loss does not fall as parameters or tokens grow, so there is no "
      "law to fit; look at the points: the largest runs may be too short, or "
      "overfit"
    )
  return best


def _residual_draw(rng, fitted, loss, constants, method):
  """Losses of a resample; see `fit`."""
  multiplicative = method == "huber"
  residuals = np.log(loss / fitted) if multiplicative else loss - fitted
  freedom = len(loss) - constants
  scale = np.sqrt(len(loss) / rng.chisquare(freedom))
  drawn = scale * rng.choice(residuals - residuals.mean(), size=len(loss))
  if multiplicative:
    return fitted * np.exp(drawn)
  # A loss cannot reach 0, however wild the draw.
  return np.maximum(fitted + drawn, 1e-3 * fitted)


def _constants(p, centre):
  """(E, A, α, B, β) without the logarithms and the centring."""
  p = np.array(p)
  with np.errstate(over="ignore"):
    p[1::2] = np.exp(p[1::2] + p[2::2] * centre)
    p[0] = np.exp(p[0])
  return p


def _intervals(names, resampled, level):
  if not len(resampled):
    return {}
  tail = (1 - level) / 2
  low, high = np.quantile(resampled, [tail, 1 - tail], axis=0)
  return {
    name: Interval(float(a), float(b)) for name, a, b in zip(names, low, high)
  }
