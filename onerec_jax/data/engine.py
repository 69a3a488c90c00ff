"""DuckDB, which runs queries.py on one machine, out of core.

Whatever does not fit into the memory limit is spilled into `directory`.
"""

import pathlib
from collections.abc import Iterator, Sequence

import duckdb
import pyarrow as pa

from onerec_jax.data import queries

_ROWS = 1 << 16


class Engine:
  """A database on disk that lives as long as its directory."""

  def __init__(self, directory: pathlib.Path, memory_limit: str):
    self._connection = duckdb.connect(
      str(directory / "events.duckdb"),
      config={
        "memory_limit": memory_limit,
        "temp_directory": str(directory / "spill"),
      },
    )

  def __enter__(self) -> "Engine":
    return self

  def __exit__(self, *error: object) -> None:
    self._connection.close()

  def events(self, path: pathlib.Path, missing: Sequence[str]) -> None:
    """Gives a Parquet file the name `events`; missing columns are null."""
    nulls = "".join(
      f", CAST(NULL AS VARCHAR) AS {queries.quote(name)}" for name in missing
    )
    place = str(path).replace("'", "''")
    self._connection.execute(
      f"CREATE VIEW events AS SELECT *{nulls} FROM read_parquet('{place}')"
    )

  def check_where(self, where: str) -> None:
    """Refuses a condition that is not SQL over the event columns.

    Raises:
      ValueError: with the database's own message.
    """
    if not where.strip():
      return
    try:
      self._connection.execute(
        f"SELECT count(CASE WHEN (\n{where}\n) THEN 1 END) FROM events"
      ).fetchall()
    except duckdb.Error as error:
      raise ValueError(
        f"prepare.where = {where!r} is not a condition on event columns "
        f"({error}); write standard SQL, quote names that are words of it: "
        '"like" = true AND timestamp_ms > 1000'
      ) from error

  def create(self, name: str, select: str) -> None:
    """Keeps the result of a SELECT as a table."""
    self._connection.execute(f"CREATE TABLE {name} AS {select}")

  def register(self, name: str, table: pa.Table) -> None:
    """Copies a small table in."""
    self._connection.register(f"{name}_arrow", table)
    self.create(name, f"SELECT * FROM {name}_arrow")
    self._connection.unregister(f"{name}_arrow")

  def rows(self, select: str) -> pa.Table:
    """A result that fits into memory."""
    return self._connection.sql(select).to_arrow_table()

  def stream(self, select: str) -> Iterator[pa.RecordBatch]:
    """A result of any size, in order."""
    yield from self._connection.sql(select).to_arrow_reader(_ROWS)
