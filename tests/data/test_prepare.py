import collections
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.config import PrepareConfig
from onerec_jax.data import prepare, shards


def run(workdir, events, items=None, users=None, name="events.csv", **fields):
  """Prepares small tables given as columns; gives the opened result."""
  workdir.mkdir(parents=True, exist_ok=True)
  given = {"events": events, "items": items, "users": users}
  for kind, columns in given.items():
    if columns is not None:
      path = workdir / f"{kind}.parquet"
      pq.write_table(pa.table(columns), path)
      fields[kind] = str(path)
  config = PrepareConfig(dataset="tables", **fields)
  directory = prepare.prepare(config, workdir)
  assert directory == workdir / "prepared"
  return shards.PreparedData.open(workdir)


# Against plain Python.

ROWS = st.lists(
  st.fixed_dictionaries(
    {
      "user_id": st.sampled_from("abcd"),
      "item_id": st.sampled_from("uvwxyz"),
      "timestamp_ms": st.integers(0, 4),
      "request_id": st.one_of(st.none(), st.sampled_from("pq")),
      "rating": st.one_of(st.none(), st.integers(1, 5).map(float)),
      "like": st.one_of(st.none(), st.booleans()),
      "play_time_ms": st.one_of(st.none(), st.integers(0, 5000)),
    }
  ),
  min_size=1,
  max_size=30,
)


def oracle(rows, min_item, min_user):
  """users → ordered rows, by the rules, without SQL."""
  seen, kept, drops = set(), [], collections.Counter()
  for number, row in enumerate(rows):
    key = tuple(
      row[k] for k in ("user_id", "item_id", "timestamp_ms", "request_id")
    )
    if row["timestamp_ms"] >= 4:
      drops["where"] += 1
    elif key in seen:
      drops["duplicate_event"] += 1
    else:
      seen.add(key)
      kept.append(row | {"row": number})
  for column, least in (("item_id", min_item), ("user_id", min_user)):
    counts = collections.Counter(row[column] for row in kept)
    good = [row for row in kept if counts[row[column]] >= least]
    drops[f"min_{column[:4]}_events"] += len(kept) - len(good)
    kept = good
  users = collections.defaultdict(list)
  for row in kept:
    users[row["user_id"]].append(row)
  for events in users.values():
    events.sort(key=lambda r: (r["timestamp_ms"], r["row"]))
  return users, kept, +drops


def log2(value):
  return 0 if value is None else (1 + value).bit_length()


def as_columns(rows):
  """The rows as columns; those of nothing but None keep their type."""
  types = {
    "request_id": pa.string(),
    "rating": pa.float64(),
    "like": pa.bool_(),
    "play_time_ms": pa.int64(),
  }
  return {n: pa.array([r[n] for r in rows], types.get(n)) for n in rows[0]}


def check_user(record, events, item_index):
  """A user's record against its rows; gives the rows of the training split."""
  n = len(events)
  assert record.items.tolist() == [item_index[r["item_id"]] for r in events]
  times = [r["timestamp_ms"] for r in events]
  assert record.timestamps.tolist() == times
  split = [0] * n if n < 3 else [0] * (n - 2) + [1, 2]
  assert record.split.tolist() == split
  run_index, requests = -1, []
  for previous, row in zip([None, *events], events):
    same = previous is not None and row["request_id"] is not None
    same = same and previous["request_id"] == row["request_id"]
    run_index += not same
    requests.append(run_index)
  assert record.request.tolist() == requests
  gap = [None, *np.diff(times).tolist()]
  assert record.features["gap"].tolist() == [log2(g) for g in gap]
  if "like" in record.features:
    codes = {None: 0, False: 1, True: 2}
    assert record.features["like"].tolist() == [
      codes[r["like"]] for r in events
    ]
  if "play_time_ms" in record.features:
    assert record.features["play_time_ms"].tolist() == [
      log2(r["play_time_ms"]) for r in events
    ]
  return [row for row, code in zip(events, split) if code == 0]


def check_ratings(data, users, training):
  """Buckets of ratings: their edges are the training split's."""
  edges = data.manifest["bucketing"]["event"]["rating"]["edges"]
  assert edges == sorted({row["rating"] for row in training} - {None})
  for i, events in enumerate(users.values()):
    expected = [
      0 if r["rating"] is None
      else max(1, sum(e <= r["rating"] for e in edges))
      for r in events
    ]  # fmt: skip
    assert data.user(i).features["rating"].tolist() == expected


