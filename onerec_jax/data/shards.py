"""Prepared data on disk: one record a user in ArrayRecord shards.

A record is little-endian, no names, no pickle; the manifest has the names:

  int32 user, n, number of event features E, of user features, of signals P
  int64 [n] timestamps · int32 [n] items · int32 [n] request
  int32 [E, n] event features · int32 [...] user features · int8 [n] split
  int8 [n] positive · int8 [n] session · float32 [P, n] signals
"""

import functools
import json
import os
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from array_record.python import array_record_module

from onerec_jax import files

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
ITEMS = "items.parquet"
USERS = "users.parquet"
FEATURE_PREFIX = "feature_"

_HEADER = 5
# One record a chunk: any user is read without its neighbours.
_WRITER_OPTIONS = "group_size:1,zstd:3"
_READER_OPTIONS = "readahead_buffer_size:0,max_parallelism:0"


class UserRecord(NamedTuple):
  """All events of one user, oldest first.

  Attributes:
    user: dense user id, from 1.
    items: int32 [n] dense item ids.
    timestamps: int64 [n] milliseconds; 0, 1, … where the source has no times.
    split: int8 [n], 0 train, 1 validation, 2 test; never decreases.
    request: int32 [n] which request of the user, counted from 0; events
      without one are requests of their own.
    positive: bool [n] `prepare.positive` holds of the event.
    session: bool [n] `prepare.session` holds of the event's request.
    features: name → int32 [n] bucketed event features.
    user_features: name → bucketed static feature.
    signals: name → float32 [n] what was measured of an exposure, NaN where it
      was not: `play_time_ms`, `play_quantile` (duration.py) and
      `log_probability`. Labels of targets; no model reads them in a history.
  """

  user: int
  items: np.ndarray
  timestamps: np.ndarray
  split: np.ndarray
  request: np.ndarray
  positive: np.ndarray
  session: np.ndarray
  features: dict[str, np.ndarray]
  user_features: dict[str, int]
  signals: dict[str, np.ndarray]


def encode(record: UserRecord) -> bytes:
  """A user's record as bytes; features in the order of the dicts."""
  n = len(record.items)
  header = (
    record.user,
    n,
    len(record.features),
    len(record.user_features),
    len(record.signals),
  )
  parts = [
    np.asarray(header, "<i4"),
    np.asarray(record.timestamps, "<i8"),
    np.asarray(record.items, "<i4"),
    np.asarray(record.request, "<i4"),
    *(np.asarray(f, "<i4") for f in record.features.values()),
    np.asarray(list(record.user_features.values()), "<i4"),
    np.asarray(record.split, "i1"),
    np.asarray(record.positive, "i1"),
    np.asarray(record.session, "i1"),
    *(np.asarray(s, "<f4") for s in record.signals.values()),
  ]
  return b"".join(part.tobytes() for part in parts)


