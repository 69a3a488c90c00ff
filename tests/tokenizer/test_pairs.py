"""Item pairs against loops over users and events."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.tokenizer import pairs, spectral

NUM_ITEMS = 7
HISTORIES = st.lists(
  st.lists(st.integers(1, NUM_ITEMS), max_size=9), max_size=8
)


def flat(histories):
  offsets = np.cumsum([0, *map(len, histories)])
  return offsets, np.array([i for h in histories for i in h], np.int32)


def vectors_of(seed: int) -> np.ndarray:
  rng = np.random.default_rng(seed)
  return spectral.unit(rng.normal(size=(NUM_ITEMS, 3)))


def swing_by_loops(sets: list[set[int]]) -> np.ndarray:
  """The formula as it is written."""
  alike = np.zeros((NUM_ITEMS, NUM_ITEMS))
  for i, j in itertools.permutations(range(NUM_ITEMS), 2):
    for u, v in itertools.combinations(sets, 2):
      if {i + 1, j + 1} <= u & v:
        alike[i, j] += 1 / (pairs.ALPHA + len(u & v))
  return alike


def as_matrix(rows, columns, values) -> np.ndarray:
  found = np.zeros((NUM_ITEMS, NUM_ITEMS))
  found[rows, columns] = values
  return found


@settings(max_examples=60, deadline=None)
@given(HISTORIES)
def test_swing_is_the_sum_over_pairs_of_users(histories):
  rows, columns, values = pairs.swing(*flat(histories), NUM_ITEMS, NUM_ITEMS)
  expected = swing_by_loops([set(h) for h in histories])
  np.testing.assert_allclose(
    as_matrix(rows, columns, values), expected, atol=1e-9
  )
  assert len(rows) == (expected > 0).sum()


def test_swing_does_not_depend_on_the_pieces(monkeypatch):
  rng = np.random.default_rng(0)
  histories = [rng.integers(1, NUM_ITEMS + 1, 5).tolist() for _ in range(30)]
  whole = pairs.swing(*flat(histories), NUM_ITEMS, NUM_ITEMS)
  for name, size in (("_USERS", 4), ("_USER_PAIRS", 3), ("_ITEMS", 2)):
    monkeypatch.setattr(pairs, name, size)
  pieces = pairs.swing(*flat(histories), NUM_ITEMS, NUM_ITEMS)
  for a, b in zip(whole, pieces, strict=True):
    np.testing.assert_array_equal(a, b)


def test_swing_keeps_the_most_alike_first():
  rng = np.random.default_rng(1)
  histories = [rng.integers(1, NUM_ITEMS + 1, 6).tolist() for _ in range(25)]
  rows, columns, values = pairs.swing(*flat(histories), NUM_ITEMS, 2)
  expected = swing_by_loops([set(h) for h in histories])
  assert rows.tolist() == sorted([*range(NUM_ITEMS)] * 2)
  for row in range(NUM_ITEMS):
    best = np.sort(expected[row])[::-1][:2]
    np.testing.assert_allclose(values[rows == row], best)
    np.testing.assert_allclose(expected[row][columns[rows == row]], best)


def test_swing_sees_the_latest_events(monkeypatch):
  histories = [[1, 2, 3, 3, 4], [5, 3, 4], [1, 2, 6]]
  monkeypatch.setattr(pairs, "MAX_ITEMS", 3)
  found = as_matrix(*pairs.swing(*flat(histories), NUM_ITEMS, NUM_ITEMS))
  expected = swing_by_loops([{3, 4}, {5, 3, 4}, {1, 2, 6}])
  assert expected.any()
  np.testing.assert_allclose(found, expected)


def test_swing_keeps_within_its_budget(monkeypatch):
  """Items of many users lose some; the cap is the largest that fits."""
  rng = np.random.default_rng(2)
  histories = [[1, 2, *rng.integers(3, 8, 2).tolist()] for _ in range(40)]
  monkeypatch.setattr(pairs, "MAX_USER_PAIRS", 1500)
  kept = pairs._events_matrix(*flat(histories), NUM_ITEMS)
  sizes = np.asarray(kept.sum(axis=0)).ravel()
  given = [sum(i in h for h in histories) for i in range(1, NUM_ITEMS + 1)]
  most = int(sizes.max())
  np.testing.assert_array_equal(sizes, np.minimum(given, most))
  assert np.square(sizes).sum() <= 1500
  assert np.square(np.minimum(given, most + 1)).sum() > 1500
  dense = kept.toarray()
  for user, history in enumerate(histories):
    assert {*(np.flatnonzero(dense[user]) + 1)} <= {*history}
  # What is kept is what the sum runs over.
  found = as_matrix(*pairs.swing(*flat(histories), NUM_ITEMS, NUM_ITEMS))
  sets = [{*(np.flatnonzero(row) + 1)} for row in dense]
  np.testing.assert_allclose(found, swing_by_loops(sets), atol=1e-9)


def user_to_item_by_loops(histories, vectors, longest):
  found = []
  for history in histories:
    for place, item in enumerate(history):
      earlier = history[max(0, place - longest) : place]
      scores = [
        (vectors[item - 1] @ vectors[other - 1], when, other)
        for when, other in enumerate(earlier)
        if other != item
      ]
      if scores:
        found.append([item - 1, max(scores)[2] - 1])
  return found


@settings(max_examples=60, deadline=None)
@given(HISTORIES, st.integers(1, 4))
def test_user_to_item_is_the_most_alike_before(histories, longest):
  vectors = vectors_of(0)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pairs, "HISTORY", longest)
    patch.setattr(pairs, "_EVENTS", 3)
    found = pairs.user_to_item(*flat(histories), vectors)
  expected = user_to_item_by_loops(histories, vectors, longest)
  assert found.tolist() == expected


def test_of_equals_the_latest():
  vectors = np.ones((4, 1), np.float32)
  found = pairs.user_to_item(*flat([[1, 2, 3, 4]]), vectors)
  assert found.tolist() == [[1, 0], [2, 1], [3, 2]]


def test_both_kinds_stand_one_after_the_other():
  histories = [[1, 2, 3], [3, 2, 1], [2, 1]]
  vectors = vectors_of(1)
  found = pairs.item_pairs(*flat(histories), vectors)
  assert found.dtype == np.int32
  first = pairs.user_to_item(*flat(histories), vectors)
  np.testing.assert_array_equal(found[: len(first)], first)
  rows, columns, _ = pairs.swing(*flat(histories), NUM_ITEMS, pairs.NEIGHBOURS)
  np.testing.assert_array_equal(
    found[len(first) :], np.stack([rows, columns], 1)
  )
  assert len(rows)


@pytest.mark.parametrize("histories", [[], [[]], [[1], [2]]])
def test_nothing_in_common_gives_no_pairs(histories):
  assert pairs.item_pairs(*flat(histories), vectors_of(0)).shape == (0, 2)
