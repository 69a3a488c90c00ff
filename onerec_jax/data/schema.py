"""The three tables: names, types, units, and what makes a row bad.

A dataset module gives `Tables` with whatever types its files have; `validate`
turns them into the types below, row by row, and names every row it cannot
accept. Columns that stand in no list are kept: of events they may be used in
`prepare.where`, of items they are carried along, of users they are static
features. Event columns must differ in more than case: SQL tells no others
apart. Units: milliseconds, degrees, the source's own currency.
"""

import collections
import dataclasses
import hashlib
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from onerec_jax.data import columns as columns_lib
from onerec_jax.data.columns import Column

FLAGS = (
  "click",
  "like",
  "follow",
  "comment",
  "forward",
  "collect",
  "dislike",
  "long_view",
  "profile_enter",
  "pay",
)
"""Feedback: true, false or null (not recorded)."""

STAGE_PREFIX = "stage_"
"""Event columns named so are flags too: stages of the funnel passed."""

_ROWS = 1 << 18

TIMES = ("timestamp", "timestamp_ms")
"""The names that times of events may have."""

EVENTS = {
  "user_id": Column("id", required=True),
  "item_id": Column("id", required=True),
  "timestamp_ms": Column("int", required=True, low=0),
  "request_id": Column("id"),
  "position": Column("int", low=0),
  "play_time_ms": Column("int", low=0),
  "rating": Column("float"),
  "log_probability": Column("float", high=0),
  "latitude": Column("float", low=-90, high=90),
  "longitude": Column("float", low=-180, high=180),
  **{flag: Column("flag") for flag in FLAGS},
}
ITEMS = {
  "item_id": Column("id", required=True),
  "title": Column("text"),
  "text": Column("text"),
  "category": Column("text"),
  "author_id": Column("id"),
  "duration_ms": Column("int", low=0),
  "latitude": Column("float", low=-90, high=90),
  "longitude": Column("float", low=-180, high=180),
  "price": Column("float", low=0),
  "embedding": Column("vector"),
}
USERS = {"user_id": Column("id", required=True)}


class TableError(ValueError):
  """A table that cannot be used: which file, row, column, value; what to do."""


@dataclasses.dataclass
class Tables:
  """The three tables of one source.

  Attributes:
    events: a table, or a reader when the events need not fit into memory.
    items: absent: the items are those that occur in events.
    users: absent: users have no static features.
    source: all keys optional. `events`, `items`, `users`: file names for
      messages; `files`: name → sha256 of the raw inputs; `ordinal_time`: there
      are no times, the order of rows is the order in time; `notes`: list of
      what a reader of the manifest should know; `skipped`: reason → rows the
      reader had to leave out.
  """

  events: pa.Table | pa.RecordBatchReader
  items: pa.Table | None = None
  users: pa.Table | None = None
  source: dict[str, Any] = dataclasses.field(default_factory=dict)


def validate(
  tables: Tables, on_bad_row: str = "error"
) -> tuple[Tables, collections.Counter[str]]:
  """Types and checks every row.

  Items and users are checked at once, events while they are read.

  Args:
    tables: as a dataset module gives them.
    on_bad_row: `error`, or `skip` to leave bad rows out and count them.

  Returns:
    Tables with the types of this module, where `events` is a reader with a
    column `source_row` (from 1; with ordinal time also a `timestamp_ms` that
    repeats it); and the counts of skipped rows by
    `<table>.<column>: <reason>`, complete once the events are read.

  Raises:
    TableError: a wrong or missing column, or an items table without rows, at
      once; with `error` the first bad row, for events while they are read.
  """
  if on_bad_row not in ("error", "skip"):
    raise ValueError(
      f"prepare.on_bad_row is {on_bad_row!r}; it must be 'error' or 'skip'"
    )
  source = tables.source
  skipped = source.get("skipped")
  skipped = collections.Counter() if skipped is None else skipped
  ordinal = bool(source.get("ordinal_time", False))
  users = items = None
  if tables.items is not None:
    check = _Check("items", ITEMS, source, on_bad_row, skipped, unique=True)
    items = check.table(tables.items)
    if not tables.items.num_rows:
      # Or the first event would be blamed for an item that is not there.
      raise TableError(
        f"{check.file}: there are no rows in the items table; fill it, or "
        "leave it out"
      )
  if tables.users is not None:
    check = _Check("users", USERS, source, on_bad_row, skipped, unique=True)
    users = check.table(tables.users)
  columns = dict(EVENTS)
  if ordinal:
    del columns["timestamp_ms"]
  check = _Check("events", columns, source, on_bad_row, skipped)
  check.known_items = items["item_id"] if items is not None else None
  # Or a time that is misspelt would give way to the order of rows.
  check.times = TIMES if ordinal else ()
  events = check.reader(tables.events, ordinal)
  return Tables(events, items, users, source), skipped


