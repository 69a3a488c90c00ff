"""What runs queries.py: DuckDB on one machine, or Spark (spark_engine.py)."""

import abc
import pathlib
from collections.abc import Iterator, Sequence

import duckdb
import pyarrow as pa

from onerec_jax.data import queries

_ROWS = 1 << 16


class Engine(abc.ABC):
  """A database that lives as long as its directory; a context manager."""

  errors: tuple[type[Exception], ...]
  """What it raises at a SELECT that it cannot run."""

  def __enter__(self) -> "Engine":
    return self

  @abc.abstractmethod
  def __exit__(self, *error: object) -> None: ...

  @abc.abstractmethod
  def events(self, path: pathlib.Path, missing: Sequence[str]) -> None:
    """Gives a Parquet file the name `events`; missing columns are null."""

  @abc.abstractmethod
  def create(self, name: str, select: str) -> None:
    """Keeps the result of a SELECT as a table."""

  @abc.abstractmethod
  def register(self, name: str, table: pa.Table) -> None:
    """Copies a small table in."""

  @abc.abstractmethod
  def rows(self, select: str) -> pa.Table:
    """A result that fits into memory."""

  @abc.abstractmethod
  def stream(self, select: str) -> Iterator[pa.RecordBatch]:
    """A result of any size, in order."""

  def check(self, option: str, condition: str) -> None:
    """Refuses a condition that is not SQL over the event columns.

    Args:
      option: prepare's field that holds it: where, positive or session.
      condition: SQL; of `session` on aggregates, else on single events.

    Raises:
      ValueError: with the database's own message.
    """
    if not condition.strip():
      return
    select, kind, example = queries.check(condition, option == "session")
    try:
      self.rows(select)
    except self.errors as error:
      raise ValueError(
        f"prepare.{option} = {condition!r} is not a condition on {kind} "
        f"({error}); write standard SQL, quote names that are words of it: "
        f"{example}"
      ) from error


def open_engine(
  name: str, directory: pathlib.Path, memory_limit: str
) -> Engine:
  """The engine of this name.

  Args:
    name: `duckdb` or `spark`.
    directory: for its files.
    memory_limit: of DuckDB; Spark has settings of its own.

  Raises:
    ValueError: there is none of this name, or it is not installed.
  """
  if name == "duckdb":
    return DuckDB(directory, memory_limit)
  if name != "spark":
    raise ValueError(f"prepare.engine={name!r}: want duckdb or spark")
  try:
    from onerec_jax.data import spark_engine  # optional extra
  except ModuleNotFoundError as error:
    raise ValueError(
      f"prepare.engine=spark needs the extra `spark` ({error}): run pip "
      "install -e '.[spark]', or leave the option out"
    ) from error
  return spark_engine.Spark(directory)


class DuckDB(Engine):
  """Out of core: what does not fit the limit is spilled into the directory."""

  errors = (duckdb.Error,)

  def __init__(self, directory: pathlib.Path, memory_limit: str):
    self._connection = duckdb.connect(
      str(directory / "events.duckdb"),
      config={
        "memory_limit": memory_limit,
        "temp_directory": str(directory / "spill"),
      },
    )

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
