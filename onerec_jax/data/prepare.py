"""Raw files → tables → per-user, time-ordered records in shards.

Events are checked while they are copied to a Parquet file; queries.py marks,
orders and splits them there; the result streams into shards. Nothing but the
item and user tables needs to fit into memory. All is written beside and
renamed into place at the end. Everything left out is counted in the manifest
(manifest.py).
"""

import os
import pathlib
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich import console as rich_console
from rich import progress as rich_progress

from onerec_jax import files
from onerec_jax.config import PrepareConfig
from onerec_jax.data import (
  datasets,
  entities,
  features,
  marks,
  queries,
  records,
  reuse,
  schema,
  shards,
  splits,
  time_units,
)
from onerec_jax.data import engine as engine_lib
from onerec_jax.data import manifest as manifest_lib

PREPARED = "prepared"
_NUMBERS = ("rating", "play_time_ms")
_MEASURED = ("play_time_ms", "log_probability")
"""Columns that are signals of a record as they are."""


def prepare(
  config: PrepareConfig,
  workdir: files.PathLike,
  memory_limit: str = "60%",
) -> pathlib.Path:
  """Prepares a data set in `<workdir>/prepared`; skips what is done.

  Args:
    config: which data, and how.
    workdir: the work directory.
    memory_limit: of the database, as `4GB` or a share of memory; what does
      not fit is spilled to the work directory's disk.

  Returns:
    The prepared directory.

  Raises:
    FileNotFoundError: the raw data is nowhere.
    ValueError: a bad row, column, condition or split, nothing left to train
      on, or prepared data there that is broken, of a newer format, of another
      data set, or not what is asked for without naming events.
  """
  directory = pathlib.Path(workdir) / PREPARED
  console = rich_console.Console(stderr=True)
  reuse.check_files(config)
  if config.dataset == "tables" and not config.events:
    return reuse.as_it_is(config, directory)
  if directory.exists():
    reuse.check_dataset(config, directory)
  tables = datasets.load(config)
  ordinal = bool(tables.source.get("ordinal_time", False))
  splits.check(config.split, ordinal, config.request_gap_ms)
  print_ = reuse.fingerprint(config, tables)
  if directory.exists() and reuse.is_current(directory, print_, console):
    return directory
  pathlib.Path(workdir).mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(prefix=".prepare-", dir=workdir) as name:
    temporary = pathlib.Path(name)
    with _progress(console) as progress:
      manifest = _Preparation(config, tables, temporary, progress).run(
        memory_limit
      )
    manifest |= {"prepare": reuse.settings(config), "fingerprint": print_}
    files.write_json(temporary / "out" / shards.MANIFEST, manifest)
    _swap(temporary, directory)
  return directory


def _swap(temporary: pathlib.Path, directory: pathlib.Path) -> None:
  if directory.exists():
    os.replace(directory, temporary / "old")
  os.replace(temporary / "out", directory)


def _progress(console: rich_console.Console) -> rich_progress.Progress:
  return rich_progress.Progress(
    rich_progress.TextColumn("{task.description}"),
    rich_progress.BarColumn(),
    rich_progress.MofNCompleteColumn(),
    rich_progress.TimeElapsedColumn(),
    console=console,
  )


