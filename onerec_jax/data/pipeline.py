"""Shards → batches, by grain.

The order of rows is a pure function of (seed, step): segments are packed into
rows once (packing.py, rows.py), and grain shuffles the rows anew each epoch
from the seed, or leaves them in order of time (`pipeline.order`). Each process
reads those rows of a batch that its devices hold.
The iterator's state is the step, whatever the number of processes; it is saved
with the model.
"""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence

import grain
import jax
import numpy as np

from onerec_jax import config as config_lib
from onerec_jax.data import packing, shards, splits
from onerec_jax.data import rows as rows_lib
from onerec_jax.data.batch import Batch

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


def _training_segments(
  prepared: shards.PreparedData, config: config_lib.PipelineConfig
) -> packing.Segments:
  sizes = (config.row_positions, config.row_targets, config.max_history)
  _check_pathways(prepared, config)
  if config.targets == "next_item":
    return packing.next_item_segments(prepared.train_lengths, *sizes)
  if config.targets not in _OF_REQUESTS:
    raise ValueError(
      f"pipeline.targets={config.targets!r}: want one of "
      f"{sorted(['next_item', *_OF_REQUESTS])}"
    )
  users, first, stop = [], [], []
  for user in range(len(prepared)):
    record = prepared.user(user)
    request = record.request[record.split == splits.TRAIN]
    if len(request):
      starts = np.flatnonzero(np.diff(request, prepend=request[0] - 1))
      stops = np.append(starts[1:], len(request))
      if config.targets in ("session", "exposed"):
        stops = _whole_sessions(starts, stops, config.session_items)
      if config.targets == "session":
        stops = np.where(record.session[starts], stops, starts)
      kept = stops > starts
      users.append(np.full(kept.sum(), user))
      first.append(starts[kept])
      stop.append(stops[kept])
  if not users:
    return packing.next_item_segments(np.zeros(0, np.int64), *sizes)
  columns = (np.concatenate(column) for column in (users, first, stop))
  return _OF_REQUESTS[config.targets](*columns, *sizes)


def _check_pathways(
  prepared: shards.PreparedData, config: config_lib.PipelineConfig
) -> None:
  """Refuses pathways that the targets or the data do not go with."""
  pathways = config.pathways
  if pathways.on and config.targets not in ("request", "session", "exposed"):
    raise ValueError(
      f"{pathways} show a request's targets all that came before it, and "
      f"pipeline.targets={config.targets} has targets at other times: set "
      "--config.pipeline.targets=request (or session)"
    )
  if pathways.lifelong and prepared.snapshots is None:
    raise ValueError(
      f"pipeline.pathways.lifelong={pathways.lifelong} reads compressed "
      "histories, and there are none; run python -m launch.compress"
    )


def _whole_sessions(
  starts: np.ndarray, stops: np.ndarray, m: int
) -> np.ndarray:
  """Where the targets of each request end: after as many groups of m as fit.

  INFERRED: a request of more items is several sessions with one context; what
  it has beyond them is context of later requests alone.
  """
  return starts + (stops - starts) // m * m


_OF_REQUESTS = {
  "request": packing.request_segments,
  "session": packing.request_segments,
  "exposed": packing.request_segments,
  "history": packing.history_segments,
}
"""`pipeline.targets` → the segments of requests."""


def training_rows(
  prepared: shards.PreparedData, config: config_lib.PipelineConfig
) -> rows_lib.PackedRows:
  """The rows of an epoch, before any shuffling.

  Raises:
    ValueError: an empty training split, or sizes or an order that do not fit.
  """
  rows_lib.check_imitate(prepared, config)
  segments = _training_segments(prepared, config)
  if not len(segments):
    raise ValueError(
      "the training split holds no events, or none of a session that "
      "prepare.session marks; check the split and the filters of config.prepare"
    )
  if config.order == "time":
    segments = _by_time(prepared, segments)
  elif config.order != "shuffled":
    raise ValueError(f"pipeline.order={config.order!r}: want shuffled or time")
  return rows_lib.PackedRows(prepared, segments, config)


def _by_time(
  prepared: shards.PreparedData, segments: packing.Segments
) -> packing.Segments:
  """Segments in the order in which their last targets happened."""
  if prepared.manifest.get("ordinal_time", False):
    raise ValueError(
      "pipeline.order=time needs times, and this source has none; use "
      "pipeline.order=shuffled"
    )
  times = np.zeros(len(segments), np.int64)
  by_user = np.argsort(segments.user, kind="stable")
  users, starts = np.unique(segments.user[by_user], return_index=True)
  for user, own in zip(users.tolist(), np.split(by_user, starts[1:])):
    times[own] = prepared.user(user).timestamps[segments.stop[own] - 1]
  order = np.argsort(times, kind="stable")
  return packing.Segments(*(x[order] for x in vars(segments).values()))


