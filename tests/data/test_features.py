import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onerec_jax.config import PrepareConfig
from onerec_jax.data import features, prepare, shards


@given(st.integers(0, 2**50))
def test_log2_buckets(value):
  bucket = features.bucket_numbers({"kind": "log2"}, np.array([value, np.nan]))
  assert bucket.tolist() == [min((1 + value).bit_length(), 41), 0]
  assert bucket[0] < features.vocab_size({"kind": "log2"})


def test_edges_and_flags():
  spec = {"kind": "edges", "edges": [1.0, 2.5]}
  values = np.array([0.0, 1.0, 2.4, 2.5, 9.0, np.nan])
  assert features.bucket_numbers(spec, values).tolist() == [1, 1, 1, 2, 2, 0]
  assert features.vocab_size(spec) == 3
  flags = np.array([0.0, 1.0, np.nan])
  assert features.bucket_numbers({"kind": "flag"}, flags).tolist() == [1, 2, 0]


def test_codes_by_weight_then_name():
  values = pa.array(["b", "a", "c", None, "b", "d"])
  spec = features.fit_codes(values, np.array([1, 2, 5, 9, 1, 0]))
  assert spec["values"] == ["c", "a", "b"]
  codes = features.bucket_codes(spec, ["a", "b", "c", "d", None])
  assert codes.tolist() == [2, 3, 1, 0, 0]
  many = pa.array([f"v{i:04}" for i in range(1500)])
  spec = features.fit_codes(many, np.ones(1500, np.int64))
  assert features.vocab_size(spec) == 1 + features.MAX_CODES
  assert features.bucket_codes(spec, ["v0999", "v1000"]).tolist() == [1000, 0]


def test_requests_are_bucketed_like_the_shards(tmp_path):
  """Also ratings of many values: quantiles of the training split."""
  rng = np.random.default_rng(0)
  n = 400
  rating = rng.normal(size=n)
  events = {
    "user_id": np.arange(n) % 4,
    "item_id": np.arange(n) % 9,
    "timestamp_ms": rng.integers(0, 10**6, n),
    "rating": rating,
    "click": rng.integers(0, 2, n).astype(bool),
  }
  users = {"user_id": [0, 1, 2, 3], "age": [20, 30, 20, 40]}
  for name, table in (("e", events), ("u", users)):
    pq.write_table(pa.table(table), tmp_path / f"{name}.parquet")
  config = PrepareConfig(
    dataset="tables",
    events=str(tmp_path / "e.parquet"),
    users=str(tmp_path / "u.parquet"),
  )
  prepare.prepare(config, tmp_path)
  data = shards.PreparedData.open(tmp_path)
  bucketing = data.manifest["bucketing"]
  edges = bucketing["event"]["rating"]["edges"]
  assert len(edges) == features.MAX_EDGES
  middle = np.searchsorted(np.sort(rating), edges) / n
  expected = (np.arange(32) + 0.5) / 32
  np.testing.assert_allclose(middle, expected, atol=0.02)
  for i in range(4):
    mine = np.flatnonzero(events["user_id"] == i)
    mine = mine[np.argsort(events["timestamp_ms"][mine], kind="stable")]
    columns = {
      name: events[name][mine].astype(float) for name in ("rating", "click")
    }
    found = features.event_features(
      bucketing, columns, events["timestamp_ms"][mine]
    )
    record = data.user(i)
    assert found.keys() == record.features.keys() == {"rating", "click", "gap"}
    for name, values in record.features.items():
      np.testing.assert_array_equal(found[name], values)
    statics = features.user_features(bucketing, {"age": users["age"][i]})
    assert statics == record.user_features
  unknown = features.event_features(bucketing, {}, np.array([5, 6]))
  assert unknown["click"].tolist() == [0, 0]
  assert features.user_features(bucketing, {"age": 99}) == {"age": 0}


@pytest.mark.parametrize(
  ("column", "requests"),
  [
    (pa.array([True, False]), [True, np.True_, "true", "True"]),
    (pa.array(["True", "False"]), [True, np.True_, "true", "True"]),
    (pa.array([3, 4]), [3, 3.0, "3", "3.0", np.int32(3), np.float32(3)]),
    (pa.array([3.0, 4.5]), [3, 3.0, "3", "3.0", np.int64(3), np.float64(3)]),
    (pa.array(["3", "x"]), [3, 3.0, "3", "3.0"]),
    (pa.array(["3.0", "x"]), [3, 3.0, "3", "3.0"]),
    (pa.array([0.1, 4.5]), [0.1, "0.1", np.float32(0.1)]),
    (pa.array([1e-05, 4.5]), [1e-05]),
    (pa.array([datetime.date(2024, 5, 6)]), [datetime.date(2024, 5, 6)]),
  ],
)
def test_requests_are_spelt_like_the_tables(column, requests):
  spec = features.fit_codes(column, np.arange(len(column), 0, -1))
  assert features.bucket_codes(spec, column)[0] == 1
  assert features.bucket_codes(spec, requests).tolist() == [1] * len(requests)
  unknown = ["nothing", 33, 0.3, None, float("nan"), "", [3], object(), 2**70]
  assert features.bucket_codes(spec, unknown).tolist() == [0] * len(unknown)


def test_a_spelling_of_its_own_comes_first():
  spec = {"kind": "codes", "values": ["3.0", "3", "TRUE", "true"]}
  codes = features.bucket_codes(spec, ["3.0", "3", 3, True, "TRUE", "True"])
  assert codes.tolist() == [1, 2, 2, 4, 3, 3]


def test_nan_and_empty_text_are_no_categories():
  for values in (pa.array([np.nan, 2.0]), pa.array(["", "2"])):
    spec = features.fit_codes(values, np.array([5, 1]))
    assert spec["values"] == ["2"]
    assert features.bucket_codes(spec, values).tolist() == [0, 1]


def test_categories_are_no_numbers():
  with pytest.raises(ValueError, match="'codes' does not take numbers"):
    features.bucket_numbers({"kind": "codes", "values": []}, np.zeros(1))