class _Preparation:
  """One run: holds what the steps hand on."""

  def __init__(
    self,
    config: PrepareConfig,
    tables: schema.Tables,
    temporary: pathlib.Path,
    progress: rich_progress.Progress,
  ):
    self.config = config
    self.source = tables.source
    self.ordinal = bool(tables.source.get("ordinal_time", False))
    self.temporary = temporary
    self.out = temporary / "out"
    self.out.mkdir()
    self.progress = progress
    self.eventless_users = 0
    self.notes = list(self.source.get("notes", []))
    self.milliseconds = "timestamp_ms" in tables.events.schema.names
    self.tables, self.skipped = schema.validate(tables, config.on_bad_row)

  def run(self, memory_limit: str) -> dict[str, Any]:
    """Writes shards and tables; gives the manifest without fingerprint."""
    self._stage()
    with engine_lib.open_engine(
      self.config.engine, self.temporary, memory_limit
    ) as engine:
      self.engine = engine
      engine.events(
        self.temporary / "events.parquet",
        () if "request_id" in self.columns else ("request_id",),
      )
      self._check_times()
      boundaries = self._order()
      counts = manifest_lib.counts(engine, self.skipped)
      self._warn(
        marks.note(
          self.config.positive,
          self.positive,
          counts["marked_events"]["positive"],
          sum(counts["split_events"].values()),
        )
      )
      items, item_specs = entities.item_table(*self._items())
      users, user_specs, codes = entities.user_table(
        *self._users(), self.config.user_ids
      )
      self.event_specs = self._fit_events()
      pq.write_table(items, self.out / shards.ITEMS)
      pq.write_table(users, self.out / shards.USERS)
      written = shards.write(
        self.out,
        self._records(codes, users.num_rows),
        users.num_rows,
        self.config.num_shards,
      )
    specs = {"event": self.event_specs, "user": user_specs, "item": item_specs}
    return {
      "format_version": shards.FORMAT_VERSION,
      "dataset": self.config.dataset,
      "split": self.config.split,
      "inputs": self.source.get("files", {}),
      "notes": self.notes,
      **counts,
      "split_boundaries_ms": boundaries,
      "eventless_users": self.eventless_users,
      "skipped_rows": dict(self.skipped),
      "unused_columns": self.unused,
      "positive": self.positive,
      "signals": self._signals,
      "ordinal_time": self.ordinal,
      **manifest_lib.tables(self.out, items, users, specs),
      "shards": written,
    }

  def _stage(self) -> None:
    """Checks events while copying them to Parquet; fixes the columns."""
    task = self.progress.add_task("reading events", total=None)
    reader = self.tables.events
    path = self.temporary / "events.parquet"
    present = dict.fromkeys(reader.schema.names, 0)
    with pq.ParquetWriter(path, reader.schema) as writer:
      for batch in reader:
        writer.write_batch(batch)
        self.progress.advance(task, len(batch))
        for name, array in zip(batch.schema.names, batch.columns):
          present[name] += len(array) - array.null_count
    self.progress.update(task, total=present["source_row"])
    # A column of nulls says nothing; it is treated as absent.
    self.columns = {name for name, values in present.items() if values}
    self.numbers = [n for n in _NUMBERS if n in self.columns]
    self.flags = [n for n in schema.FLAGS if n in self.columns]
    self.flags += sorted(
      n for n in self.columns if n.startswith(schema.STAGE_PREFIX)
    )
    core = ("user_id", "item_id", "timestamp_ms", "request_id", "source_row")
    self.measured = [n for n in _MEASURED if n in self.columns]
    self.unused = sorted(
      set(reader.schema.names)
      - {*core, *self.numbers, *self.flags, *self.measured}
    )

  @property
  def _measurements(self) -> list[str]:
    """Columns of numbers, each once."""
    return list(dict.fromkeys([*self.numbers, *self.measured]))

  @property
  def _signals(self) -> list[str]:
    """Names of a record's signals."""
    if "play_time_ms" in self.measured and self._durations() is not None:
      return [*self.measured, "play_quantile"]
    return self.measured

  def _durations(self) -> np.ndarray | None:
    """Milliseconds by dense item, float [I + 1]; NaN unknown."""
    items = self.tables.items
    if items is None or "duration_ms" not in items.schema.names:
      return None
    known = items["duration_ms"].cast(pa.float64())
    return np.append(np.nan, known.to_numpy(zero_copy_only=False))

  def _check_times(self) -> None:
    """Warns where milliseconds are another unit, as it seems."""
    if self.milliseconds:
      (times,) = self.engine.rows(
        "SELECT min(timestamp_ms) AS low, max(timestamp_ms) AS high FROM events"
      ).to_pylist()
      self._warn(time_units.unit_note(**times))

  def _warn(self, note: str) -> None:
    """Says it now and in the manifest; nothing if empty."""
    if note:
      self.notes.append(note)
      self.progress.console.print(f"warning: {note}", markup=False)

  def _order(self) -> dict[str, int] | None:
    """Filters, orders and splits events; gives the boundaries of a split."""
    task = self.progress.add_task("ordering events", total=2)
    for option in ("where", "positive", "session"):
      self.engine.check(option, getattr(self.config, option))
    filters = queries.Filters(
      self.config.where,
      self.config.min_item_events,
      self.config.min_user_events,
    )
    self.positive = marks.positive(self.config.positive, self.columns)
    carried = [*self._measurements, *self.flags]
    self.engine.create(
      "marked", queries.marked(filters, self.positive, carried)
    )
    self.progress.advance(task)
    boundaries = None
    if self.config.split == "time":
      kept = "(SELECT * FROM marked WHERE dropped = '') kept_events"
      row = self.engine.rows(splits.boundaries(kept)).to_pylist()[0]
      boundaries = {
        name: getattr(self.config, name) or int(value or 0)
        for name, value in row.items()
      }
      split = splits.by_time(**boundaries)
    else:
      split = splits.leave_one_out()
    self.engine.create("kept", queries.kept(split, self.config.request_gap_ms))
    self.engine.create("sessions", queries.sessions(self.config.session))
    self.progress.advance(task)
    return boundaries

  def _items(self) -> tuple[pa.Table, np.ndarray]:
    """The catalogue in dense order, and training events of each item."""
    given = self.tables.items
    if given is None:
      self.engine.create("item_ids", queries.item_ids())
      given = self.engine.rows(
        "SELECT item_id FROM item_ids ORDER BY dense_item"
      )
    else:
      dense = np.arange(1, given.num_rows + 1, dtype=np.int64)
      ids = {"item_id": given["item_id"], "dense_item": dense}
      self.engine.register("item_ids", pa.table(ids))
    counts = np.zeros(given.num_rows, np.int64)
    counted = self.engine.rows(queries.item_counts())
    counts[counted["dense_item"].to_numpy() - 1] = counted["events"].to_numpy()
    return given, counts

  def _users(self) -> tuple[pa.Table, dict[str, pa.ChunkedArray]]:
    """Users in dense order with their events, and their static columns."""
    self.engine.create("user_ids", queries.user_ids())
    users = self.engine.rows(
      "SELECT user_id, CAST(num_events AS BIGINT) AS num_events, "
      "CAST(training_events AS BIGINT) AS training_events FROM user_ids "
      "ORDER BY dense_user"
    )
    given = self.tables.users
    if given is None:
      return users, {}
    ids = given["user_id"].combine_chunks()
    rows = pc.index_in(users["user_id"], value_set=ids)
    self.eventless_users = given.num_rows - len(rows) + rows.null_count
    names = [name for name in given.schema.names if name != "user_id"]
    return users, {name: given[name].take(rows) for name in names}

  def _fit_events(self) -> entities.Specs:
    """Bucketing of event features, from the training split."""
    specs: entities.Specs = {}
    if "rating" in self.numbers:
      specs["rating"] = self._fit_edges("rating")
    if "play_time_ms" in self.numbers:
      specs["play_time_ms"] = {"kind": "log2"}
    specs |= {name: {"kind": "flag"} for name in self.flags}
    if not self.ordinal:
      specs["gap"] = {"kind": "log2"}
    return specs

  def _fit_edges(self, column: str) -> features.Spec:
    limit = features.MAX_EDGES
    values = self.engine.rows(queries.distinct(column, limit + 1))["value"]
    edges = values.to_pylist()
    if len(edges) > limit:
      row = self.engine.rows(queries.quantiles(column, limit)).to_pylist()[0]
      edges = list(row.values())
    return {"kind": "edges", "edges": sorted(set(edges))}

  def _records(
    self, user_codes: dict[str, np.ndarray], num_users: int
  ) -> Iterator[shards.UserRecord]:
    stream = self.engine.stream(queries.records(self._measurements, self.flags))
    bucketing = {"event": self.event_specs}
    task = self.progress.add_task("writing users", total=num_users)
    for chunk in records.whole_users(stream):
      yield from records.split_users(
        chunk, bucketing, user_codes, self.ordinal, self._signals,
        self._durations(),
      )  # fmt: skip
      self.progress.update(task, completed=int(chunk["dense_user"][-1]))