@settings(max_examples=20, deadline=None)
@given(ROWS, st.integers(1, 3), st.integers(1, 4))
def test_against_plain_python(tmp_path_factory, rows, min_item, min_user):
  users, kept, drops = oracle(rows, min_item, min_user)
  fields = {
    "where": "timestamp_ms < 4",
    "min_item_events": min_item,
    "min_user_events": min_user,
    "num_shards": 2,
  }
  workdir = tmp_path_factory.mktemp("w")
  if not kept:
    with pytest.raises(ValueError, match="no events are left"):
      run(workdir, as_columns(rows), **fields)
    return
  data = run(workdir, as_columns(rows), **fields)
  assert data.manifest["dropped_events"] == dict(drops)
  assert data.manifest["num_events"] == len(kept)
  item_index = {}
  for row in kept:
    item_index.setdefault(row["item_id"], len(item_index) + 1)
  assert data.item_index == item_index
  assert data.users["raw_id"].to_pylist() == list(users)
  training = []
  for i, events in enumerate(users.values()):
    assert data.user(i).user == i + 1
    training += check_user(data.user(i), events, item_index)
  # Item counts and rating buckets know nothing beyond the training split.
  counts = collections.Counter(row["item_id"] for row in training)
  assert data.items["count"].to_pylist() == [counts[i] for i in item_index]
  if "rating" in data.manifest["bucketing"]["event"]:
    check_ratings(data, users, training)


# Each broken or odd input and what becomes of it.

LOG = {
  "user_id": ["b", "a", "b", "b", "a", "c"],
  "item_id": ["x", "x", "y", "z", "y", "x"],
  "timestamp_ms": [30, 5, 10, 20, 1, 7],
}


def test_unsorted_time_short_users_and_dense_ids(tmp_path):
  data = run(tmp_path, LOG)
  assert data.users["raw_id"].to_pylist() == ["b", "a", "c"]
  assert data.items["raw_id"].to_pylist() == ["x", "y", "z"]
  one = data.user(0)
  assert one.timestamps.tolist() == [10, 20, 30]
  assert one.items.tolist() == [2, 3, 1]
  assert one.split.tolist() == [0, 1, 2]
  assert data.user(1).split.tolist() == [0, 0]
  assert data.manifest["short_users"] == 2
  assert data.lengths.tolist() == [3, 2, 1]
  assert data.train_lengths.tolist() == [1, 2, 1]
  assert data.manifest["split_events"] == {
    "train": 4,
    "validation": 1,
    "test": 1,
  }


def test_duplicate_event_the_first_stays(tmp_path):
  events = {
    "user_id": ["a", "a", "a"],
    "item_id": ["x", "x", "x"],
    "timestamp_ms": [1, 1, 2],
    "rating": [5.0, 1.0, 3.0],
  }
  data = run(tmp_path, events)
  assert data.manifest["dropped_events"] == {"duplicate_event": 1}
  assert data.manifest["bucketing"]["event"]["rating"]["edges"] == [3.0, 5.0]
  assert data.user(0).features["rating"].tolist() == [2, 1]


def test_without_times_the_order_of_rows(tmp_path):
  events = {"user_id": ["a", "b", "a", "a"], "item_id": ["x", "x", "x", "y"]}
  data = run(tmp_path, events)
  assert data.manifest["ordinal_time"]
  assert data.user(0).timestamps.tolist() == [0, 1, 2]
  assert data.user(0).items.tolist() == [1, 1, 2]
  assert data.user(1).timestamps.tolist() == [0]
  assert "gap" not in data.manifest["event_features"]
  assert data.manifest["dropped_events"] == {}
  with pytest.raises(ValueError, match="cannot be\\s+split by time"):
    run(tmp_path, events, split="time")


