"""Rows of a batch, built from users' records.

A training row holds whole segments of one or more users (data/packing.py); a
request, of evaluation or of the recommender, has a row of its own. Both are
written by the same functions, so a model meets one layout everywhere.

With `pipeline.pathways` on, a row is one request: the user token, then a fixed
stretch of positions for each pathway (OneRec-V1 §2.2), events oldest first and
ending at the last position of the stretch; every target sees the whole row.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from onerec_jax import config as config_lib
from onerec_jax.data import lifelong as lifelong_lib
from onerec_jax.data import packing, rsft, shards
from onerec_jax.data.batch import Batch


def feature_sizes(prepared: shards.PreparedData) -> dict[str, int]:
  """Batch features → number of values; user features get a prefix."""
  sizes = dict(prepared.manifest["event_features"])
  for name, size in prepared.manifest["user_features"].items():
    sizes[f"user_{name}"] = size
  return sizes


def check_imitate(
  prepared: shards.PreparedData, config: config_lib.PipelineConfig
) -> None:
  """Refuses a `pipeline.imitate` that is unknown or that the data lack."""
  if config.imitate not in ("all", "positive", "rsft"):
    raise ValueError(
      f"pipeline.imitate={config.imitate!r}: want all, positive or rsft"
    )
  if config.imitate == "rsft":
    rsft.median(prepared)


def imitated(
  prepared: shards.PreparedData,
  record: shards.UserRecord,
  config: config_lib.PipelineConfig,
) -> np.ndarray:
  """Which events [n] the next-token loss and evaluation ask for."""
  if config.imitate == "positive":
    return record.positive
  if config.imitate == "rsft":
    return rsft.kept(prepared, record)
  return np.ones(len(record.items), bool)


def labels(
  prepared: shards.PreparedData,
  record: shards.UserRecord,
  config: config_lib.PipelineConfig,
) -> dict[str, np.ndarray]:
  """Name → float32 [n]: the labels of a user's events (see data/batch.py)."""
  found = {}
  if config.imitate != "all":
    wanted = imitated(prepared, record, config)
    found["weight"] = wanted.astype(np.float32)
  if config.labels:
    found["positive"] = record.positive.astype(np.float32)
    for name, spec in prepared.manifest["bucketing"]["event"].items():
      if spec["kind"] == "flag":
        bucket = record.features[name]
        found[name] = np.where(bucket, bucket - 1.0, np.nan).astype(np.float32)
    found |= record.signals
  return found


def event_labels(
  prepared: shards.PreparedData,
  events: Sequence[tuple[shards.UserRecord, int]],
  config: config_lib.PipelineConfig,
  batch_size: int,
) -> dict[str, np.ndarray]:
  """Name → [batch_size, 1]: the labels of single events, 0 at the rest."""
  found: dict[str, np.ndarray] = {}
  for row, (record, event) in enumerate(events):
    for name, values in labels(prepared, record, config).items():
      column = found.setdefault(name, np.zeros((batch_size, 1), np.float32))
      column[row] = values[event]
  return found


class History(NamedTuple):
  """What is known of a user before a request.

  Attributes:
    items: int32 [n] dense ids, oldest first; may be empty.
    features: event feature → int32 [n].
    positive: bool [n] which events are positive feedback.
    user_features: of the user.
    lifelong: representatives of the history; None: there are none.
  """

  items: np.ndarray
  features: dict[str, np.ndarray]
  positive: np.ndarray
  user_features: dict[str, int]
  lifelong: lifelong_lib.Snapshot | None = None


def before(
  prepared: shards.PreparedData, record: shards.UserRecord, event: int
) -> History:
  """What is known of a stored user before one of the events.

  Args:
    prepared: the data.
    record: of the user.
    event: counted from 0; the number of all events: everything is known.
  """
  found = None
  if prepared.snapshots is not None:
    found = prepared.snapshots.before(record.user - 1, event)
  return History(
    record.items[:event],
    {name: values[:event] for name, values in record.features.items()},
    record.positive[:event],
    record.user_features,
    found,
  )


def _empty_row(names: Sequence[str], S: int, T: int) -> dict[str, Any]:
  row: dict[str, Any] = {
    name: np.zeros(S, np.int32) for name in ("items", "segment")
  }
  row["features"] = {name: np.zeros(S, np.int32) for name in names}
  row["labels"] = {}
  for name in ("targets", "visible_from", "visible_until"):
    row[name] = np.zeros(T, np.int32)
  return row


def _put(
  row: dict[str, Any],
  offset: int,
  number: int,
  history: History,
  events: slice | np.ndarray,
) -> None:
  """Writes events of a history, from `offset` on."""
  stop = offset + len(history.items[events])
  row["segment"][offset:stop] = number
  row["items"][offset:stop] = history.items[events]
  for name, values in history.features.items():
    row["features"][name][offset:stop] = values[events]


def _put_user(
  row: dict[str, Any], offset: int, number: int, features: dict[str, int]
) -> None:
  """Writes a user token."""
  row["segment"][offset] = number
  for name, value in features.items():
    row["features"][f"user_{name}"][offset] = value


