"""The user bootstrap against a naive loop and a known truth."""

import numpy as np
import pytest

from onerec_jax.evaluation import bootstrap


def test_matches_a_naive_resampling_loop():
  rng = np.random.default_rng(0)
  users = rng.integers(100, 112, size=40)
  values = rng.normal(size=40)
  got = bootstrap.resampled_means(
    values[:, None], users, resamples=4000, seed=1
  )[:, 0]
  distinct = np.unique(users)
  naive = []
  for _ in range(4000):
    rows = [
      np.flatnonzero(users == user)
      for user in rng.choice(distinct, size=len(distinct))
    ]
    naive.append(values[np.concatenate(rows)].mean())
  np.testing.assert_allclose(got.mean(), np.mean(naive), atol=0.02)
  np.testing.assert_allclose(
    np.quantile(got, [0.025, 0.5, 0.975]),
    np.quantile(naive, [0.025, 0.5, 0.975]),
    atol=0.03,
  )


def test_one_draw_is_a_mean_over_whole_users():
  # Two users: every resample is all of A, all of B, or both.
  values = np.array([[1.0], [1.0], [1.0], [5.0]])
  users = np.array([4, 4, 4, 9])
  got = bootstrap.resampled_means(values, users, resamples=200, seed=0)
  assert set(np.round(got[:, 0], 9)) == {1.0, 2.0, 5.0}


def test_columns_share_their_draws():
  rng = np.random.default_rng(2)
  base = rng.normal(size=60)
  users = np.arange(60) // 3
  values = np.stack([base, base + 0.25], axis=1)
  got = bootstrap.resampled_means(values, users, resamples=50)
  np.testing.assert_allclose(got[:, 1] - got[:, 0], 0.25, atol=1e-12)


def test_blocks_do_not_change_the_draws(monkeypatch):
  values = np.random.default_rng(3).normal(size=(30, 1))
  users = np.arange(30)
  whole = bootstrap.resampled_means(values, users, resamples=70)
  monkeypatch.setattr(bootstrap, "_BLOCK", 64)
  pieces = bootstrap.resampled_means(values, users, resamples=70)
  np.testing.assert_allclose(whole, pieces, atol=1e-12)


def test_interval_covers_a_planted_difference_about_95_times_in_100():
  """Users with a common offset: query-wise resampling covers far less."""
  rng = np.random.default_rng(4)
  truth, trials = 0.1, 300
  users = np.repeat(np.arange(80), 5)
  covered = {"user": 0, "query": 0}
  for trial in range(trials):
    offset = rng.normal(scale=0.5, size=80)[users]
    values = truth + offset + rng.normal(scale=0.2, size=400)
    for unit, owner in (("user", users), ("query", np.arange(400))):
      (found,) = bootstrap.intervals(
        values[:, None], owner, resamples=300, seed=trial
      )
      covered[unit] += found.low <= truth <= found.high
  # A binomial share of 300 at .95 has a standard error of .013.
  assert 0.90 <= covered["user"] / trials <= 0.98
  assert covered["query"] / trials < 0.80


def test_is_a_function_of_the_seed():
  values = np.random.default_rng(5).normal(size=(50, 2))
  users = np.arange(50) // 2
  first = bootstrap.intervals(values, users, seed=7, resamples=100)
  assert first == bootstrap.intervals(values, users, seed=7, resamples=100)
  assert first != bootstrap.intervals(values, users, seed=8, resamples=100)
  for column, found in enumerate(first):
    assert found.low < found.mean < found.high
    assert found.mean == pytest.approx(values[:, column].mean())


def test_refuses_what_has_no_answer():
  with pytest.raises(ValueError, match="no queries"):
    bootstrap.intervals(np.zeros((0, 1)), np.zeros(0, np.int64))
  with pytest.raises(ValueError, match="between 0 and 1"):
    bootstrap.intervals(np.zeros((3, 1)), np.arange(3), level=95.0)