def decode(
  content: bytes,
  event_features: Sequence[str],
  user_features: Sequence[str],
  signals: Sequence[str],
) -> UserRecord:
  """The inverse of `encode`; arrays are read-only views of the bytes.

  Raises:
    ValueError: the bytes are not a record with these features and signals.
  """
  events, statics = len(event_features), len(user_features)
  numbers = events, statics, len(signals)
  header = np.frombuffer(content, "<i4", min(_HEADER, len(content) // 4))
  n = int(header[1]) if len(header) == _HEADER else -1
  size = 4 * _HEADER + n * (8 + 4 + 4 + 4 * events + 3 + 4 * len(signals))
  size += 4 * statics
  if n < 0 or tuple(header[2:]) != numbers or size != len(content):
    raise ValueError(
      f"a record of {len(content)} bytes with header {header.tolist()} does "
      f"not hold {events} event and {statics} user features and "
      f"{len(signals)} signals; run launch.prepare again"
    )
  times = np.frombuffer(content, "<i8", n, 4 * _HEADER)
  offset = 4 * _HEADER + 8 * n
  body = np.frombuffer(content, "<i4", (2 + events) * n, offset)
  body = body.reshape(2 + events, n)
  offset += body.nbytes
  static = np.frombuffer(content, "<i4", statics, offset)
  offset += static.nbytes
  marks = np.frombuffer(content, "i1", 3 * n, offset)
  split, positive, session = marks.reshape(3, n)
  measured = np.frombuffer(content, "<f4", len(signals) * n, offset + 3 * n)
  return UserRecord(
    user=int(header[0]),
    items=body[0],
    timestamps=times,
    split=split,
    request=body[1],
    positive=positive != 0,
    session=session != 0,
    features=dict(zip(event_features, body[2:])),
    user_features=dict(zip(user_features, static.tolist())),
    signals=dict(zip(signals, measured.reshape(len(signals), n))),
  )


def writer(path: files.PathLike) -> array_record_module.ArrayRecordWriter:
  """Writes records that are read one by one."""
  return array_record_module.ArrayRecordWriter(str(path), _WRITER_OPTIONS)


def reader(path: files.PathLike) -> array_record_module.ArrayRecordReader:
  """Reads any of them."""
  return array_record_module.ArrayRecordReader(str(path), _READER_OPTIONS)


def shard_starts(num_users: int, num_shards: int) -> list[int]:
  """First user (from 0) of each contiguous shard, and `num_users` at the end.

  No shard is empty: fewer users than shards make fewer shards.
  """
  count = max(1, min(num_shards, num_users))
  return [num_users * shard // count for shard in range(count + 1)]


def write(
  directory: files.PathLike,
  records: Iterable[UserRecord],
  num_users: int,
  num_shards: int,
) -> list[dict[str, Any]]:
  """Writes users 1 … num_users, given in order, into shards.

  Returns:
    For the manifest: name, sha256 and number of records of each shard.

  Raises:
    ValueError: other users than that came, or in another order.
  """
  starts = shard_starts(num_users, num_shards)
  count = len(starts) - 1
  users = iter(records)
  shards = []
  for shard in range(count):
    name = f"users-{shard:05d}-of-{count:05d}.array_record"
    path = pathlib.Path(directory) / name
    out = writer(path)
    for user in range(starts[shard] + 1, starts[shard + 1] + 1):
      record = next(users, None)
      if record is None or record.user != user:
        found = "the end" if record is None else f"user {record.user}"
        raise ValueError(f"expected user {user} of {num_users}, found {found}")
      out.write(encode(record))
    out.close()
    size = starts[shard + 1] - starts[shard]
    shards.append({"name": name, "sha256": files.sha256(path), "records": size})
  if next(users, None) is not None:
    raise ValueError(f"more users than the {num_users} announced")
  return shards


def read_manifest(directory: files.PathLike) -> dict[str, Any]:
  """The manifest of a prepared directory.

  Raises:
    FileNotFoundError: nothing is prepared there.
    ValueError: it is broken, or newer than this version can read.
  """
  path = pathlib.Path(directory) / MANIFEST
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} does not exist; run launch.prepare with this work directory"
    )
  manifest = files.read_json(path)
  version = manifest.get("format_version") if type(manifest) is dict else None
  if not isinstance(version, int):
    raise ValueError(
      f"{path} is not a manifest of prepared data (no format_version); delete "
      f"{path.parent} and run launch.prepare again"
    )
  if version > FORMAT_VERSION:
    raise ValueError(
      f"{path} has format_version {version}, this version of onerec_jax reads "
      f"up to {FORMAT_VERSION}; update onerec_jax, or delete {path.parent} "
      "and run launch.prepare again"
    )
  missing = _KEYS - set(manifest)
  if missing:
    raise ValueError(
      f"{path} lacks {sorted(missing)}; delete {path.parent} and run "
      "launch.prepare again"
    )
  return manifest


_KEYS = {
  "fingerprint",
  "num_users",
  "num_items",
  "event_features",
  "user_features",
  "item_features",
  "signals",
  "bucketing",
  "shards",
  "tables",
}


def verify(directory: files.PathLike, manifest: dict[str, Any]) -> None:
  """Compares every file with the checksum in the manifest.

  Raises:
    ValueError: a file is missing or changed; it is named.
  """
  kinds = [("shard", s) for s in manifest["shards"]]
  kinds += [("table", t) for t in manifest["tables"]]
  for kind, entry in kinds:
    path = pathlib.Path(directory) / entry["name"]
    if not path.is_file():
      raise ValueError(f"missing {kind} {path}; run launch.prepare again")
    found = files.sha256(path)
    if found != entry["sha256"]:
      raise ValueError(
        f"corrupt {kind} {path}: expected sha256 {entry['sha256']}, found "
        f"{found}; run launch.prepare again"
      )


class PreparedData:
  """Random access to prepared users; picklable, reopened in each process.

  Attributes:
    directory: where it lies.
    manifest: see manifest.py.
    snapshots: compressed histories (snapshots.py), where they are read.
  """

  def __init__(self, directory: pathlib.Path, manifest: dict[str, Any]):
    self.directory = directory
    self.manifest = manifest
    self.snapshots: Any = None
    self._event_features = tuple(manifest["event_features"])
    self._user_features = tuple(manifest["user_features"])
    self._signals = tuple(manifest["signals"])
    sizes = [shard["records"] for shard in manifest["shards"]]
    self._starts = np.cumsum([0, *sizes])
    self._readers: dict[int, Any] = {}
    self._pid = os.getpid()

  @classmethod
  def open(
    cls, directory: files.PathLike, verify: bool = True
  ) -> "PreparedData":
    """Opens a work directory or its `prepared` directory.

    Args:
      directory: either of the two.
      verify: compare all files with their checksums first.

    Raises:
      FileNotFoundError: nothing is prepared there.
      ValueError: a newer format, or a broken manifest, shard or table.
    """
    path = pathlib.Path(directory)
    if not (path / MANIFEST).is_file():
      path = path / "prepared"
    manifest = read_manifest(path)
    if manifest["format_version"] < FORMAT_VERSION:
      raise ValueError(
        f"{path} has format_version {manifest['format_version']}, this version "
        f"of onerec_jax reads {FORMAT_VERSION}; run launch.prepare again"
      )
    if verify:
      _verify(path, manifest)
    return cls(path, manifest)

  def __reduce__(self):
    found = str(self.directory), json.dumps(self.manifest)
    return _reopen, found, {"snapshots": self.snapshots}

  def __len__(self) -> int:
    return int(self.manifest["num_users"])

  def user(self, index: int) -> UserRecord:
    """The record of dense user `index` + 1."""
    if not 0 <= index < len(self):
      raise IndexError(f"user index {index} is not in [0, {len(self)})")
    shard = int(np.searchsorted(self._starts, index, side="right")) - 1
    if self._pid != os.getpid():
      # Readers hold file offsets and threads, which a fork must not share.
      self._readers, self._pid = {}, os.getpid()
    if shard not in self._readers:
      name = self.manifest["shards"][shard]["name"]
      self._readers[shard] = reader(self.directory / name)
    place = int(index - self._starts[shard])
    content = self._readers[shard].read([place])[0]
    return decode(
      content, self._event_features, self._user_features, self._signals
    )

  @property
  def num_items(self) -> int:
    """Items of the catalogue, without padding."""
    return int(self.manifest["num_items"])

  @functools.cached_property
  def items(self) -> pa.Table:
    """Row i is dense item i + 1."""
    return pq.read_table(self.directory / ITEMS)

  def with_items(self, items: pa.Table) -> "PreparedData":
    """The same users over an item table that goes on after theirs.

    In this process alone: pickled, it has the table on disk.
    """
    manifest = self.manifest | {"num_items": items.num_rows}
    found = PreparedData(self.directory, manifest)
    found.items, found.snapshots = items, self.snapshots
    return found

  @functools.cached_property
  def users(self) -> pa.Table:
    """Row i is dense user i + 1."""
    return pq.read_table(self.directory / USERS)

  @functools.cached_property
  def lengths(self) -> np.ndarray:
    """int32 [U]: events of each user; index = dense user - 1."""
    return self._count("num_events")

  @functools.cached_property
  def train_lengths(self) -> np.ndarray:
    """int32 [U]: training events of each user; they come first."""
    return self._count("training_events")

  def _count(self, name: str) -> np.ndarray:
    column = pq.read_table(self.directory / USERS, columns=[name])[name]
    return column.to_numpy().astype(np.int32)

  @functools.cached_property
  def item_counts(self) -> np.ndarray:
    """int64 [I + 1]: training events of each item; entry 0 is padding."""
    return np.concatenate([[0], self.items["count"].to_numpy()])

  @functools.cached_property
  def item_index(self) -> dict[str, int]:
    """Raw item id → dense item id."""
    raw = self.items["raw_id"].to_pylist()
    return {item: index for index, item in enumerate(raw, start=1)}

  def item_features(self) -> dict[str, np.ndarray]:
    """Name → int32 [I + 1]; row 0 is padding."""
    return {
      name: np.concatenate(
        [[0], self.items[FEATURE_PREFIX + name].to_numpy()]
      ).astype(np.int32)
      for name in self.manifest["item_features"]
    }


# Inside `open` the name `verify` is the argument.
_verify = verify


def _reopen(directory: str, manifest: str) -> PreparedData:
  return PreparedData(pathlib.Path(directory), json.loads(manifest))
