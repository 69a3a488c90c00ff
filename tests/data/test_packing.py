import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.data import packing


@st.composite
def next_item_cases(draw):
  lengths = draw(st.lists(st.integers(0, 30), max_size=8))
  positions = draw(st.integers(1, 12))
  targets = draw(st.integers(1, 12))
  history = draw(st.integers(0, positions - 1))
  return np.asarray(lengths, np.int32), positions, targets, history


@settings(max_examples=300, deadline=None)
@given(next_item_cases())
def test_next_item_segments(case):
  lengths, positions, targets, history = case
  segments = packing.next_item_segments(*case)
  count = [np.zeros(n, int) for n in lengths]
  for i in range(len(segments)):
    user, start = segments.user[i], segments.start[i]
    first, stop = segments.first_target[i], segments.stop[i]
    assert 0 <= start <= first < stop <= lengths[user]
    count[user][first:stop] += 1
    # The user token and every event before the last target.
    assert segments.positions[i] == 1 + (stop - 1 - start) <= positions
    assert stop - first <= targets
    # Each target finds its whole history in the segment.
    assert start <= max(0, first - history)
  for events in count:
    np.testing.assert_array_equal(events, 1)


def test_a_row_must_hold_the_history():
  with pytest.raises(ValueError, match=r"max_history=8 .*row_positions=8"):
    packing.next_item_segments(np.asarray([3]), 8, 8, 8)
  zero, three = np.asarray([0]), np.asarray([3])
  with pytest.raises(ValueError, match=r"max_history=8 .*row_positions=8"):
    packing.request_segments(zero, zero, three, 8, 8, 8)
  with pytest.raises(ValueError, match="row_targets=0"):
    packing.next_item_segments(three, 8, 0, 4)


@st.composite
def request_cases(draw):
  users, first, stop = [], [], []
  for user in range(draw(st.integers(0, 5))):
    end = 0
    for size in draw(st.lists(st.integers(1, 9), max_size=5)):
      users.append(user)
      first.append(end)
      stop.append(end := end + size)
  positions, targets = draw(st.integers(1, 9)), draw(st.integers(1, 6))
  columns = (np.asarray(x, np.int64) for x in (users, first, stop))
  return (*columns, positions, targets, draw(st.integers(0, positions - 1)))


@settings(max_examples=300, deadline=None)
@given(request_cases())
def test_request_segments(case):
  users, first, stop, positions, targets, history = case
  segments = packing.request_segments(*case)
  request = {
    (u, e): b for u, b, s in zip(users, first, stop) for e in range(b, s)
  }
  found = []
  for i in range(len(segments)):
    user = segments.user[i]
    events = range(segments.first_target[i], segments.stop[i])
    assert 1 <= len(events) <= targets
    begins = {request[user, event] for event in events}
    assert len(begins) == 1, "targets of two requests in one segment"
    begin = begins.pop()
    # Context: what came before the request, as far back as the history goes,
    # and the user token.
    reach = min(begin, history)
    assert segments.start[i] == begin - reach
    assert segments.positions[i] == 1 + reach <= positions
    found += [(user, event) for event in events]
  assert sorted(found) == sorted(request)


@settings(max_examples=300, deadline=None)
@given(request_cases())
def test_history_segments_predict_their_context_too(case):
  users, first, stop, positions, targets, history = case
  segments = packing.history_segments(
    users, first, stop, positions, targets + history, history
  )
  found = []
  for i in range(len(segments)):
    events = (segments.first_target[i], segments.stop[i])
    found.append((int(segments.user[i]), int(segments.start[i]), *events))
    context = segments.positions[i] - 1
    assert events[1] - events[0] <= targets + history
    assert segments.start[i] + context <= max(events[0], events[1] - 1)
  expected = []
  for user, begin, end in zip(users, first, stop):
    start = max(0, begin - history)
    for part in range(begin, end, targets):
      part_end = min(part + targets, end)
      expected.append((user, start, start if part == begin else part, part_end))
  assert found == expected


def test_a_row_must_hold_the_predicted_history():
  zero, three = np.asarray([0]), np.asarray([3])
  with pytest.raises(ValueError, match=r"row_targets=4 .*max_history=4"):
    packing.history_segments(zero, zero, three, 8, 4, 4)


def next_fit(positions, targets, row_positions, row_targets):
  """Rows of the simplest rule: close the row when the next does not fit."""
  rows, room, target_room = 0, 0, 0
  for need, need_targets in zip(positions, targets):
    if need > room or need_targets > target_room:
      rows, room, target_room = rows + 1, row_positions, row_targets
    room -= need
    target_room -= need_targets
  return rows


@st.composite
def pieces(draw):
  row_positions, row_targets = draw(st.integers(1, 12)), draw(st.integers(1, 9))
  piece = st.tuples(st.integers(1, row_positions), st.integers(1, row_targets))
  drawn = draw(st.lists(piece, max_size=40))
  columns = np.asarray(drawn, np.int64).reshape(-1, 2).T
  return columns[0], columns[1], row_positions, row_targets


@settings(max_examples=500, deadline=None)
@given(pieces())
def test_pack_places_every_segment_once_within_capacity(case):
  positions, targets, row_positions, row_targets = case
  rows = packing.pack(*case)
  placed = np.concatenate([np.zeros(0, int), *rows])
  np.testing.assert_array_equal(np.sort(placed), np.arange(len(positions)))
  for row in rows:
    assert len(row)
    assert positions[row].sum() <= row_positions
    assert targets[row].sum() <= row_targets
  again = packing.pack(*case)
  assert [r.tolist() for r in rows] == [r.tolist() for r in again]


@settings(max_examples=300, deadline=None)
@given(pieces())
def test_pack_in_order_is_next_fit(case):
  positions, targets, *sizes = case
  rows = packing.pack_in_order(*case)
  placed = np.concatenate([np.zeros(0, int), *rows])
  np.testing.assert_array_equal(placed, np.arange(len(positions)))
  assert len(rows) == next_fit(*case)
  for row in rows:
    assert positions[row].sum() <= sizes[0]
    assert targets[row].sum() <= sizes[1]


@settings(max_examples=500, deadline=None)
@given(pieces())
def test_pack_wastes_no_more_than_next_fit_may(case):
  """Two neighbouring rows of next fit overflow one of the two capacities."""
  positions, targets, row_positions, row_targets = case
  share = positions.sum() / row_positions + targets.sum() / row_targets
  assert len(packing.pack(*case)) <= 2 * share + 1


@pytest.mark.parametrize("row_targets", [128, 24])
def test_pack_fills_rows_of_typical_lengths(row_targets):
  """Near the lower bound also where targets, not positions, are scarce."""
  rng = np.random.default_rng(0)
  lengths = np.minimum(rng.geometric(0.05, 2000), 127)
  targets = np.minimum(lengths, rng.integers(1, 12, 2000))
  rows = len(packing.pack(lengths, targets, 128, row_targets))
  bound = max(lengths.sum() / 128, targets.sum() / row_targets)
  assert rows <= next_fit(lengths, targets, 128, row_targets)
  assert rows <= 1.2 * bound
