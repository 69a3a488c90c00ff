"""Columns and times a user may well have, and what becomes of them."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec_jax import files
from onerec_jax.config import PrepareConfig
from onerec_jax.data import prepare, shards

LOG = {
  "user_id": ["b", "a", "b", "b", "a", "c"],
  "item_id": ["x", "x", "y", "z", "y", "x"],
  "timestamp_ms": [30, 5, 10, 20, 1, 7],
}


def run(workdir, events, items=None, users=None, **fields):
  """Prepares tables given as columns; gives the opened result."""
  workdir.mkdir(exist_ok=True)
  for kind, columns in (("events", events), ("items", items), ("users", users)):
    if columns is not None:
      fields[kind] = str(workdir / f"{kind}.parquet")
      pq.write_table(pa.table(columns), fields[kind])
  prepare.prepare(PrepareConfig(dataset="tables", **fields), workdir)
  return shards.PreparedData.open(workdir)


def test_columns_of_ones_own_replace_nothing(tmp_path):
  """Whatever their names: ours hold, theirs are carried beside them."""
  items = {
    "item_id": ["x", "y", "z"],
    "category": ["c1", "c2", "c2"],
    "count": [70, 80, 90],
    "raw_id": ["rx", "ry", "rz"],
    "feature_category": [7, 8, 9],
    "given_count": ["a", "b", "c"],
    "training_events": [4, 5, 6],
    "source_row": [40, 50, 60],
  }
  users = {
    "user_id": ["a", "b", "c"],
    "num_events": [100, 200, 100],
    "training_events": ["few", "many", "few"],
    "raw_id": ["ra", "rb", "rc"],
    "plan": ["gold", "free", "gold"],
    "feature_plan": ["p", "q", "p"],
    "count": [1, 2, 1],
    "source_row": [3, 2, 1],
  }
  plain = run(
    tmp_path / "plain",
    LOG,
    {name: items[name] for name in ("item_id", "category")},
    {name: users[name] for name in ("user_id", "plan")},
  )
  data = run(tmp_path / "own", LOG, items, users)
  for table in ("items", "users"):
    expected = getattr(plain, table).to_pydict()
    found = getattr(data, table).to_pydict()
    assert {name: found[name] for name in expected} == expected
  table = data.items.to_pydict()
  assert table["given_count"] == items["count"]
  assert table["given_given_count"] == items["given_count"]
  assert table["given_raw_id"] == items["raw_id"]
  assert table["given_feature_category"] == items["feature_category"]
  assert table["source_row"] == items["source_row"]
  # Users come as b, a, c.
  table = data.users.to_pydict()
  assert table["given_num_events"] == [200, 100, 100]
  assert table["given_training_events"] == ["many", "few", "few"]
  assert table["given_raw_id"] == ["rb", "ra", "rc"]
  assert table["given_feature_plan"] == ["q", "p", "p"]
  # All are features under the names that were given.
  names = set(users) - {"user_id"}
  assert set(data.manifest["user_features"]) == names
  assert data.manifest["bucketing"]["user"]["num_events"]["values"] == [
    "100",
    "200",
  ]
  assert data.user(0).user_features["training_events"] == 2
  assert data.lengths.tolist() == [3, 2, 1]
  assert data.item_counts.tolist() == [0, 2, 2, 0]


def test_a_users_id_is_a_feature_if_trained_on(tmp_path):
  """A code for each user of the training split, however many there are."""
  count = 1500
  users = [f"u{number}" for number in range(count)]
  events = {
    "user_id": users + ["late"],
    "item_id": ["x"] * (count + 1),
    "timestamp_ms": list(range(1, count + 1)) + [5000],
  }
  split = {"split": "time", "validation_from_ms": 3000, "test_from_ms": 4000}
  data = run(tmp_path / "with", events, user_ids=True, **split)
  assert data.manifest["user_features"] == {"user_id": count + 1}
  codes = {
    name: data.user(place).user_features["user_id"]
    for place, name in enumerate(data.users["raw_id"].to_pylist())
  }
  assert codes.pop("late") == 0
  assert sorted(codes.values()) == list(range(1, count + 1))
  plain = run(tmp_path / "plain", events, **split)
  assert plain.manifest["user_features"] == {}


def test_bytes_of_a_user_are_kept_and_are_no_feature(tmp_path):
  faces = [b"\xff\xfe", b"", b"\x00"]
  users = {"user_id": ["a", "b", "c"], "face": faces, "plan": ["p", "q", "p"]}
  data = run(tmp_path, LOG, users=users)
  assert set(data.manifest["user_features"]) == {"plan"}
  assert data.users.to_pydict()["face"] == [faces[1], faces[0], faces[2]]


# What the queries and the records call their own columns.
NAMES = [
  *("dropped", "copy", "is_chosen", "item_events", "user_events", "place"),
  *("length", "split", "gap", "dense_user", "dense_item", "new_request"),
  *("num_events", "training_events", "raw_id", "count"),
]


def test_event_columns_named_as_in_the_queries(tmp_path):
  """They are there for a condition and change nothing else."""
  events = LOG | {name: [1, 1, 1, 1, 1, 7] for name in NAMES}
  plain = run(tmp_path / "plain", LOG, where="user_id <> 'c'")
  where = " AND ".join(f'"{name}" = 1' for name in NAMES)
  data = run(tmp_path / "own", events, where=where)
  assert data.manifest["dropped_events"] == {"where": 1}
  assert data.manifest["unused_columns"] == sorted(NAMES)
  for i in range(2):
    np.testing.assert_equal(data.user(i)._asdict(), plain.user(i)._asdict())


def test_seconds_that_were_named_milliseconds(tmp_path, capsys):
  base = 1_700_000_000
  seconds = [base + t for t in LOG["timestamp_ms"]]
  data = run(tmp_path, LOG | {"timestamp_ms": seconds})
  (note,) = data.manifest["notes"]
  assert "look like seconds" in note
  assert "name the column timestamp" in note
  printed = " ".join(capsys.readouterr().err.split())
  assert f"warning: {note}" in printed
  data = run(tmp_path, LOG | {"timestamp_ms": [t * 10**6 for t in seconds]})
  (note,) = data.manifest["notes"]
  assert "look like microseconds; if they are, divide by 1,000" in note
  printed = " ".join(capsys.readouterr().err.split())
  assert f"warning: {note}" in printed
  # One time that cannot be so, milliseconds, and dates of 1970 are no matter.
  fine = (
    {"timestamp_ms": [*seconds[:-1], 7]},
    {"timestamp_ms": [1000 * t for t in seconds]},
    {"timestamp": seconds},
    {"timestamp": [f"1970-02-0{day}" for day in range(1, 7)]},
  )
  rest = {name: LOG[name] for name in ("user_id", "item_id")}
  for times in fine:
    data = run(tmp_path, rest | times)
    assert data.manifest["notes"] == []
  assert "warning" not in capsys.readouterr().err


def test_data_prepared_before_a_setting_came_are_still_current(tmp_path):
  """The fingerprint is one of before `user_ids`; runs are bound to it."""
  log = tmp_path / "events.csv"
  log.write_text("user_id,item_id,timestamp_ms\na,x,1\na,y,2\nb,x,3\n")
  prints = []
  for ids in (False, True):
    config = PrepareConfig(dataset="tables", events=str(log), user_ids=ids)
    prepare.prepare(config, tmp_path)
    manifest = shards.PreparedData.open(tmp_path).manifest
    prints.append(manifest["fingerprint"])
  assert prints[0] == "6f455cb9d9d0"
  assert prints[1] != prints[0]
  # Without naming events it is refused, not trained without them.
  prepare.prepare(PrepareConfig(dataset="tables", events=str(log)), tmp_path)
  directory = tmp_path / prepare.PREPARED
  manifest = files.read_json(directory / shards.MANIFEST)
  del manifest["prepare"]["user_ids"]
  files.write_json(directory / shards.MANIFEST, manifest)
  with pytest.raises(ValueError, match="prepare.user_ids=False"):
    prepare.prepare(PrepareConfig(dataset="tables", user_ids=True), tmp_path)
  prepare.prepare(PrepareConfig(dataset="tables"), tmp_path)