def test_catalogue_users_and_features(tmp_path):
  items = {
    "item_id": ["w", "z", "y", "x"],
    "title": ["W", "Z", "Y", "X"],
    "category": ["new", "c1", "c2", "c2"],
    "price": [1.0, 0.0, None, 7.0],
    "colour": ["red", "red", "blue", None],
  }
  users = {
    "user_id": ["nobody", "a", "b"],
    "age": [30, 20, 30],
    "plan": ["gold", "free", None],
  }
  data = run(tmp_path, LOG, items, users)
  table = data.items.to_pydict()
  assert table["item_id"] == [1, 2, 3, 4]
  assert table["raw_id"] == ["w", "z", "y", "x"]
  assert table["title"] == ["W", "Z", "Y", "X"]
  assert table["text"] == [None] * 4
  assert table["colour"] == ["red", "red", "blue", None]
  assert table["count"] == [0, 0, 2, 2]
  # c1 and new have no training event: unknown, like no category at all.
  assert table["feature_category"] == [0, 0, 1, 1]
  assert table["feature_price"] == [2, 1, 0, 4]
  assert data.manifest["item_features"] == {"category": 2, "price": 42}
  np.testing.assert_array_equal(data.item_features()["price"], [0, 2, 1, 0, 4])
  # Users come as b, a, c; c stands in no table of users.
  assert data.user(0).user_features == {"age": 2, "plan": 0}
  assert data.user(1).user_features == {"age": 1, "plan": 1}
  assert data.user(2).user_features == {"age": 0, "plan": 0}
  assert data.manifest["bucketing"]["user"]["age"]["values"] == ["20", "30"]
  assert data.manifest["eventless_users"] == 1
  assert data.users["feature_plan"].to_pylist() == [0, 1, 0]


def test_unknown_item_is_named_or_counted(tmp_path):
  items = {"item_id": ["x", "y"]}
  with pytest.raises(ValueError, match=r"row 4, column 'item_id'.*'z'"):
    run(tmp_path, LOG, items)
  assert not (tmp_path / "prepared").exists()
  data = run(tmp_path, LOG, items, on_bad_row="skip")
  assert data.manifest["skipped_rows"] == {
    "events.item_id: not in the items table": 1
  }
  assert data.manifest["num_events"] == 5
  leftovers = {p.name for p in tmp_path.iterdir()}
  assert leftovers == {"events.parquet", "items.parquet", "prepared"}


def test_split_by_time_and_its_boundaries(tmp_path):
  n = 50
  order = np.random.default_rng(1).permutation(n)
  events = {
    "user_id": [f"u{i % 3}" for i in range(n)],
    "item_id": [f"i{i % 7}" for i in range(n)],
    "timestamp_ms": (order * 10).tolist(),
  }
  data = run(tmp_path, events, split="time")
  bounds = data.manifest["split_boundaries_ms"]
  found = [0, 0, 0]
  for i in range(len(data)):
    record = data.user(i)
    expected = (record.timestamps >= bounds["validation_from_ms"]).astype(int)
    expected += record.timestamps >= bounds["test_from_ms"]
    np.testing.assert_array_equal(record.split, expected)
    for code in record.split:
      found[code] += 1
  assert found == pytest.approx([40, 5, 5], abs=1)
  assert list(data.manifest["split_events"].values()) == found
  data = run(
    tmp_path, events, split="time", validation_from_ms=100, test_from_ms=200
  )
  assert list(data.manifest["split_events"].values()) == [10, 10, 30]
  with pytest.raises(ValueError, match="no training events"):
    run(tmp_path, events, split="time", validation_from_ms=-1, test_from_ms=1)


@pytest.mark.parametrize(
  "where", ["nonsense > 1", "timestamp_ms >", "1=1) --", "item_id + 1 > 0"]
)
def test_invalid_condition(tmp_path, where):
  with pytest.raises(ValueError, match="prepare.where") as error:
    run(tmp_path, LOG, where=where)
  assert repr(where) in str(error.value)


def test_condition_on_a_column_of_ones_own(tmp_path):
  events = LOG | {"like": [1, 1, 1, 0, 1, 1], "mood": list("ggbggb")}
  data = run(tmp_path, events, where="mood = 'g' AND \"like\" -- comment")
  assert data.manifest["dropped_events"] == {"where": 3}
  assert data.manifest["dropped_users"] == 1
  assert data.manifest["unused_columns"] == ["mood"]


