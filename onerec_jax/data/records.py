"""Sorted event rows → one record a user."""

import collections
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from onerec_jax.data import duration, features, shards


def whole_users(
  stream: Iterator[pa.RecordBatch],
) -> Iterator[dict[str, np.ndarray]]:
  """Regroups batches sorted by `dense_user` so that no user is cut in two.

  Yields:
    Column → array [n] of one or more whole users.
  """
  rest: dict[str, list[np.ndarray]] = collections.defaultdict(list)
  for batch in stream:
    arrays = {
      name: array.to_numpy(zero_copy_only=False)
      for name, array in zip(batch.schema.names, batch.columns)
    }
    users = arrays["dense_user"]
    last = int(np.searchsorted(users, users[-1]))
    if last:
      yield {
        name: np.concatenate([*rest[name], array[:last]])
        for name, array in arrays.items()
      }
      rest.clear()
    elif rest and rest["dense_user"][-1][-1] != users[0]:
      yield {name: np.concatenate(parts) for name, parts in rest.items()}
      rest.clear()
    for name, array in arrays.items():
      rest[name].append(array[last:])
  if rest:
    yield {name: np.concatenate(parts) for name, parts in rest.items()}


def split_users(
  chunk: dict[str, np.ndarray],
  bucketing: Mapping[str, Mapping[str, features.Spec]],
  user_columns: Mapping[str, np.ndarray],
  ordinal: bool,
  signals: Sequence[str] = (),
  durations: np.ndarray | None = None,
) -> Iterator[shards.UserRecord]:
  """Records of the users of a chunk.

  Args:
    chunk: columns of queries.records, of whole users.
    bucketing: specs of event features under `event`.
    user_columns: name → int32 [U] codes, index = dense user - 1.
    ordinal: number the events of a user instead of giving their times.
    signals: names of the record's signals: columns, or `play_quantile`.
    durations: float [I + 1] milliseconds by dense item, for `play_quantile`.
  """
  users = chunk["dense_user"]
  first = np.diff(users, prepend=0) != 0
  starts = np.flatnonzero(first)
  lengths = np.diff(np.append(starts, len(users)))
  times = chunk["timestamp_ms"]
  if ordinal:
    times = np.arange(len(users)) - np.repeat(starts, lengths)
  values = features.event_features(bucketing, chunk, times, first)
  for start, length in zip(starts.tolist(), lengths.tolist()):
    part = slice(start, start + length)
    user = int(users[start])
    measured = {name: chunk[name][part] for name in signals if name in chunk}
    if "play_quantile" in signals:
      measured["play_quantile"] = duration.play_quantiles(
        chunk["request"][part],
        durations[chunk["dense_item"][part]],
        chunk["play_time_ms"][part],
      )
    yield shards.UserRecord(
      user=user,
      items=chunk["dense_item"][part].astype(np.int32),
      timestamps=times[part].astype(np.int64),
      split=chunk["split"][part].astype(np.int8),
      request=chunk["request"][part].astype(np.int32),
      positive=chunk["positive"][part].astype(bool),
      session=chunk["session"][part].astype(bool),
      features={name: v[part] for name, v in values.items()},
      user_features={n: int(c[user - 1]) for n, c in user_columns.items()},
      signals={n: measured[n].astype(np.float32) for n in signals},
    )