def checksums(tables: Tables) -> dict[str, str]:
  """What went in: checksums of the raw files, or of tables in memory.

  Raises:
    ValueError: the events are streamed and no files are named.
  """
  if tables.source.get("files"):
    return dict(tables.source["files"])
  found = {}
  for name in ("events", "items", "users"):
    table = getattr(tables, name)
    if isinstance(table, pa.RecordBatchReader):
      raise ValueError(
        "a source that streams its events must give the checksums of its "
        "files in Tables.source['files']"
      )
    if table is not None:
      sink = pa.BufferOutputStream()
      with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
      found[name] = hashlib.sha256(sink.getvalue()).hexdigest()
  return found


class _Check:
  """Checks one table, batch after batch."""

  known_items: pa.ChunkedArray | None = None
  times: tuple[str, ...] = ()
  """Names that may not be misspelt either, though no such column is read."""

  def __init__(
    self,
    name: str,
    columns: dict[str, Column],
    source: dict[str, Any],
    on_bad_row: str,
    skipped: collections.Counter[str],
    unique: bool = False,
  ):
    self.name = name
    self.columns = columns
    self.file = str(source.get(name, f"the {name} table"))
    self.skip = on_bad_row == "skip"
    self.skipped = skipped
    self.seen: set[str] | None = set() if unique else None

  def table(self, table: pa.Table) -> pa.Table:
    """All good rows of a table that fits into memory."""
    return self._reader(table, ()).read_all()

  def reader(
    self, table: pa.Table | pa.RecordBatchReader, ordinal: bool
  ) -> pa.RecordBatchReader:
    """The good rows as a stream, with their source row."""
    numbered = ("timestamp_ms", "source_row") if ordinal else ("source_row",)
    good = self._reader(table, numbered)
    # Last: of a time in capitals the check before says more.
    self._check_sql_names(table.schema.names, numbered)
    return good

  def _reader(
    self, table: pa.Table | pa.RecordBatchReader, numbered: tuple[str, ...]
  ) -> pa.RecordBatchReader:
    """The good rows; `numbered` names columns to fill with the source row."""
    given = self._check_names(table.schema)
    fields = [pa.field(n, self._type(n, table.schema)) for n in given]
    fields += [pa.field(name, pa.int64()) for name in numbered]
    schema = pa.schema(fields)
    batches = (
      table.to_batches(max_chunksize=_ROWS)
      if isinstance(table, pa.Table)
      else table
    )
    return pa.RecordBatchReader.from_batches(
      schema, self._batches(batches, given, schema, numbered)
    )

  def _check_sql_names(
    self, names: list[str], numbered: tuple[str, ...]
  ) -> None:
    """Refuses names that SQL would take for another column's."""
    first: dict[str, str] = {}
    for name in names:
      if name.lower() in numbered:
        raise TableError(
          f"{self.file}: column {name!r} has a name that the preparation "
          "needs for a column of its own; rename it"
        )
      other = first.setdefault(name.lower(), name)
      if other != name:
        raise TableError(
          f"{self.file}: columns {other!r} and {name!r} differ only in case, "
          "which SQL does not tell apart; rename one of them"
        )

  def _check_names(self, schema: pa.Schema) -> list[str]:
    """The names of the typed columns, `timestamp` read as `timestamp_ms`."""
    names = list(schema.names)
    twice = [n for n, k in collections.Counter(names).items() if k > 1]
    if twice:
      raise TableError(f"{self.file}: column {twice[0]!r} stands there twice")
    if "timestamp" in names and "timestamp_ms" in self.columns:
      if "timestamp_ms" in names:
        raise TableError(
          f"{self.file}: has both timestamp and timestamp_ms; keep one"
        )
      names[names.index("timestamp")] = "timestamp_ms"
    for name, column in self.columns.items():
      if column.required and name not in names:
        raise TableError(
          f"{self.file}: the {self.name} table needs a column {name!r}; it has "
          f"{schema.names}. Rename the column that holds it."
        )
    self._check_spelling(names)
    return names

  def _check_spelling(self, names: list[str]) -> None:
    """Refuses names that are nearly, but not quite, known ones."""
    known = (*self.columns, *self.times)
    for name, near in columns_lib.misspelt(names, known):
      better = repr(near)
      if near in self.times:
        better = "'timestamp' (dates or seconds) or 'timestamp_ms'"
      raise TableError(
        f"{self.file}: unknown column {name!r}; rename it to {better} if it is "
        "that, or to something less alike"
      )

  def _column(self, name: str) -> Column | None:
    if self.name == "events" and name.startswith(STAGE_PREFIX):
      return Column("flag")
    return self.columns.get(name)

  def _type(self, name: str, schema: pa.Schema) -> pa.DataType:
    column = self._column(name)
    source_name = name if name in schema.names else "timestamp"
    given = schema.field(source_name).type
    if pa.types.is_dictionary(given):
      given = given.value_type
    if column is None:
      return given
    if not columns_lib.acceptable(column.kind, given, source_name):
      raise TableError(
        f"{self.file}: column {source_name!r} has type {given}, which cannot "
        f"be read as {column.kind}; convert it"
      )
    return columns_lib.ARROW[column.kind]

  def _batches(
    self,
    batches: Any,
    given: list[str],
    schema: pa.Schema,
    numbered: tuple[str, ...],
  ) -> Iterator[pa.RecordBatch]:
    first = 1
    for batch in batches:
      typed, bad = {}, {}
      for name, array, raw in zip(given, batch.columns, batch.schema.names):
        if pa.types.is_dictionary(array.type):
          array = array.dictionary_decode()
        column = self._column(name)
        if column is None:
          typed[name] = array
          continue
        typed[name], problems = columns_lib.convert(array, column, raw)
        problems |= self._unknown_items(name, typed[name])
        for row, problem in problems.items():
          bad.setdefault(row, (raw, problem, array[row].as_py()))
      self._note_repeated(typed, batch, bad)
      rows = pa.array(range(first, first + len(batch)), pa.int64())
      typed |= dict.fromkeys(numbered, rows)
      good = pa.RecordBatch.from_arrays(
        [typed[n] for n in schema.names], schema=schema
      )
      yield self._drop(good, bad, first)
      first += len(batch)

  def _unknown_items(self, name: str, ids: pa.Array) -> dict[int, str]:
    if name != "item_id" or self.known_items is None:
      return {}
    known = pc.is_in(ids, value_set=self.known_items)
    wrong = pc.indices_nonzero(pc.and_not(pc.is_valid(ids), known))
    return dict.fromkeys(wrong.to_pylist(), "not in the items table")

  def _note_repeated(
    self,
    typed: dict[str, pa.Array],
    batch: pa.RecordBatch,
    bad: dict[int, tuple],
  ) -> None:
    """Adds ids that stand twice in items or users to the bad rows.

    Comes last: a row that is bad for another reason does not take the id from
    a good one after it.
    """
    if self.seen is None:
      return
    (key,) = (name for name, column in self.columns.items() if column.required)
    for row, value in enumerate(typed[key].to_pylist()):
      if row in bad:
        continue
      if value in self.seen:
        bad[row] = (key, "stands there already", batch[key][row].as_py())
      self.seen.add(value)

  def _drop(
    self, batch: pa.RecordBatch, bad: dict[int, tuple], first: int
  ) -> pa.RecordBatch:
    if not bad:
      return batch
    if not self.skip:
      row = min(bad)
      column, problem, value = bad[row]
      raise TableError(
        f"{self.file}, row {first + row}, column {column!r}: {problem}, value "
        f"{value!r}. Mend the row, or leave such rows out and count them with "
        "--config.prepare.on_bad_row=skip."
      )
    for column, problem, _ in bad.values():
      self.skipped[f"{self.name}.{column}: {problem}"] += 1
    keep = [row not in bad for row in range(len(batch))]
    return batch.filter(pa.array(keep))
