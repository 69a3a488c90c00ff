"""Training events → pairs of items that behave alike (OneRec-V1 §2.1).

User-to-item: an event with the most alike of the user's earlier events.
Item-to-item: an item with those most alike by Swing. Rows are item − 1.
"""

import bisect

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

HISTORY = 50
"""Earlier events that an event may be paired with (QARM's number)."""
NEIGHBOURS = 5
"""INFERRED: pairs of high Swing similarity that an item gives."""
ALPHA = 1.0
"""INFERRED, as usual for Swing: softens the overlap of two users."""
MAX_ITEMS = 200
"""Swing sees the latest so many events of a user."""
MAX_USER_PAIRS = 2**25
"""Swing sees at most so many ordered pairs of users, each counted once for
every item they share: what bounds its memory."""
_EVENTS = 1 << 16
_USERS = 1 << 12
_USER_PAIRS = 1 << 14
_ITEMS = 256


def item_pairs(
  user_offsets: Int[np.ndarray, "U1"],
  items: Int[np.ndarray, "events"],
  vectors: Float[np.ndarray, "I D"],
) -> Int[np.ndarray, "P 2"]:
  """User-to-item pairs, one an event, then item-to-item pairs.

  Args:
    user_offsets: events of user u are items[offsets[u] : offsets[u + 1]].
    items: dense ids from 1, oldest first within a user, training events only.
    vectors: collaborative, rows of length 1, row i = item i + 1.

  Returns:
    int32 rows; a pair that many events give stands there as often.
  """
  a, b, _ = swing(user_offsets, items, len(vectors), NEIGHBOURS)
  return np.concatenate(
    [user_to_item(user_offsets, items, vectors), np.stack([a, b], axis=1)]
  ).astype(np.int32)


def user_to_item(
  user_offsets: Int[np.ndarray, "U1"],
  items: Int[np.ndarray, "events"],
  vectors: Float[np.ndarray, "I D"],
) -> Int[np.ndarray, "P 2"]:
  """Each event with the most alike among the `HISTORY` events before it.

  Alike by the cosine of collaborative vectors (INFERRED: the papers do not
  say by which); of equals the latest. An item is not paired with itself, and
  an event without another item before it gives no pair.

  Returns:
    Rows of the event's item and of the earlier one, in the order of events.
  """
  users = np.repeat(np.arange(len(user_offsets) - 1), np.diff(user_offsets))
  rows = items - 1
  best = np.full(len(rows), -np.inf, np.float32)
  partner = np.full(len(rows), -1, np.int64)
  for lag in range(1, HISTORY + 1):
    may = (users[lag:] == users[:-lag]) & (rows[lag:] != rows[:-lag])
    events = lag + np.flatnonzero(may)
    for start in range(0, len(events), _EVENTS):
      later = events[start : start + _EVENTS]
      earlier = rows[later - lag]
      alike = np.einsum("nd,nd->n", vectors[rows[later]], vectors[earlier])
      better = alike > best[later]
      best[later[better]] = alike[better]
      partner[later[better]] = earlier[better]
  paired = partner >= 0
  return np.stack([rows[paired], partner[paired]], axis=1)


def swing(
  user_offsets: Int[np.ndarray, "U1"],
  items: Int[np.ndarray, "events"],
  num_items: int,
  count: int,
) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"], Float[np.ndarray, "P"]]:
  """The `count` items most alike to each item, and how alike they are.

  sim(i, j) = Σ 1 / (α + |I_u ∩ I_v|) over pairs of users {u, v} who both have
  i and j; I_u are the distinct items among u's latest `MAX_ITEMS` events.
  Where there are more than `MAX_USER_PAIRS`, items of very many users keep a
  random sample of theirs (fixed, the largest that fits), and overlaps are of
  what is kept.

  Returns:
    Rows of the item, rows of the other, similarity; most alike first within
    an item. Items that no two users share with another give none.
  """
  both, weights = _shared(_events_matrix(user_offsets, items, num_items))
  weighted = sp.diags(weights) @ both
  columns = both.tocsc()
  found = []
  for start in range(0, num_items, _ITEMS):
    block = columns[:, start : start + _ITEMS].T.tocsr() @ weighted
    block = block.tocoo()
    other = block.row + start != block.col
    row, column, value = (
      x[other] for x in (block.row + start, block.col, block.data)
    )
    first = rank_in_rows(row, column, value) < count
    order = np.lexsort((column[first], -value[first], row[first]))
    found.append([x[first][order] for x in (row, column, value)])
  return tuple(np.concatenate(parts) for parts in zip(*found))


def rank_in_rows(
  rows: Int[np.ndarray, "N"],
  columns: Int[np.ndarray, "N"],
  values: Float[np.ndarray, "N"],
) -> Int[np.ndarray, "N"]:
  """0 for the largest value of a row, 1 for the next; of equals by column."""
  order = np.lexsort((columns, -values, rows))
  ordered = rows[order]
  ranks = np.empty(len(rows), np.int64)
  ranks[order] = np.arange(len(rows)) - np.searchsorted(ordered, ordered)
  return ranks


def _events_matrix(
  user_offsets: Int[np.ndarray, "U1"],
  items: Int[np.ndarray, "events"],
  num_items: int,
) -> sp.csr_matrix:
  """Ones where a user has an item, after both caps; [U, I]."""
  num_users = len(user_offsets) - 1
  users = np.repeat(np.arange(num_users), np.diff(user_offsets))
  latest = user_offsets[users + 1] - np.arange(len(items)) <= MAX_ITEMS
  cells = np.unique(users[latest] * num_items + items[latest] - 1)
  users, rows = cells // num_items, cells % num_items
  sizes = np.bincount(rows, minlength=num_items)

  def user_pairs(most: int) -> float:
    return np.square(np.minimum(sizes, most), dtype=np.float64).sum()

  largest = int(sizes.max(initial=0))
  most = bisect.bisect_right(range(largest + 1), MAX_USER_PAIRS, key=user_pairs)
  # `most` is the first size that is too many; they start at 0.
  chance = np.random.default_rng(0).random(len(rows))
  kept = rank_in_rows(rows, users, chance) < max(most - 1, 2)
  return sp.csr_matrix(
    (np.ones(kept.sum(), np.float32), (users[kept], rows[kept])),
    shape=(num_users, num_items),
  )


def _shared(
  matrix: sp.csr_matrix,
) -> tuple[sp.csr_matrix, Float[np.ndarray, "P"]]:
  """What pairs of users share, for pairs that share two items or more.

  Returns:
    Ones [P, I], and 1 / (α + items shared) [P].
  """
  first, second, overlap = [], [], []
  transposed = matrix.T.tocsr()
  # At least one round, so that nobody gives no pairs rather than no arrays.
  for start in range(0, max(1, matrix.shape[0]), _USERS):
    counts = (matrix[start : start + _USERS] @ transposed).tocoo()
    row = counts.row + start
    kept = (row < counts.col) & (counts.data >= 2)
    first.append(row[kept])
    second.append(counts.col[kept])
    overlap.append(counts.data[kept])
  a, b, n = (np.concatenate(x) for x in (first, second, overlap))
  both = [
    matrix[a[start : start + _USER_PAIRS]].multiply(
      matrix[b[start : start + _USER_PAIRS]]
    )
    for start in range(0, len(a), _USER_PAIRS)
  ]
  none = sp.csr_matrix((0, matrix.shape[1]), dtype=np.float32)
  return sp.vstack([none, *both], "csr"), 1 / (ALPHA + n.astype(np.float64))