def test_unchanged_is_skipped_and_broken_is_made_again(tmp_path, capsys):
  data = run(tmp_path, LOG)
  manifest = tmp_path / "prepared" / shards.MANIFEST
  first = manifest.stat().st_mtime_ns
  run(tmp_path, LOG)
  assert manifest.stat().st_mtime_ns == first
  assert "unchanged, skipped" in capsys.readouterr().err
  shard = tmp_path / "prepared" / data.manifest["shards"][0]["name"]
  shard.write_bytes(b"x")
  again = run(tmp_path, LOG)
  assert again.manifest == data.manifest  # bit for bit, checksums included
  assert "corrupt shard" in capsys.readouterr().err
  changed = run(tmp_path, LOG, min_user_events=2)
  assert changed.manifest["fingerprint"] != data.manifest["fingerprint"]
  assert len(changed) == 2
  moved = run(tmp_path / "elsewhere", LOG)
  assert moved.manifest["fingerprint"] == data.manifest["fingerprint"]


def test_newer_format_is_not_overwritten(tmp_path):
  run(tmp_path, LOG)
  path = tmp_path / "prepared" / shards.MANIFEST
  manifest = json.loads(path.read_text())
  newer = {"format_version": shards.FORMAT_VERSION + 1}
  path.write_text(json.dumps(manifest | newer))
  with pytest.raises(ValueError, match="update onerec_jax"):
    run(tmp_path, LOG)


def test_tables_without_events_reuse_what_is_there(tmp_path):
  with pytest.raises(ValueError, match="--config.prepare.events"):
    prepare.prepare(PrepareConfig(dataset="tables"), tmp_path)
  run(tmp_path, LOG)
  directory = prepare.prepare(PrepareConfig(dataset="tables"), tmp_path)
  assert directory == tmp_path / "prepared"


def test_what_is_there_is_not_what_was_asked_for(tmp_path):
  """Neither passed over in silence nor replaced."""
  run(tmp_path, LOG, min_user_events=2)
  manifest = tmp_path / "prepared" / shards.MANIFEST
  before = manifest.read_bytes()
  ask = lambda **changes: prepare.prepare(
    PrepareConfig(**{"dataset": "tables", **changes}), tmp_path
  )
  ask(min_user_events=2)
  with pytest.raises(ValueError, match=r"min_user_events=2, and this is 3"):
    ask(min_user_events=3)
  with pytest.raises(ValueError, match=r"prepare.where='', and this is '1=0'"):
    ask(where="1=0")
  with pytest.raises(ValueError, match="prepare.items without events"):
    ask(items="items.csv")
  with pytest.raises(ValueError, match="dataset=tables"):
    ask(dataset="simulator", events="events.csv")
  with pytest.raises(ValueError, match="'tables', and this is 'simulator'"):
    ask(dataset="simulator")
  assert manifest.read_bytes() == before


def test_a_default_that_marks_no_event_is_told(tmp_path, capsys):
  """Ratings of 0 and 1; at least 4 is positive."""
  ratings = [index % 2 for index in range(len(LOG["user_id"]))]
  data = run(tmp_path / "a", LOG | {"rating": ratings})
  (note,) = [n for n in data.manifest["notes"] if "positive" in n]
  assert "marks none of the" in note
  assert "prepare.positive" in capsys.readouterr().err.replace("\n", "")
  data = run(tmp_path / "b", LOG | {"rating": ratings}, positive="rating >= 1")
  assert not [n for n in data.manifest["notes"] if "positive" in n]


def test_many_batches_keep_users_whole(tmp_path):
  """More events than one batch of the database; users of any length."""
  rng = np.random.default_rng(0)
  n = 150_000
  users = np.minimum(rng.geometric(0.001, n), 300)
  events = {
    "user_id": users,
    "item_id": np.arange(n),
    "timestamp_ms": rng.integers(0, 10**6, n),
  }
  data = run(tmp_path, events)
  seen = np.concatenate([data.user(i).items for i in range(len(data))])
  np.testing.assert_array_equal(np.sort(seen), np.arange(1, n + 1))
  raw = data.users["raw_id"].to_pylist()
  lengths = np.bincount(users)
  assert data.lengths.tolist() == [lengths[int(r)] for r in raw]
  for i in range(0, len(data), 37):
    record = data.user(i)
    assert (np.diff(record.timestamps) >= 0).all()
    assert (users[record.items - 1] == int(raw[i])).all()
