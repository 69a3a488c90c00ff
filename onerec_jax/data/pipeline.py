"""Shards → batches, by grain.

The order of rows is a pure function of (seed, step, process): segments are
packed into rows once (data/packing.py), grain shuffles the rows anew each
epoch from the seed, and each process reads every n-th. The iterator's state
is one index; it is saved with the model.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import grain
import numpy as np

from onerec_jax import config as config_lib
from onerec_jax.data import packing, shards
from onerec_jax.data.batch import Batch

TRAIN, VALIDATION, TEST = 0, 1, 2

# Epochs. grain's own endless repeat has sys.maxsize elements, which overflows
# in batches of one row.
_ENDLESS = 2**31


@dataclasses.dataclass(frozen=True)
class Queries:
  """What an evaluation batch asks; row i belongs to batch row i.

  Attributes:
    user: [B] dense user; 0 at rows that only fill the batch.
    target: [B] the item that came next.
    seen: every item of the history before it, not cut to max_history.
  """

  user: np.ndarray
  target: np.ndarray
  seen: list[np.ndarray]


def feature_sizes(prepared: shards.PreparedData) -> dict[str, int]:
  """Batch features → number of values; user features get a prefix."""
  sizes = dict(prepared.manifest["event_features"])
  for name, size in prepared.manifest["user_features"].items():
    sizes[f"user_{name}"] = size
  return sizes


def _empty_row(names: Sequence[str], S: int, T: int) -> dict[str, Any]:
  row: dict[str, Any] = {
    name: np.zeros(S, np.int32) for name in ("items", "segment")
  }
  row["features"] = {name: np.zeros(S, np.int32) for name in names}
  for name in ("targets", "visible_from", "visible_until"):
    row[name] = np.zeros(T, np.int32)
  return row


def _put_context(
  row: dict[str, Any],
  offset: int,
  number: int,
  items: np.ndarray,
  event_features: dict[str, np.ndarray],
  user_features: dict[str, int],
) -> None:
  """Writes a user token and the events after it, from `offset` on."""
  stop = offset + 1 + len(items)
  row["segment"][offset:stop] = number
  row["items"][offset + 1 : stop] = items
  for name, values in event_features.items():
    row["features"][name][offset + 1 : stop] = values
  for name, value in user_features.items():
    row["features"][f"user_{name}"][offset] = value


class _Rows:
  """Random access to packed training rows, for grain."""

  def __init__(
    self, prepared: shards.PreparedData, config: config_lib.PipelineConfig
  ):
    self._prepared = prepared
    self._config = config
    self._names = sorted(feature_sizes(prepared))
    self._segments = _training_segments(prepared, config)
    if not len(self._segments):
      raise ValueError(
        "the training split holds no events; check the split and the filters "
        "of config.prepare"
      )
    self._rows = packing.pack(
      self._segments.positions,
      self._segments.stop - self._segments.first_target,
      config.row_positions,
      config.row_targets,
    )

  def __len__(self) -> int:
    return len(self._rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    config, segments = self._config, self._segments
    row = _empty_row(self._names, config.row_positions, config.row_targets)
    position = target = 0
    for number, i in enumerate(self._rows[int(index)], start=1):
      user, start, first, stop, length = (
        int(column[i])
        for column in (
          segments.user, segments.start, segments.first_target,
          segments.stop, segments.positions,
        )
      )  # fmt: skip
      record = self._prepared.user(user)
      events = slice(start, start + length - 1)
      _put_context(
        row, position, number, record.items[events],
        {k: v[events] for k, v in record.features.items()},
        record.user_features,
      )  # fmt: skip
      if config.targets == "request":
        until = np.full(stop - first, start + length - 1)
      else:
        until = np.arange(first, stop)
      slots = slice(target, target + stop - first)
      origin = position + 1 - start  # row position of the user's event 0
      row["targets"][slots] = record.items[first:stop]
      row["visible_until"][slots] = origin + until
      row["visible_from"][slots] = origin + np.maximum(
        start, until - config.max_history
      )
      position += length
      target += stop - first
    return row


def _training_segments(
  prepared: shards.PreparedData, config: config_lib.PipelineConfig
) -> packing.Segments:
  sizes = (config.row_positions, config.row_targets, config.max_history)
  if config.targets == "next_item":
    return packing.next_item_segments(prepared.train_lengths, *sizes)
  if config.targets != "request":
    raise ValueError(
      f"pipeline.targets={config.targets!r}: want next_item or request"
    )
  users, first, stop = [], [], []
  for user in range(len(prepared)):
    record = prepared.user(user)
    request = record.request[record.split == TRAIN]
    if len(request):
      starts = np.flatnonzero(np.diff(request, prepend=request[0] - 1))
      users.append(np.full(len(starts), user))
      first.append(starts)
      stop.append(np.append(starts[1:], len(request)))
  if not users:
    return packing.next_item_segments(np.zeros(0, np.int64), *sizes)
  columns = (np.concatenate(column) for column in (users, first, stop))
  return packing.request_segments(*columns, *sizes)


def training_dataset(
  prepared: shards.PreparedData,
  config: config_lib.PipelineConfig,
  seed: int,
  process: int = 0,
  num_processes: int = 1,
) -> tuple[grain.IterDataset, int]:
  """Endless batches of this process, and the steps of an epoch.

  Args:
    prepared: the data.
    config: the pipeline's part of the config.
    seed: of the order of rows.
    process: this process.
    num_processes: how many share the global batch.

  Raises:
    ValueError: an empty training split, or sizes that do not fit.
  """
  if config.batch_size % num_processes:
    raise ValueError(
      f"pipeline.batch_size={config.batch_size} is no multiple of the "
      f"{num_processes} processes"
    )
  rows = _Rows(prepared, config)
  dataset = (
    grain.MapDataset.source(rows)
    .seed(seed)
    .shuffle()
    .repeat(_ENDLESS)[process::num_processes]
    .batch(config.batch_size // num_processes)
    .map(lambda columns: Batch(**columns))
    .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
  )
  return dataset, max(1, round(len(rows) / config.batch_size))


def request_batch(
  histories: Sequence[np.ndarray],
  event_features: Sequence[dict[str, np.ndarray]],
  user_features: Sequence[dict[str, int]],
  names: Sequence[str],
  config: config_lib.PipelineConfig,
  batch_size: int,
) -> Batch:
  """One row a request: the user token, then the last max_history events.

  Args:
    histories: dense item ids, oldest first; may be empty.
    event_features: of each history, as long as it.
    user_features: of each user.
    names: every feature of the data (`feature_sizes`).
    config: the pipeline's part of the config.
    batch_size: rows; those beyond the requests stay empty.
  """
  rows = []
  for history, events, user in zip(histories, event_features, user_features):
    row = _empty_row(names, config.max_history + 1, 1)
    recent = slice(max(0, len(history) - config.max_history), len(history))
    _put_context(
      row, 0, 1, history[recent],
      {k: v[recent] for k, v in events.items()}, user,
    )  # fmt: skip
    row["visible_from"][0] = 1
    row["visible_until"][0] = 1 + recent.stop - recent.start
    rows.append(row)
  while len(rows) < batch_size:
    rows.append(_empty_row(names, config.max_history + 1, 1))
  columns = {
    name: np.stack([row[name] for row in rows])
    for name in rows[0]
    if name != "features"
  }
  features = {
    name: np.stack([row["features"][name] for row in rows]) for name in names
  }
  return Batch(features=features, **columns)


def evaluation_batches(
  prepared: shards.PreparedData,
  split: int,
  config: config_lib.PipelineConfig,
  batch_size: int,
  users: np.ndarray | None = None,
) -> Iterator[tuple[Batch, Queries]]:
  """One query an event of the split: what came before it → the event.

  The history of a test event holds the validation events before it.

  Args:
    prepared: the data.
    split: VALIDATION or TEST.
    config: the pipeline's part of the config.
    batch_size: rows of every batch; the last one is filled with empty rows.
    users: indices (dense user − 1) to ask for; default: all.

  Yields:
    Batches with T = 1 and what they ask.
  """
  names = sorted(feature_sizes(prepared))
  pending: list[tuple[shards.UserRecord, int]] = []

  def flush() -> tuple[Batch, Queries]:
    batch = request_batch(
      [record.items[:i] for record, i in pending],
      [{k: v[:i] for k, v in r.features.items()} for r, i in pending],
      [record.user_features for record, _ in pending],
      names, config, batch_size,
    )  # fmt: skip
    user = np.zeros(batch_size, np.int32)
    target = np.zeros(batch_size, np.int32)
    user[: len(pending)] = [record.user for record, _ in pending]
    target[: len(pending)] = [record.items[i] for record, i in pending]
    batch = batch.replace(targets=target[:, None])
    seen = [record.items[:i] for record, i in pending]
    seen += [np.zeros(0, np.int32)] * (batch_size - len(pending))
    return batch, Queries(user, target, seen)

  for index in range(len(prepared)) if users is None else users:
    record = prepared.user(int(index))
    for event in np.flatnonzero(record.split == split):
      pending.append((record, int(event)))
      if len(pending) == batch_size:
        yield flush()
        pending = []
  if pending:
    yield flush()


def sample_users(
  prepared: shards.PreparedData, number: int, seed: int = 0
) -> np.ndarray | None:
  """A fixed random sample of users, sorted; None (all) where it covers them."""
  if number <= 0 or number >= len(prepared):
    return None
  rng = np.random.default_rng(seed)
  return np.sort(rng.choice(len(prepared), number, replace=False))
