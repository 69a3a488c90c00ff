import json
import multiprocessing
import pickle

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from onerec_jax import files
from onerec_jax.data import shards


@st.composite
def records(draw):
  n = draw(st.integers(0, 6))
  int32 = st.integers(-(2**31), 2**31 - 1)

  def array(dtype):
    return draw(hnp.arrays(dtype, n))

  return shards.UserRecord(
    user=draw(st.integers(1, 2**31 - 1)),
    items=array(np.int32),
    timestamps=array(np.int64),
    split=array(np.int8),
    request=array(np.int32),
    positive=array(bool),
    session=array(bool),
    features={
      name: array(np.int32) for name in draw(st.sets(st.sampled_from("abc")))
    },
    user_features=draw(st.dictionaries(st.sampled_from("xyz"), int32)),
    signals={
      name: array(np.float32) for name in draw(st.sets(st.sampled_from("pq")))
    },
  )


def assert_equal(one, other):
  assert one.user == other.user
  assert one.user_features == other.user_features
  assert one.features.keys() == other.features.keys()
  for name in (
    "items",
    "timestamps",
    "split",
    "request",
    "positive",
    "session",
  ):
    a, b = getattr(one, name), getattr(other, name)
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)
  for name, values in one.features.items():
    np.testing.assert_array_equal(values, other.features[name])
  assert one.signals.keys() == other.signals.keys()
  for name, values in one.signals.items():
    np.testing.assert_array_equal(values, other.signals[name])


@settings(max_examples=60, deadline=None)
@given(records())
def test_record_round_trip(record):
  content = shards.encode(record)
  names = tuple(
    map(tuple, (record.features, record.user_features, record.signals))
  )
  assert_equal(shards.decode(content, *names), record)
  for broken in (content[:-1], content[:7], content + b"\0"):
    with pytest.raises(ValueError, match=r"run\s+launch.prepare again"):
      shards.decode(broken, *names)
  with pytest.raises(ValueError, match="does\\s+not hold"):
    shards.decode(content, (*names[0], "more"), *names[1:])
  with pytest.raises(ValueError, match="does\\s+not hold"):
    shards.decode(content, *names[:2], (*names[2], "more"))


def record(user):
  n = user % 5
  items = np.arange(1, n + 1, dtype=np.int32)
  return shards.UserRecord(
    user=user,
    items=items,
    timestamps=items.astype(np.int64) * 10,
    split=np.zeros(n, np.int8),
    request=items - 1,
    positive=items % 2 == 0,
    session=items % 3 == 0,
    features={"rating": items * user},
    user_features={"age": user},
    signals={"play_time_ms": (user / (1 + items)).astype(np.float32)},
  )


def write(directory, num_users=11, num_shards=3):
  users = [record(u) for u in range(1, num_users + 1)]
  written = shards.write(directory, users, num_users, num_shards)
  items = pa.table(
    {
      "item_id": pa.array([1, 2, 3, 4], pa.int32()),
      "raw_id": ["a", "b", "c", "d"],
      "feature_category": pa.array([2, 0, 1, 1], pa.int32()),
    }
  )
  counts = [len(u.items) for u in users]
  table = pa.table({"num_events": counts, "training_events": counts})
  pq.write_table(items, directory / shards.ITEMS)
  pq.write_table(table, directory / shards.USERS)
  manifest = {
    "format_version": shards.FORMAT_VERSION,
    "fingerprint": "f",
    "num_users": num_users,
    "num_items": 4,
    "event_features": {"rating": 9},
    "user_features": {"age": 9},
    "item_features": {"category": 3},
    "signals": ["play_time_ms"],
    "bucketing": {},
    "shards": written,
    "tables": [
      {"name": name, "sha256": files.sha256(directory / name)}
      for name in (shards.ITEMS, shards.USERS)
    ],
  }
  files.write_json(directory / shards.MANIFEST, manifest)
  return manifest


def test_older_format_is_refused(tmp_path):
  manifest = write(tmp_path)
  files.write_json(
    tmp_path / shards.MANIFEST,
    manifest | {"format_version": shards.FORMAT_VERSION - 1},
  )
  with pytest.raises(ValueError, match="run launch.prepare again"):
    shards.PreparedData.open(tmp_path)


