"""Quantiles of play time, against a count over all pairs."""

import hypothesis
import hypothesis.strategies as st
import numpy as np
import pytest

from onerec_jax.data import duration


def by_counting(request, durations, plays, least):
  """Event by event over all others, in plain loops."""
  found = []
  bucket = lambda ms: min(max(int(np.floor(np.log2(ms / 1000 + 1e-6))), 0), 23)
  known = [
    ms is not None and ms > 0 and play is not None
    for ms, play in zip(durations, plays)
  ]
  for i in range(len(plays)):
    q = None
    for width in range(24):
      if not known[i]:
        break
      past = [
        plays[j]
        for j in range(len(plays))
        if known[j]
        and request[j] < request[i]
        and abs(bucket(durations[j]) - bucket(durations[i])) <= width
      ]
      if len(past) >= least:
        less = sum(play < plays[i] for play in past)
        same = sum(play == plays[i] for play in past)
        q = (less + same / 2) / len(past)
        break
    found.append(np.nan if q is None else q)
  return np.array(found)


EVENTS = st.lists(
  st.tuples(
    st.booleans(),
    st.sampled_from([None, 0.0, 400.0, 1000.0, 3000.0, 9000.0, 60e3, 7e6]),
    st.sampled_from([None, 0.0, 500.0, 1000.0, 2500.0, 9000.0]),
  ),
  max_size=30,
)


@hypothesis.given(EVENTS, st.integers(1, 6))
def test_equals_a_count_over_all_pairs(events, least):
  request = np.cumsum([new for new, _, _ in events]).astype(np.int64)
  durations = [d for _, d, _ in events]
  plays = [p for _, _, p in events]
  got = duration.play_quantiles(
    request,
    np.array(durations, np.float64),
    np.array(plays, np.float64),
    least,
  )
  want = by_counting(request, durations, plays, least)
  np.testing.assert_allclose(got, want, rtol=1e-12)


def test_buckets_double():
  durations = np.array([np.nan, 0, 1, 999, 1000, 2000, 3999, 4000, 60e3, 1e12])
  np.testing.assert_array_equal(
    duration.bucket(durations), [-1, -1, 0, 0, 0, 1, 1, 2, 5, 23]
  )


def test_a_long_video_is_judged_among_long_ones():
  """30 s of a 5-minute video beat nobody's past; of a 40 s one, everybody's."""
  durations = np.array([300e3] * 6 + [40e3] * 6 + [300e3, 40e3])
  plays = np.array([100e3] * 6 + [10e3] * 6 + [30e3, 30e3])
  got = duration.play_quantiles(np.arange(14), durations, plays)
  assert got[-2] == 0.0
  assert got[-1] == 1.0


def test_a_new_user_has_no_quantile():
  got = duration.play_quantiles(
    np.arange(7), np.full(7, 8e3), np.arange(7.0), least=5
  )
  assert np.isnan(got[:5]).all()
  assert got[5] == pytest.approx(1.0)


def test_what_is_shown_at_once_is_not_each_others_past():
  got = duration.play_quantiles(
    np.array([0, 0, 0, 1, 1]), np.full(5, 8e3), np.array([1.0, 2, 3, 2, 9]), 3
  )
  np.testing.assert_allclose(got, [np.nan, np.nan, np.nan, 0.5, 1.0])
