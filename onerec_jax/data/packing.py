"""Which events of which users share a row: a pure function of the lengths.

A *segment* is a stretch of one user's events together with the targets it
serves. Long histories give several segments; short ones are packed, several
to a row, by best fit in order of decreasing length.
"""

import dataclasses

import numpy as np


@dataclasses.dataclass(frozen=True)
class Segments:
  """Segments as columns; event indices count from 0 within the user.

  Attributes:
    user: [N] dense user − 1.
    start: [N] first event of the context.
    first_target: [N] first target; the context reaches back to `start`.
    stop: [N] one past the last target.
    positions: [N] context positions needed, user token included.
  """

  user: np.ndarray
  start: np.ndarray
  first_target: np.ndarray
  stop: np.ndarray
  positions: np.ndarray

  def __len__(self) -> int:
    return len(self.user)


def _per_part(counts: np.ndarray) -> np.ndarray:
  """0, 1, …, count − 1 for each count, concatenated."""
  ends = np.cumsum(counts)
  return np.arange(ends[-1] if len(ends) else 0) - np.repeat(
    ends - counts, counts
  )


def _check_sizes(
  row_positions: int, row_targets: int, max_history: int
) -> None:
  if max_history >= row_positions:
    raise ValueError(
      f"pipeline.max_history={max_history} must be below "
      f"pipeline.row_positions={row_positions} (one position is the user token)"
    )
  if row_targets < 1:
    raise ValueError(f"pipeline.row_targets={row_targets} must be at least 1")


def next_item_segments(
  lengths: np.ndarray, row_positions: int, row_targets: int, max_history: int
) -> Segments:
  """Every event once a target, with up to `max_history` events before it.

  The first segment of a user starts at the first event; the next ones repeat
  the `max_history` events before their first target.

  Args:
    lengths: [U] training events of each user.
    row_positions: S.
    row_targets: T.
    max_history: events a target may see.

  Raises:
    ValueError: a row cannot hold the history and one target.
  """
  _check_sizes(row_positions, row_targets, max_history)
  first = min(row_positions, row_targets)
  step = min(row_positions - max_history, row_targets)
  rest = np.maximum(lengths - first, 0)
  counts = np.where(lengths > 0, 1 + -(-rest // step), 0)
  user = np.repeat(np.arange(len(lengths)), counts)
  part = _per_part(counts)
  first_target = np.where(part == 0, 0, first + (part - 1) * step)
  stop = np.minimum(first + part * step, lengths[user])
  start = np.maximum(first_target - max_history, 0)
  # The last target itself is not part of any visible context.
  return Segments(user, start, first_target, stop, stop - start)


def request_segments(
  users: np.ndarray,
  first: np.ndarray,
  stop: np.ndarray,
  row_positions: int,
  row_targets: int,
  max_history: int,
) -> Segments:
  """One segment a request: its events are the targets of what came before.

  Args:
    users: [N] dense user − 1 of each request.
    first: [N] the request's first event.
    stop: [N] one past its last.
    row_positions: S.
    row_targets: T; a longer request is cut into several segments.
    max_history: events a target may see.

  Raises:
    ValueError: as `next_item_segments`.
  """
  _check_sizes(row_positions, row_targets, max_history)
  counts = -(-(stop - first) // row_targets)
  part = _per_part(counts)
  users, first, stop = (np.repeat(x, counts) for x in (users, first, stop))
  start = np.maximum(first - max_history, 0)
  begin = first + part * row_targets
  end = np.minimum(begin + row_targets, stop)
  return Segments(users, start, begin, end, 1 + first - start)


def history_segments(
  users: np.ndarray,
  first: np.ndarray,
  stop: np.ndarray,
  row_positions: int,
  row_targets: int,
  max_history: int,
) -> Segments:
  """`request_segments` whose context is predicted too, item by item.

  V2's naive impression (§3.1): an event is a target again in every later
  sample that it is the context of. A request cut for its length repeats its
  history as targets once.

  Raises:
    ValueError: as `next_item_segments`, or a row cannot hold a history and one
      more target.
  """
  _check_sizes(row_positions, row_targets, max_history)
  if row_targets <= max_history:
    raise ValueError(
      f"pipeline.row_targets={row_targets} must be above pipeline.max_history="
      f"{max_history}: with pipeline.targets=history, the history is predicted "
      "too"
    )
  segments = request_segments(
    users, first, stop, row_positions, row_targets - max_history, max_history
  )
  context_end = segments.start + segments.positions - 1
  whole = segments.first_target == context_end
  return dataclasses.replace(
    segments,
    first_target=np.where(whole, segments.start, segments.first_target),
  )


def pack_in_order(
  positions: np.ndarray,
  targets: np.ndarray,
  row_positions: int,
  row_targets: int,
) -> list[np.ndarray]:
  """Next fit: rows hold segments as they come; arguments as of `pack`."""
  rows: list[list[int]] = []
  room = target_room = 0
  for segment, (need, wanted) in enumerate(
    zip(positions.tolist(), targets.tolist())
  ):
    if need > room or wanted > target_room:
      rows.append([])
      room, target_room = row_positions, row_targets
    rows[-1].append(segment)
    room, target_room = room - need, target_room - wanted
  return [np.asarray(row, np.int32) for row in rows]


def pack(
  positions: np.ndarray,
  targets: np.ndarray,
  row_positions: int,
  row_targets: int,
) -> list[np.ndarray]:
  """Best-fit decreasing: rows as arrays of segment indices.

  Args:
    positions: [N] context positions of each segment, at most row_positions.
    targets: [N] targets of each, at most row_targets.
    row_positions: S.
    row_targets: T.
  """
  rows: list[list[int]] = []
  target_room: list[int] = []
  by_room: list[list[int]] = [[] for _ in range(row_positions + 1)]
  open_rooms = 0  # bit r: some row has exactly r free positions
  for segment in np.argsort(-positions, kind="stable").tolist():
    need, need_targets = int(positions[segment]), int(targets[segment])
    row, room = -1, need
    candidates = open_rooms >> need
    while candidates:
      room = need + (candidates & -candidates).bit_length() - 1
      if target_room[by_room[room][-1]] >= need_targets:
        row = by_room[room].pop()
        if not by_room[room]:
          open_rooms &= ~(1 << room)
        break
      candidates &= candidates - 1
    if row < 0:
      row, room = len(rows), row_positions
      rows.append([])
      target_room.append(row_targets)
    rows[row].append(segment)
    target_room[row] -= need_targets
    left = room - need
    if left > 0 and target_room[row] > 0:
      by_room[left].append(row)
      open_rooms |= 1 << left
  return [np.asarray(row, np.int32) for row in rows]