def test_random_access_and_tables(tmp_path):
  manifest = write(tmp_path)
  assert [s["records"] for s in manifest["shards"]] == [3, 4, 4]
  prepared = shards.PreparedData.open(tmp_path)
  assert len(prepared) == 11
  for user in (11, 1, 4, 3, 7, 8, 1):
    assert_equal(prepared.user(user - 1), record(user))
  for index in (-1, 11):
    with pytest.raises(IndexError):
      prepared.user(index)
  np.testing.assert_array_equal(prepared.lengths, [u % 5 for u in range(1, 12)])
  assert prepared.lengths.dtype == prepared.train_lengths.dtype == np.int32
  assert prepared.item_index == {"a": 1, "b": 2, "c": 3, "d": 4}
  features = prepared.item_features()
  np.testing.assert_array_equal(features["category"], [0, 2, 0, 1, 1])
  assert features["category"].dtype == np.int32
  assert prepared.num_items == 4


def test_work_directory_opens_too(tmp_path):
  (tmp_path / "prepared").mkdir()
  write(tmp_path / "prepared")
  assert len(shards.PreparedData.open(tmp_path)) == 11
  with pytest.raises(FileNotFoundError, match="launch.prepare"):
    shards.PreparedData.open(tmp_path / "elsewhere")


def _read(prepared, index, queue):
  queue.put(prepared.user(index).user)


def test_pickle_and_fork(tmp_path):
  write(tmp_path)
  prepared = shards.PreparedData.open(tmp_path)
  assert prepared.user(2).user == 3
  assert_equal(pickle.loads(pickle.dumps(prepared)).user(9), record(10))
  context = multiprocessing.get_context("fork")
  queue = context.Queue()
  process = context.Process(target=_read, args=(prepared, 2, queue))
  process.start()
  assert queue.get(timeout=20) == 3
  process.join()


@pytest.mark.parametrize(
  ("users", "count", "starts"),
  [
    (5, 2, [0, 2, 5]),
    (2, 8, [0, 1, 2]),
    (1, 1, [0, 1]),
    (9, 3, [0, 3, 6, 9]),
  ],
)
def test_shard_starts(users, count, starts):
  assert shards.shard_starts(users, count) == starts


def test_write_refuses_other_users(tmp_path):
  with pytest.raises(ValueError, match="expected user 2 of 3, found user 3"):
    shards.write(tmp_path, [record(1), record(3)], 3, 1)
  with pytest.raises(ValueError, match="expected user 2 of 2, found the end"):
    shards.write(tmp_path, [record(1)], 2, 1)
  with pytest.raises(ValueError, match="more users than the 1"):
    shards.write(tmp_path, [record(1), record(2)], 1, 1)


def test_corrupt_and_missing_files_are_named(tmp_path):
  manifest = write(tmp_path)
  shard = tmp_path / manifest["shards"][1]["name"]
  content = bytearray(shard.read_bytes())
  content[len(content) // 2] ^= 1
  shard.write_bytes(content)
  with pytest.raises(ValueError, match="corrupt shard") as error:
    shards.PreparedData.open(tmp_path)
  for part in (str(shard), manifest["shards"][1]["sha256"], "launch.prepare"):
    assert part in str(error.value)
  shards.PreparedData.open(tmp_path, verify=False)
  shard.unlink()
  with pytest.raises(ValueError, match=f"missing shard {shard}"):
    shards.PreparedData.open(tmp_path)


def test_corrupt_table_is_named(tmp_path):
  write(tmp_path)
  path = tmp_path / shards.ITEMS
  path.write_bytes(path.read_bytes() + b"x")
  with pytest.raises(ValueError, match="corrupt table .*items.parquet"):
    shards.PreparedData.open(tmp_path)


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (lambda m: m | {"format_version": 99}, "format_version 99.*update"),
    (lambda m: [m], "not a manifest"),
    (lambda m: {}, "not a manifest"),
    (lambda m: m | {"format_version": "1"}, "not a manifest"),
    (lambda m: {"format_version": 1}, "lacks.*'bucketing'"),
  ],
)
def test_newer_or_broken_manifest_is_refused(tmp_path, change, match):
  manifest = write(tmp_path)
  path = tmp_path / shards.MANIFEST
  path.write_text(json.dumps(change(manifest)))
  with pytest.raises(ValueError, match=match) as error:
    shards.PreparedData.open(tmp_path)
  assert str(path) in str(error.value)
  path.write_text("{")
  with pytest.raises(ValueError, match="not readable JSON"):
    shards.PreparedData.open(tmp_path)
