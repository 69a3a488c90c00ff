"""Compression of lifelong histories against loops, and its files."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax import config as config_lib
from onerec_jax.data import lifelong, shards, snapshots

NUM_ITEMS = 40
CAP = 6


def config(**changes):
  values = {"every": 7, "max_items": 3, "iterations": 5}
  return config_lib.LifelongConfig(**{**values, **changes})


def vectors(width=4):
  return (
    np.random.default_rng(5).normal(size=(NUM_ITEMS, width)).astype(np.float32)
  )


def test_splits_are_cube_roots():
  for root in range(2, 101):
    assert lifelong.num_splits(root**3) == root
    assert lifelong.num_splits((root + 1) ** 3 - 1) == root
  assert [lifelong.num_splits(n) for n in (1, 7)] == [2, 2]


HISTORIES = st.tuples(
  st.integers(1, 150), st.integers(1, 12), st.integers(1, 60), st.integers(0, 9)
)


@settings(max_examples=40, deadline=None)
@given(HISTORIES)
def test_a_history_is_partitioned_within_the_cap(drawn):
  """Largest set first, ⌊∛n⌋ at a time; what stays large had no room."""
  n, max_items, cap, seed = drawn
  rng = np.random.default_rng(seed)
  points = rng.normal(size=(n, 3)).astype(np.float32)
  calls = []
  original = lifelong._k_means

  def record(members, count, iterations, random):
    calls.append((len(members), count))
    return original(members, count, iterations, random)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(lifelong, "_k_means", record)
    found = lifelong.clusters(points, max_items, cap, 5, rng)
  assert sorted(np.concatenate(found).tolist()) == list(range(n))
  assert all(len(part) for part in found)
  assert all((np.diff(part) > 0).all() for part in found)
  assert 1 <= len(found) <= max(cap, 1)
  for size, count in calls:
    root = max(k for k in range(1, 7) if k**3 <= size)
    assert size > max_items
    assert count == max(2, root)
  assert calls == sorted(calls, key=lambda call: -call[0])
  for part in found:
    splits = lifelong.num_splits(len(part))
    assert len(part) <= max_items or len(found) + splits - 1 > cap


def test_without_a_cap_no_cluster_is_larger_than_m():
  points = np.random.default_rng(0).normal(size=(3000, 8)).astype(np.float32)
  found = lifelong.clusters(points, 20, 10**6, 10, np.random.default_rng(1))
  assert max(map(len, found)) <= 20
  # All at one point cannot be told apart, however many they are.
  same = lifelong.clusters(points[:1].repeat(500, 0), 20, 10**6, 10,
                           np.random.default_rng(1))  # fmt: skip
  assert [len(part) for part in same] == [500]


def test_k_means_ends_at_means():
  """At the fixed point every point is nearest to the mean of its own set."""
  rng = np.random.default_rng(3)
  points = rng.normal(size=(60, 2)).astype(np.float32)
  codes = lifelong._k_means(points, 4, 1000, rng)
  means = [points[codes == c].mean(axis=0) for c in np.unique(codes)]
  for point, code in zip(points, np.searchsorted(np.unique(codes), codes)):
    distances = [float(np.sum((point - mean) ** 2)) for mean in means]
    assert distances[code] <= min(distances) + 1e-6


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.integers(0, 9), st.integers(5, 70))
def test_representatives_and_averages_by_loops(n, seed, max_events):
  rng = np.random.default_rng(seed)
  items = rng.integers(1, NUM_ITEMS + 1, n).astype(np.int32)
  buckets = rng.integers(0, 9, n).astype(np.int32)
  settings_ = config(max_events=max_events)
  found = lifelong.compress(items, {"play": buckets}, vectors(), settings_, CAP)
  again = lifelong.compress(items, {"play": buckets}, vectors(), settings_, CAP)
  np.testing.assert_equal(tuple(found), tuple(again))
  first = max(0, n - max_events)
  points = vectors()[items[first:] - 1]
  groups = lifelong.clusters(points, 3, CAP, 5, np.random.default_rng([0, n]))
  expected = []
  for members in groups:
    centre = np.mean([points[m].astype(np.float64) for m in members], axis=0)
    distance = {m: ((points[m] - centre) ** 2).sum() for m in members.tolist()}
    least = min(distance.values())
    latest = max(m for m, d in distance.items() if d <= least + 1e-12)
    known = [b for b in buckets[first:][members].tolist() if b > 0]
    mean = int(np.floor(sum(known) / len(known) + 0.5)) if known else 0
    expected.append((first + latest, len(members), mean))
  assert found.until == n
  assert list(zip(*map(np.ndarray.tolist, (
    found.event, found.size, found.averages["play"]
  )))) == sorted(expected)  # fmt: skip
  assert found.size.sum() == n - first


def users(count=9):
  """Records of 0 to 30 events with a continuous and a sparse feature."""
  rng = np.random.default_rng(1)
  made = []
  for user in range(1, count + 1):
    n = int(rng.integers(0, 31))
    items = rng.integers(1, NUM_ITEMS + 1, n).astype(np.int32)
    made.append(
      shards.UserRecord(
        user=user,
        items=items,
        timestamps=np.arange(n, dtype=np.int64),
        split=np.zeros(n, np.int8),
        request=np.arange(n, dtype=np.int32),
        positive=items % 3 == 0,
        session=np.ones(n, bool),
        features={
          "click": items % 3,
          "play": rng.integers(0, 9, n).astype(np.int32),
        },
        user_features={},
        signals={},
      )
    )
  return made


class Prepared(shards.PreparedData):
  """Records in memory, of as much as compression reads."""

  def __init__(self, records):
    self.records = records
    self.manifest = {
      "fingerprint": "data",
      "shards": [None] * 3,
      "bucketing": {
        "event": {"click": {"kind": "flag"}, "play": {"kind": "log2"}}
      },
    }

  def __len__(self):
    return len(self.records)

  def user(self, index):
    return self.records[index]


def compress(workdir, records, on_user=lambda user: None, **changes):
  return snapshots.compress(
    config(**changes), CAP, Prepared(records), vectors(), "ids", workdir,
    on_user,
  )  # fmt: skip


def test_a_target_sees_the_latest_snapshot_before_it(tmp_path):
  records = users()
  store = compress(tmp_path, records)
  assert store.manifest["features"] == ["play"]
  counted = events = 0
  for opened in (store, pickle.loads(pickle.dumps(store))):
    for index, record in enumerate(records):
      for event in range(len(record.items) + 1):
        found = opened.before(index, event)
        until = event // 7 * 7
        if not until:
          assert found is None
          continue
        # Of nothing but what came before.
        expected = lifelong.compress(
          record.items[:until], {"play": record.features["play"][:until]},
          vectors(), config(), CAP,
        )  # fmt: skip
        np.testing.assert_equal(tuple(found), tuple(expected))
        asked = opened.of_history(
          record.items[:event],
          {name: x[:event] for name, x in record.features.items()},
        )
        np.testing.assert_equal(tuple(asked), tuple(expected))
  for record in records:
    counted += sum(range(7, len(record.items) + 1, 7))
    events += len(record.items)
  assert store.manifest["clustered_events"] == counted
  assert store.manifest["events"] == events
  assert store.manifest["events_per_second"] > 0


def test_a_run_cut_off_goes_on(tmp_path):
  records = users()
  whole = compress(tmp_path / "whole", records)

  def stop(user):
    if user == 4:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    compress(tmp_path / "cut", records, stop)
  (folder,) = snapshots.root(tmp_path / "cut").iterdir()
  kept = folder / "users-00000-of-00003.array_record"
  assert kept.exists()
  assert not (folder / "users-00001-of-00003.array_record").exists()
  with pytest.raises(ValueError, match="launch.compress"):
    snapshots.Snapshots.open(tmp_path / "cut", folder.name, config())
  seen = []
  store = compress(tmp_path / "cut", records, seen.append)
  assert seen == list(range(3, 9))
  for index in range(9):
    for one, other in zip(store.user(index), whole.user(index), strict=True):
      np.testing.assert_equal(tuple(one), tuple(other))
  # Unchanged: nothing is done. Another setting: all is.
  compress(tmp_path / "cut", records, seen.append)
  assert len(seen) == 6
  compress(tmp_path / "cut", records, seen.append, every=8)
  assert len(seen) == 15


def test_broken_files_and_settings_are_named(tmp_path):
  store = compress(tmp_path, users())
  name = store.manifest["fingerprint"]
  path = snapshots.root(tmp_path) / name / "users-00001-of-00003.array_record"
  path.write_bytes(path.read_bytes()[:-1] + b"x")
  with pytest.raises(ValueError, match="users-00001.*launch.compress"):
    snapshots.Snapshots.open(tmp_path, name, config())
  for bad in ("every", "max_items", "max_events", "iterations"):
    with pytest.raises(ValueError, match=f"lifelong.{bad}"):
      compress(tmp_path, users(), **{bad: 0})
  with pytest.raises(ValueError, match="pathways.lifelong"):
    snapshots.compress(config(), 0, Prepared([]), vectors(), "i", tmp_path)


def test_records_round_trip_and_broken_ones_are_refused():
  made = []
  for n in (5, 9, 30):
    items = np.arange(1, n + 1, dtype=np.int32)
    averaged = {"a": np.arange(n), "b": np.arange(n)[::-1]}
    made.append(lifelong.compress(items, averaged, vectors(), config(), CAP))
  content = snapshots.encode(3, made, 2)
  for one, other in zip(
    snapshots.decode(content, ["a", "b"]), made, strict=True
  ):
    np.testing.assert_equal(tuple(one), tuple(other))
  assert snapshots.decode(snapshots.encode(3, [], 2), ["a", "b"]) == []
  for broken in (content[:-4], content + b"\0\0\0\0"):
    with pytest.raises(ValueError, match="launch.compress"):
      snapshots.decode(broken, ["a", "b"])
  with pytest.raises(ValueError, match="launch.compress"):
    snapshots.decode(content, ["a"])
