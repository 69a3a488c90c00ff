"""Rows of a batch, built from users' records.

A training row holds whole segments of one or more users (data/packing.py); a
request, of evaluation or of the recommender, has a row of its own. Both are
written by the same function, so a model meets one layout everywhere.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from onerec_jax import config as config_lib
from onerec_jax.data import packing, shards
from onerec_jax.data.batch import Batch


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
      events = slice(start, start + length - 1)
      _put_context(
        row, position, number, record.items[events],
        {k: v[events] for k, v in record.features.items()},
        record.user_features,
      )  # fmt: skip
      # What came before a target, as far as the segment's context goes.
      until = np.minimum(np.arange(first, stop), start + length - 1)
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