def training_dataset(
  prepared: shards.PreparedData,
  config: config_lib.PipelineConfig,
  seed: int,
  held: Sequence[int] | np.ndarray | None = None,
) -> tuple[grain.IterDataset, int]:
  """Endless batches, and the steps of an epoch.

  Args:
    prepared: the data.
    config: the pipeline's part of the config.
    seed: of the order of rows.
    held: which rows of each global batch to read
      (`partitioning.local_rows`); default: all.

  Raises:
    ValueError: an empty training split, or sizes that do not fit.
  """
  packed = training_rows(prepared, config)
  held = np.arange(config.batch_size) if held is None else np.asarray(held)

  def read(numbers: np.ndarray) -> Batch:
    rows = [packed[number] for number in numbers[held].tolist()]
    return Batch(**jax.tree.map(lambda *values: np.stack(values), *rows))

  numbers = grain.MapDataset.range(len(packed)).seed(seed)
  dataset = (
    (numbers.shuffle() if config.order == "shuffled" else numbers)
    .repeat(_ENDLESS)
    .batch(config.batch_size)
    .map(read)
    .to_iter_dataset(grain.ReadOptions(num_threads=2, prefetch_buffer_size=4))
  )
  return dataset, max(1, round(len(packed) / config.batch_size))


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
    split: splits.VALIDATION or TEST.
    config: the pipeline's part of the config.
    batch_size: rows of every batch; the last one is filled with empty rows.
    users: indices (dense user − 1) to ask for; default: all.

  Yields:
    Batches with T = 1 and what they ask.
  """
  names = sorted(rows_lib.feature_sizes(prepared))
  pending: list[tuple[shards.UserRecord, int]] = []

  def flush() -> tuple[Batch, Queries]:
    histories = [rows_lib.before(prepared, *asked) for asked in pending]
    batch = rows_lib.request_batch(histories, names, config, batch_size)
    user = np.zeros(batch_size, np.int32)
    target = np.zeros(batch_size, np.int32)
    user[: len(pending)] = [record.user for record, _ in pending]
    target[: len(pending)] = [record.items[i] for record, i in pending]
    batch = batch.replace(
      targets=target[:, None],
      labels=rows_lib.event_labels(prepared, pending, config, batch_size),
    )
    seen = [record.items[:i] for record, i in pending]
    seen += [np.zeros(0, np.int32)] * (batch_size - len(pending))
    return batch, Queries(user, target, seen)

  for index in range(len(prepared)) if users is None else users:
    record = prepared.user(int(index))
    for event in _asked(prepared, record, split, config):
      pending.append((record, int(event)))
      if len(pending) == batch_size:
        yield flush()
        pending = []
  if pending:
    yield flush()


def _asked(
  prepared: shards.PreparedData,
  record: shards.UserRecord,
  split: int,
  config: config_lib.PipelineConfig,
) -> np.ndarray:
  """The events of a user that are asked for in a split."""
  wanted = rows_lib.imitated(prepared, record, config)
  return np.flatnonzero(wanted & (record.split == split))


def sample_users(
  prepared: shards.PreparedData,
  number: int,
  split: int,
  config: config_lib.PipelineConfig,
  seed: int = 0,
) -> np.ndarray | None:
  """A fixed random sample of the users that a split asks for something.

  Args:
    prepared: the data.
    number: how many; fewer where there are no more.
    split: splits.VALIDATION or TEST.
    config: the pipeline's part of the config.
    seed: of the sample.

  Returns:
    Indices (dense user − 1), sorted; None (all) where `number` is 0 or covers
    all users.
  """
  if number <= 0 or number >= len(prepared):
    return None
  rng = np.random.default_rng(seed)
  drawn = rng.choice(len(prepared), number, replace=False)
  others = np.setdiff1d(np.arange(len(prepared)), drawn)
  order = np.concatenate([drawn, rng.permutation(others)])
  # Known without a look at the user; in most logs that settles it.
  order = order[(prepared.lengths > prepared.train_lengths)[order]]
  asked = (
    index
    for index in order.tolist()
    if len(_asked(prepared, prepared.user(index), split, config))
  )
  return np.sort(np.fromiter(itertools.islice(asked, number), np.int64))
