"""Spark, which runs queries.py on a cluster, or on this machine's cores.

Tables and results pass as Parquet files below `directory`, which driver and
executors must see under the same path; so no result has to fit into the
driver's memory. Which cluster, and how much memory, is Spark's own business:
spark-submit, $SPARK_CONF_DIR or $PYSPARK_SUBMIT_ARGS say it; otherwise it is
this machine.
"""

import itertools
import os
import pathlib
import shutil
from collections.abc import Iterator, Sequence

import pyarrow as pa
import pyarrow.parquet as pq
from py4j.protocol import Py4JError
from pyspark import errors, sql

from onerec_jax.data import engine

_ROWS = 1 << 16

# What makes Spark read queries.py, and conditions of users, as DuckDB does.
_DIALECT = {
  "spark.sql.ansi.enabled": "true",
  "spark.sql.ansi.doubleQuotedIdentifiers": "true",
  "spark.sql.session.timeZone": "UTC",
}


class Spark(engine.Engine):
  """A session of its own; ends Spark on leaving if it started it."""

  errors = (errors.PySparkException, Py4JError)

  def __init__(self, directory: pathlib.Path):
    self._directory = directory.absolute() / "spark"
    self._numbers = itertools.count()
    self._mine = sql.SparkSession.getActiveSession() is None
    if self._mine and not (os.environ.get("JAVA_HOME") or shutil.which("java")):
      raise ValueError(
        "prepare.engine=spark finds no Java: install version 17 or later, or "
        "set $JAVA_HOME"
      )
    builder = sql.SparkSession.builder.appName("onerec_jax prepare")
    if self._mine:
      builder = builder.config("spark.ui.showConsoleProgress", "false")
    started = builder.getOrCreate()
    if self._mine:
      started.sparkContext.setLogLevel("ERROR")
    self._session = started.newSession()
    for name, value in _DIALECT.items():
      self._session.conf.set(name, value)

  def __exit__(self, *error: object) -> None:
    if self._mine:
      self._session.stop()

  def events(self, path: pathlib.Path, missing: Sequence[str]) -> None:
    """Gives a Parquet file the name `events`; missing columns are null."""
    frame = self._session.read.parquet(path.absolute().as_uri())
    for name in missing:
      frame = frame.withColumn(name, sql.functions.lit(None).cast("string"))
    frame.createOrReplaceTempView("events")

  def create(self, name: str, select: str) -> None:
    """Keeps the result of a SELECT as a table."""
    folder = self._write(select)
    frame = self._session.read.parquet(folder.as_uri())
    frame.createOrReplaceTempView(name)

  def register(self, name: str, table: pa.Table) -> None:
    """Copies a small table in."""
    self._directory.mkdir(exist_ok=True)
    path = self._directory / f"{next(self._numbers)}.parquet"
    pq.write_table(table, path)
    self._session.read.parquet(path.as_uri()).createOrReplaceTempView(name)

  def rows(self, select: str) -> pa.Table:
    """A result that fits into memory."""
    return pa.concat_tables(
      _plain(pq.read_table(file)) for file in _files(self._write(select))
    ).combine_chunks()

  def stream(self, select: str) -> Iterator[pa.RecordBatch]:
    """A result of any size, in order."""
    # Sorted results are cut into files by ranges, numbered in their order.
    for file in _files(self._write(select)):
      yield from pq.ParquetFile(file).iter_batches(_ROWS)

  def _write(self, select: str) -> pathlib.Path:
    folder = self._directory / str(next(self._numbers))
    # In standard SQL a backslash in a string is a backslash.
    select = select.replace("\\", "\\\\")
    self._session.sql(select).write.parquet(folder.as_uri())
    return folder


def _files(folder: pathlib.Path) -> list[pathlib.Path]:
  return sorted(folder.glob("part-*.parquet"))


def _plain(table: pa.Table) -> pa.Table:
  """Without Spark's notes in the schema, and every column nullable."""
  fields = [pa.field(f.name, f.type) for f in table.schema]
  return table.cast(pa.schema(fields))
