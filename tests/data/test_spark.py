"""The same SQL on Spark, in local mode, writes the same bytes as on DuckDB."""

import json
import os
import shutil
import sys

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec_jax.config import PrepareConfig
from onerec_jax.data import engine, prepare

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def spark():
  """A session that all preparations here share, so that Spark starts once."""
  sql = pytest.importorskip("pyspark.sql", reason="needs the extra `spark`")
  if not (os.environ.get("JAVA_HOME") or shutil.which("java")):
    pytest.skip("Spark needs Java")
  session = (
    sql.SparkSession.builder.master("local[2]")
    .config("spark.sql.shuffle.partitions", "3")
    .config("spark.ui.enabled", "false")
    .config("spark.ui.showConsoleProgress", "false")
    # Many short queries: compile little.
    .config("spark.sql.codegen.wholeStage", "false")
    .config(
      "spark.driver.extraJavaOptions",
      "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC",
    )
    .config("spark.driver.bindAddress", "127.0.0.1")
    .config("spark.driver.host", "127.0.0.1")
    .getOrCreate()
  )
  session.sparkContext.setLogLevel("ERROR")
  yield session
  session.stop()


def tables(folder, seed=0, n=900):
  """Events with every column, ties, copies, nulls and odd strings."""
  rng = np.random.default_rng(seed)
  users = ["a'b", 'c"d', "ü", "x\\y", *(f"u{i}" for i in range(40))]
  items = [f"item {i}" for i in range(50)]

  def column(values, type_, missing=0.0):
    return pa.array(values, type_, mask=rng.random(n) < missing)

  events = {
    "user_id": rng.choice(users, n),
    "item_id": rng.choice(items, n),
    # Many events at one time, whose order is that of the rows.
    "timestamp_ms": 1_600_000_000_000 + rng.integers(0, 60, n) * 86_400_000,
    "request_id": column(rng.choice(["p", "q", "r"], n), pa.string(), 0.3),
    "rating": column(rng.normal(3, 1, n), pa.float64(), 0.2),
    "play_time_ms": column(rng.integers(0, 9000, n), pa.int64(), 0.2),
    "like": column(rng.random(n) < 0.3, pa.bool_(), 0.4),
    "mood": column(rng.choice(["it's", "\\n"], n), pa.string(), 0.1),
  }
  catalogue = {
    "item_id": rng.permutation(items),
    "category": rng.choice(["x", "y", "z"], 50),
  }
  people = {"user_id": users[::2], "age": rng.integers(1, 90, len(users[::2]))}
  given = {"events": events, "items": catalogue, "users": people}
  for name, columns in given.items():
    table = pa.table(columns)
    if name == "events":
      table = pa.concat_tables([table, table.slice(100, 50)])
    pq.write_table(table, folder / f"{name}.parquet")
  return {name: str(folder / f"{name}.parquet") for name in given}


def assert_same(folder, config):
  """Prepares by both; gives the manifest, which is one of the files."""
  found = {}
  for name in ("duckdb", "spark"):
    config.engine = name
    directory = prepare.prepare(config, folder / name)
    found[name] = {p.name: p.read_bytes() for p in directory.iterdir()}
  assert found["duckdb"].keys() == found["spark"].keys()
  for name, content in found["duckdb"].items():
    assert content == found["spark"][name], name
  return found["spark"]["manifest.json"].decode()


@pytest.mark.usefixtures("spark")
def test_the_same_bytes_as_duckdb(tmp_path):
  config = PrepareConfig(
    dataset="tables",
    split="time",
    # 'it''s' and a backslash are what standard SQL takes them for.
    where="\"mood\" = 'it''s' OR \"mood\" = '\\n' -- by mood",
    positive='"like" OR rating >= 4',
    session="count(*) FILTER (WHERE play_time_ms > 3000) >= 1 AND "
    "sum(play_time_ms) > 4000",
    min_item_events=9,
    min_user_events=9,
    num_shards=3,
    **tables(tmp_path),
  )
  dropped = json.loads(assert_same(tmp_path, config))["dropped_events"]
  assert set(dropped) == {
    "where", "duplicate_event", "min_item_events", "min_user_events",
  }  # fmt: skip


@pytest.mark.usefixtures("spark")
def test_the_same_movielens_as_duckdb(tmp_path, real_data):
  folder = str(real_data("movielens_100k"))
  config = PrepareConfig(dataset="movielens_100k", data_dir=folder)
  manifest = assert_same(tmp_path, config)
  assert '"num_events": 100000' in manifest


@pytest.mark.usefixtures("spark")
@pytest.mark.parametrize("where", ["nonsense > 1", "timestamp_ms >", "1=1) --"])
def test_what_is_no_condition_is_refused(tmp_path, where):
  config = PrepareConfig(
    dataset="tables", engine="spark", where=where, **tables(tmp_path)
  )
  with pytest.raises(ValueError, match="prepare.where") as error:
    prepare.prepare(config, tmp_path)
  assert repr(where) in str(error.value)
  assert not (tmp_path / "prepared").exists()


def test_an_engine_that_is_not_there_is_named(tmp_path, monkeypatch):
  with pytest.raises(ValueError, match="engine='hive': want duckdb or spark"):
    engine.open_engine("hive", tmp_path, "1GB")
  name = "onerec_jax.data.spark_engine"
  monkeypatch.delattr(name, raising=False)
  monkeypatch.delitem(sys.modules, name, raising=False)
  monkeypatch.setitem(sys.modules, "pyspark", None)
  with pytest.raises(ValueError, match=r"pip install -e '\.\[spark\]'"):
    engine.open_engine("spark", tmp_path, "1GB")
