"""Fits of scaling laws: planted constants, the paper's, other optimisers."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize

from onerec_jax.scaling import laws, paper_tables
from onerec_jax.scaling.points import Points

SIZES = np.geomspace(1e7, 1e10, 8)
PLANTED = {"E": 3.13, "A": 3660.0, "alpha": 0.489}
fast = settings(max_examples=25, deadline=None, derandomize=True)


def one_law(n, E, A, alpha):
  return E + A * n**-alpha


def grid(per_side=4):
  n, d = np.meshgrid(
    np.geomspace(1e7, 1e10, per_side), np.geomspace(1e9, 1e12, per_side)
  )
  return n.ravel(), d.ravel()


@pytest.mark.parametrize("method", laws.METHODS)
@fast
@given(
  E=st.floats(0.5, 5.0),
  share=st.floats(0.05, 2.0),
  alpha=st.floats(0.15, 1.0),
)
def test_recovers_planted_constants(method, E, share, alpha):
  A = share * 1e8**alpha  # the term is `share` at 100M parameters
  points = Points(SIZES, one_law(SIZES, E, A, alpha))
  law = laws.fit(points, method, resamples=2)
  want = {"E": E, "A": A, "alpha": alpha}
  assert law.constants == pytest.approx(want, rel=0.01)
  np.testing.assert_allclose(law.residuals, 0, atol=1e-4)


@pytest.mark.parametrize("method", laws.METHODS)
@settings(fast, max_examples=8)
@given(alpha=st.floats(0.25, 0.8), beta=st.floats(0.25, 0.8))
def test_recovers_planted_constants_of_two_variables(method, alpha, beta):
  A, B = 0.7 * 1e8**alpha, 0.4 * 1e10**beta
  n, d = grid()
  points = Points(n, 1.7 + A * n**-alpha + B * d**-beta, d)
  law = laws.fit(points, method, resamples=2)
  want = {"E": 1.7, "A": A, "alpha": alpha, "B": B, "beta": beta}
  assert law.constants == pytest.approx(want, rel=0.02)


def test_agrees_with_another_optimiser_on_noisy_losses():
  rng = np.random.default_rng(0)
  loss = one_law(SIZES, **PLANTED) + rng.normal(scale=0.01, size=8)
  found, _ = optimize.curve_fit(
    one_law, SIZES, loss, p0=[3.0, 3000.0, 0.5], maxfev=20000, x_scale="jac",
    method="trf", ftol=1e-14, xtol=1e-14,
  )  # fmt: skip
  law = laws.fit(Points(SIZES, loss), resamples=2)
  assert list(law.constants.values()) == pytest.approx(found, rel=1e-3)
  residuals = loss - one_law(SIZES, *found)
  np.testing.assert_allclose(law.residuals, residuals, atol=1e-6)
  total = np.sum((loss - loss.mean()) ** 2)
  want = 1 - np.sum(residuals**2) / total
  # The residuals of a fit with a floor have mean zero.
  assert law.r_squared == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
  ("label", "method", "E", "A", "alpha"),
  [
    ("nominal N", "least_squares", 3.1304, 3656, 0.4893),
    ("nominal N", "huber", 3.132, 4232, 0.498),
    ("N = 18·d²·layers", "least_squares", 3.126, 1779, 0.453),
  ],
)
def test_the_papers_table_gives_the_papers_constants(
  label, method, E, A, alpha
):
  law = laws.fit(paper_tables.points()[label], method, resamples=2)
  assert law.constants["E"] == pytest.approx(E, abs=5e-4)
  assert law.constants["A"] == pytest.approx(A, rel=5e-4)
  assert law.constants["alpha"] == pytest.approx(alpha, abs=5e-4)


def test_the_papers_printed_constants_are_its_least_squares():
  law = laws.fit(paper_tables.points()["nominal N"], resamples=2)
  for name, printed in paper_tables.LAW.items():
    assert law.constants[name] == pytest.approx(printed, rel=2e-3)


def test_what_rounding_alone_leaves_open():
  """Against a loop over shifted losses and another optimiser."""
  points = paper_tables.points()["nominal N"]
  law = laws.fit(points, resamples=400, seed=1)
  rng, naive = np.random.default_rng(7), []
  for _ in range(200):
    loss = points.loss + rng.uniform(-0.005, 0.005, 7)
    found, _ = optimize.curve_fit(
      one_law, points.parameters / 1e9, loss, p0=[3.13, 0.145, 0.489]
    )
    naive.append([found[0], found[1] * 1e9 ** found[2], found[2]])
  low, high = np.quantile(naive, [0.05, 0.95], axis=0)
  for index, name in enumerate(law.constants):
    found, width = law.rounding_intervals[name], high[index] - low[index]
    assert found.low == pytest.approx(low[index], abs=0.15 * width)
    assert found.high == pytest.approx(high[index], abs=0.15 * width)
  # More than a factor of two in A, from digits that were not printed.
  a = law.rounding_intervals["A"]
  assert a.high / a.low > 2
  # The noise around the curve leaves more open than rounding does.
  assert law.intervals["A"].low < a.low
  assert law.intervals["A"].high > a.high


@pytest.mark.parametrize(("count", "kind"), [(7, "residuals"), (36, "points")])
def test_intervals_cover_the_truth_and_are_as_wide_as_the_scatter(count, kind):
  """A nominal 90%; residuals as they are cover 67% with 7 points."""
  sizes = np.geomspace(1e8, 1e10, count)
  truth = one_law(sizes, **PLANTED)
  covered, widths, estimates = [], [], []
  for seed in range(30):
    noise = np.random.default_rng(seed).normal(scale=0.005, size=count)
    law = laws.fit(Points(sizes, truth + noise), resamples=60, seed=seed)
    assert law.resampling == kind
    span = law.intervals["alpha"]
    covered.append(span.low <= PLANTED["alpha"] <= span.high)
    widths.append(span.high - span.low)
    estimates.append(law.constants["alpha"])
  assert np.mean(covered) >= 0.8
  scatter = np.subtract(*np.quantile(estimates, [0.95, 0.05]))
  assert 0.7 * scatter < np.median(widths) < 1.6 * scatter


def test_huber_is_deaf_to_a_bad_run():
  loss = one_law(SIZES, **PLANTED)
  loss[3] *= 1.05
  error = {
    method: abs(
      laws.fit(Points(SIZES, loss), method, resamples=2).constants["alpha"]
      - PLANTED["alpha"]
    )
    for method in laws.METHODS
  }
  assert error["huber"] < 0.03 < 0.05 < error["least_squares"]


def test_predicts_with_a_band_around_it():
  rng = np.random.default_rng(3)
  loss = one_law(SIZES, **PLANTED) + rng.normal(scale=0.005, size=8)
  law = laws.fit(Points(SIZES, loss), resamples=200)
  where = np.geomspace(1e7, 1e12, 9)
  predicted = law.predict(where)
  np.testing.assert_allclose(predicted, one_law(where, **law.constants))
  low, high = law.band(where)
  assert np.all((low < predicted) & (predicted < high))
  # Beyond the data the curve is known less well than among it.
  assert high[-1] - low[-1] > 2 * (high[3] - low[3])
  with pytest.raises(ValueError, match="with tokens"):
    law.predict(where, where)


def test_compute_optimal_is_the_lowest_on_its_budget():
  n, d = grid()
  loss = 1.7 + 400 * n**-0.34 + 410 * d**-0.28
  law = laws.fit(Points(n, loss, d), resamples=2)
  budgets = np.array([1e20, 1e23])
  best_n, best_d = law.compute_optimal(budgets, 18.0)
  np.testing.assert_allclose(18.0 * best_n * best_d, budgets)
  for budget, found in zip(budgets, best_n):
    tried = np.geomspace(found / 30, found * 30, 20001)
    losses = law.predict(tried, budget / 18.0 / tried)
    assert tried[np.argmin(losses)] == pytest.approx(found, rel=1e-3)
  with pytest.raises(ValueError, match="without tokens"):
    law.predict(n)
  single = laws.fit(Points(SIZES, one_law(SIZES, **PLANTED)), resamples=2)
  with pytest.raises(ValueError, match="no optimum"):
    single.compute_optimal(budgets)


@pytest.mark.parametrize("spread", [1.0, 1.9])
def test_tokens_that_hardly_vary_are_left_out(spread):
  tokens = 1e10 * np.where(np.arange(8) % 2, spread, 1.0)
  law = laws.fit(Points(SIZES, one_law(SIZES, **PLANTED), tokens), resamples=2)
  assert list(law.constants) == ["E", "A", "alpha"]


def test_is_a_function_of_the_seed():
  points = paper_tables.points()["nominal N"]
  first, again, other = (
    laws.fit(points, resamples=20, seed=seed) for seed in (1, 1, 2)
  )
  np.testing.assert_array_equal(first.resampled, again.resampled)
  assert first.rounding_intervals == again.rounding_intervals
  assert first.intervals != other.intervals
  assert first.constants == other.constants


def test_an_architecture_with_few_sizes_does_not_hold_up_the_others():
  whole = Points(SIZES, one_law(SIZES, **PLANTED))
  few = Points(SIZES[:2], whole.loss[:2])
  fits, refused = laws.fit_each({"few": few, "whole": whole})
  assert list(fits) == ["whole"]
  points, law = fits["whole"]
  assert points is whole
  assert law.constants == laws.fit(whole).constants
  (told,) = refused
  assert told.startswith("few: 2 points are too few")


def test_refuses_what_has_no_answer():
  loss = one_law(SIZES, **PLANTED)
  with pytest.raises(ValueError, match="3 points are too few.*at least 4"):
    laws.fit(Points(SIZES[:3], loss[:3]))
  n, d = grid(2)
  with pytest.raises(ValueError, match=r"L\(N, D\).*at least 6"):
    laws.fit(Points(n, loss[:4], d))
  with pytest.raises(ValueError, match="3 different numbers of parameters"):
    laws.fit(Points(np.repeat([1e8, 1e9], 4), loss))
  n, d = grid(3)
  with pytest.raises(ValueError, match="3 different numbers of tokens"):
    laws.fit(Points(n, 1 + n**-0.1, np.minimum(d, 2e9)))
  with pytest.raises(ValueError, match="cannot be told apart"):
    laws.fit(Points(SIZES, loss, 20 * SIZES))
  with pytest.raises(ValueError, match="does not fall"):
    laws.fit(Points(SIZES, loss[::-1].copy()))
  step = np.array([3.0, 2.5, 2.5001, 2.4999, 2.5, 2.5002])
  with pytest.raises(ValueError, match="falls in one step"):
    laws.fit(Points(np.geomspace(1e4, 3e6, 6), step))
  with pytest.raises(ValueError, match="want one of"):
    laws.fit(Points(SIZES, loss), "guess")
