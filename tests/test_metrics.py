"""Ranking metrics against plain Python loops and random tie choice."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax import metrics


@st.composite
def rankings(draw):
  """(ranked, target, sid [I + 1], num_items): lists without repeats."""
  num_items = draw(st.integers(1, 12))
  num_queries = draw(st.integers(1, 6))
  width = draw(st.integers(1, 8))
  ranked = np.zeros((num_queries, width), np.int64)
  for row in range(num_queries):
    order = draw(st.permutations(range(1, num_items + 1)))[:width]
    for slot, item in enumerate(order):
      # Some outputs are no item.
      ranked[row, slot] = item if draw(st.integers(0, 4)) else 0
  one = st.integers(1, num_items)
  target = np.array([draw(one) for _ in range(num_queries)])
  sid = np.array([0] + [draw(st.integers(1, 4)) for _ in range(num_items)])
  return ranked, target, sid, num_items


def credits_of(ranked, target, sid):
  return metrics.collision_credit(
    ranked, target, sid[ranked], sid[target], np.bincount(sid)
  )


@settings(max_examples=150, deadline=None)
@given(rankings(), st.integers(1, 10))
def test_credits_and_metrics_match_loops(case, cutoff):
  ranked, target, sid, num_items = case
  credits = credits_of(ranked, target, sid)
  for q in range(len(target)):
    group = [i for i in range(1, num_items + 1) if sid[i] == sid[target[q]]]
    want = {kind: [0.0, 0.0, 0.0] for kind in ("expected", "strict", "sid")}
    first = True
    for rank, item in enumerate(ranked[q, :cutoff], start=1):
      earned = {"expected": 0.0, "strict": 0.0, "sid": 0.0}
      if item in group:
        earned["expected"] = 1 / len(group)
        earned["sid"] = float(first)
        first = False
      if item == target[q]:
        earned["strict"] = 1.0
      for kind, value in earned.items():
        want[kind][0] += value
        want[kind][1] += value / math.log2(rank + 1)
        want[kind][2] += value / rank
    for kind, (recall, ndcg, mrr) in want.items():
      credit = getattr(credits, kind)
      assert metrics.recall(credit, cutoff)[q] == pytest.approx(recall)
      assert metrics.ndcg(credit, cutoff)[q] == pytest.approx(ndcg)
      assert metrics.mrr(credit, cutoff)[q] == pytest.approx(mrr)


def test_expected_credit_is_the_mean_over_random_choices_of_the_tied_item():
  # IDs: 1 → items 1..3, 2 → items 4, 5, 3 → item 6. The list names two slots
  # of ID 1 and one of each other.
  sid = np.array([0, 1, 1, 1, 2, 2, 3])
  slots = np.array([2, 1, 3, 1])
  rng = np.random.default_rng(0)
  draws = 20000
  groups = {s: np.flatnonzero(sid == s) for s in (1, 2, 3)}
  lists = np.zeros((draws, 4), np.int64)
  for s, items in groups.items():
    where = np.flatnonzero(slots == s)
    order = rng.permuted(np.tile(items, (draws, 1)), axis=1)
    lists[:, where] = order[:, : len(where)]
  for target in range(1, 7):
    wanted = np.full(draws, target)
    strict = credits_of(lists, wanted, sid).strict
    representative = np.array([[groups[s][0] for s in slots]])
    representative[0, 3] = groups[1][1]
    expected = credits_of(representative, wanted[:1], sid).expected
    for metric in (metrics.recall, metrics.ndcg, metrics.mrr):
      for cutoff in (1, 2, 4):
        sampled = metric(strict, cutoff)
        error = sampled.std() / math.sqrt(draws)
        assert metric(expected, cutoff)[0] == pytest.approx(
          sampled.mean(), abs=5 * error + 1e-12
        )


def test_credits_agree_where_no_id_is_shared():
  ranked = np.array([[3, 1, 2], [2, 0, 4]])
  sid = np.arange(5)
  credits = credits_of(ranked, np.array([1, 3]), sid)
  np.testing.assert_array_equal(credits.expected, credits.strict)
  np.testing.assert_array_equal(credits.sid, credits.strict)


def test_golden_ndcg_and_mrr():
  ranked = np.array([[7, 8, 9, 1]])
  credit = credits_of(ranked, np.array([9]), np.arange(10)).expected
  assert metrics.ndcg(credit, 4)[0] == 0.5  # 1 / log2(4)
  assert metrics.mrr(credit, 4)[0] == pytest.approx(1 / 3)
  assert metrics.recall(credit, 2)[0] == 0.0


@settings(max_examples=150, deadline=None)
@given(rankings(), st.data())
def test_drop_seen_matches_a_python_filter(case, data):
  ranked, _, _, num_items = case
  seen = [
    np.array(
      data.draw(st.lists(st.integers(1, num_items + 3), max_size=9)), np.int32
    )
    for _ in ranked
  ]
  width = data.draw(st.integers(1, 9))
  got = metrics.drop_seen(ranked, seen, width)
  for row, history, result in zip(ranked, seen, got):
    kept = [i for i in row.tolist() if i == 0 or i not in history.tolist()]
    kept = kept[:width]
    assert result.tolist() == kept + [0] * (width - len(kept))


@settings(max_examples=100, deadline=None)
@given(rankings(), st.integers(1, 8))
def test_catalogue_figures_match_loops(case, cutoff):
  ranked, _, _, num_items = case
  top = [i for row in ranked.tolist() for i in row[:cutoff] if i]
  counts = metrics.recommendation_counts(ranked, num_items, cutoff)
  assert counts.tolist() == [0] + [
    top.count(i) for i in range(1, num_items + 1)
  ]
  assert metrics.coverage(counts) == len(set(top)) / num_items
  for row, rate in zip(ranked, metrics.valid_rate(ranked, cutoff)):
    assert rate == sum(i > 0 for i in row[:cutoff]) / cutoff
  if not top:
    with pytest.raises(ValueError, match="valid_rate"):
      metrics.gini(counts)
    return
  # Mean absolute difference over all pairs, over twice the mean.
  x = counts[1:].tolist()
  pairs = sum(abs(a - b) for a in x for b in x)
  want = pairs / (2 * num_items**2 * (sum(x) / num_items))
  assert metrics.gini(counts) == pytest.approx(want, abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=12))
def test_popularity_percentile_matches_pair_counts(events):
  counts = np.array([99, *events])
  got = metrics.popularity_percentile(counts)
  for item, own in enumerate(events, start=1):
    fewer = sum(e < own for e in events)
    same = sum(e == own for e in events)
    assert got[item] == pytest.approx((fewer + same / 2) / len(events))
  assert got[1:].mean() == pytest.approx(0.5)


def test_mean_popularity_weighs_items_by_how_often_they_are_shown():
  percentile = metrics.popularity_percentile(np.array([0, 1, 2, 3, 4]))
  recommended = np.array([0, 3, 0, 0, 1])
  want = (3 * 0.125 + 0.875) / 4
  assert metrics.mean_popularity(recommended, percentile) == want


def test_cold_counts_strictly_fewer_events():
  counts = np.array([0, 0, 1, 5])
  target = np.array([1, 2, 3])
  assert metrics.cold(target, counts, 1).tolist() == [True, False, False]
  assert metrics.cold(target, counts, 5).tolist() == [True, True, False]