def _put_pathways(
  row: dict[str, Any],
  history: History,
  lengths: config_lib.PathwaysConfig,
  targets: int,
) -> None:
  """Writes a request's pathways; its first `targets` targets see all of them.

  Args:
    row: an empty row.
    history: everything before the request.
    lengths: of the pathways.
    targets: how many there are.
  """
  _put_user(row, 0, 1, history.user_features)
  n, end = len(history.items), 1 + lengths.short
  recent = slice(max(0, n - lengths.short), n)
  _put(row, end - (recent.stop - recent.start), 1, history, recent)
  end += lengths.positive
  if lengths.positive:
    liked = np.flatnonzero(history.positive)[-lengths.positive :]
    _put(row, end - len(liked), 1, history, liked)
  end += lengths.lifelong
  if lengths.lifelong and history.lifelong is not None:
    snapshot = history.lifelong
    start = end - len(snapshot.event)
    _put(row, start, 1, history, snapshot.event)
    for name, values in snapshot.averages.items():
      row["features"][name][start:end] = values
  row["visible_until"][:targets] = lengths.positions


class PackedRows:
  """Random access to packed training rows, for grain.

  Attributes:
    segments: what is packed; with `pipeline.order=time` in order of time.
    rows: of each row, which segments it holds.
  """

  def __init__(
    self,
    prepared: shards.PreparedData,
    segments: packing.Segments,
    config: config_lib.PipelineConfig,
  ):
    self._prepared = prepared
    self._config = config
    self._names = sorted(feature_sizes(prepared))
    self.segments = segments
    if config.pathways.on:
      self.rows = [np.asarray([i], np.int32) for i in range(len(segments))]
      return
    pack = packing.pack if config.order == "shuffled" else packing.pack_in_order
    self.rows = pack(
      segments.positions,
      segments.stop - segments.first_target,
      config.row_positions,
      config.row_targets,
    )

  def __len__(self) -> int:
    return len(self.rows)

  def __getitem__(self, index: int) -> dict[str, Any]:
    if self._config.pathways.on:
      return self._of_pathways(int(index))
    config, segments = self._config, self.segments
    row = _empty_row(self._names, config.row_positions, config.row_targets)
    position = target = 0
    for number, i in enumerate(self.rows[int(index)], start=1):
      user, start, first, stop, length = (
        int(column[i])
        for column in (
          segments.user, segments.start, segments.first_target,
          segments.stop, segments.positions,
        )
      )  # fmt: skip
      record = self._prepared.user(user)
      history = before(self._prepared, record, start + length - 1)
      _put_user(row, position, number, record.user_features)
      _put(row, position + 1, number, history, slice(start, None))
      # What came before a target, as far as the segment's context goes.
      until = np.minimum(np.arange(first, stop), start + length - 1)
      slots = slice(target, target + stop - first)
      origin = position + 1 - start  # row position of the user's event 0
      row["targets"][slots] = record.items[first:stop]
      self._label(row, slots, record, slice(first, stop))
      row["visible_until"][slots] = origin + until
      row["visible_from"][slots] = origin + np.maximum(
        start, until - config.max_history
      )
      position += length
      target += stop - first
    return row

  def _label(
    self,
    row: dict[str, Any],
    slots: slice,
    record: shards.UserRecord,
    events: slice,
  ) -> None:
    """Writes the labels of targets."""
    found = labels(self._prepared, record, self._config)
    for name, values in found.items():
      column = row["labels"].setdefault(
        name, np.zeros(len(row["targets"]), np.float32)
      )
      column[slots] = values[events]

  def _of_pathways(self, index: int) -> dict[str, Any]:
    """The row of one segment: targets of a request, and all before it."""
    config, segments = self._config, self.segments
    row = _empty_row(self._names, config.pathways.positions, config.row_targets)
    record = self._prepared.user(int(segments.user[index]))
    request = segments.start[index] + segments.positions[index] - 1
    wanted = slice(segments.first_target[index], segments.stop[index])
    targets = record.items[wanted]
    row["targets"][: len(targets)] = targets
    self._label(row, slice(len(targets)), record, wanted)
    history = before(self._prepared, record, int(request))
    _put_pathways(row, history, config.pathways, len(targets))
    return row


def request_batch(
  histories: Sequence[History],
  names: Sequence[str],
  config: config_lib.PipelineConfig,
  batch_size: int,
) -> Batch:
  """One row a request: the user token, then the last max_history events.

  Or the user token and the pathways, where they are on.

  Args:
    histories: of the requests.
    names: every feature of the data (`feature_sizes`).
    config: the pipeline's part of the config.
    batch_size: rows; those beyond the requests stay empty.
  """
  pathways = config.pathways
  positions = pathways.positions if pathways.on else config.max_history + 1
  rows = [_empty_row(names, positions, 1) for _ in range(batch_size)]
  for row, history in zip(rows, histories):
    if pathways.on:
      _put_pathways(row, history, pathways, 1)
      continue
    n = len(history.items)
    recent = slice(max(0, n - config.max_history), n)
    _put_user(row, 0, 1, history.user_features)
    _put(row, 1, 1, history, recent)
    row["visible_from"][0] = 1
    row["visible_until"][0] = 1 + recent.stop - recent.start
  columns = {
    name: np.stack([row[name] for row in rows])
    for name in rows[0]
    if name not in ("features", "labels")
  }
  features = {
    name: np.stack([row["features"][name] for row in rows]) for name in names
  }
  return Batch(features=features, **columns)
