"""Held-out requests: what a model of whole sessions is asked."""

import dataclasses
from collections.abc import Iterator

import numpy as np

from onerec_jax import config as config_lib
from onerec_jax.data import rows as rows_lib
from onerec_jax.data import shards
from onerec_jax.data.batch import Batch


@dataclasses.dataclass(frozen=True)
class Requests:
  """Held-out requests; Q of them, in the order of users.

  Attributes:
    user: [Q] dense user.
    number: [Q] which request of the user, from 0.
    first: [Q] its first event among the user's.
    good: [Q] whether it is one to learn from (UserRecord.session).
    items: Q arrays, what the request holds, in order; at least m.
  """

  user: np.ndarray
  number: np.ndarray
  first: np.ndarray
  good: np.ndarray
  items: list[np.ndarray]

  def __len__(self) -> int:
    return len(self.user)


def requests(
  prepared: shards.PreparedData,
  split: int,
  m: int,
  limit: int = 0,
  seed: int = 0,
) -> Requests:
  """Requests that lie in a split as a whole.

  Args:
    prepared: the data.
    split: splits.VALIDATION or TEST.
    m: requests of fewer items are left out.
    limit: a random sample of at most so many; 0: all.
    seed: of the sample.

  Raises:
    ValueError: there is none.
  """
  rows: list[tuple[int, int, int, bool]] = []
  items: list[np.ndarray] = []
  for index in range(len(prepared)):
    record = prepared.user(index)
    starts = np.flatnonzero(np.diff(record.request, prepend=-1))
    stops = np.append(starts[1:], len(record.request))
    for first, stop in zip(starts.tolist(), stops.tolist()):
      whole = (record.split[first:stop] == split).all()
      if whole and stop - first >= m:
        number = int(record.request[first])
        rows.append((record.user, number, first, bool(record.session[first])))
        items.append(record.items[first:stop])
  if not rows:
    raise ValueError(
      f"no held-out request of {m} items or more; hold out by time "
      "(--config.prepare.split=time), as leave-one-out cuts requests, or "
      "lower pipeline.session_items"
    )
  kept = np.arange(len(rows))
  if 0 < limit < len(rows):
    rng = np.random.default_rng(seed)
    kept = np.sort(rng.choice(len(rows), limit, replace=False))
  user, number, first, good = (
    np.asarray(column)[kept] for column in zip(*rows)
  )
  return Requests(user, number, first, good, [items[i] for i in kept])


def batches(
  prepared: shards.PreparedData,
  asked: Requests,
  config: config_lib.PipelineConfig,
  m: int,
  batch_size: int,
) -> Iterator[tuple[Batch, np.ndarray]]:
  """One row a request: what came before it → its first m items.

  Yields:
    Batches with T = m (the last one filled with empty rows), and which of the
    requests they hold.
  """
  names = sorted(rows_lib.feature_sizes(prepared))
  for start in range(0, len(asked), batch_size):
    rows = np.arange(start, min(start + batch_size, len(asked)))
    records = [prepared.user(int(asked.user[i]) - 1) for i in rows]
    first = asked.first[rows].tolist()
    histories = [
      rows_lib.before(prepared, *pair) for pair in zip(records, first)
    ]
    batch = rows_lib.request_batch(histories, names, config, batch_size)
    targets = np.zeros((batch_size, m), np.int32)
    targets[: len(rows)] = [asked.items[i][:m] for i in rows]
    yield (
      batch.replace(
        targets=targets,
        visible_from=np.repeat(batch.visible_from, m, axis=1),
        visible_until=np.repeat(batch.visible_until, m, axis=1),
      ),
      rows,
    )


def first_of_session(batch: Batch) -> Batch:
  """The batch with T = 1, as search wants it."""
  return batch.replace(
    targets=batch.targets[:, :1],
    visible_from=batch.visible_from[:, :1],
    visible_until=batch.visible_until[:, :1],
  )
