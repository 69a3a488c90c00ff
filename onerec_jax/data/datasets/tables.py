"""Your own tables: CSV, TSV (either may end in .gz) or Parquet.

Text is UTF-8. Columns are named as in schema.py; instead of `timestamp_ms`
there may be `timestamp`, dates and times (ISO 8601, UTC unless they say) or
seconds. With neither, the order of rows is the order in time. A Parquet folder
is read file by file in the order of their names; its columns are those of all
files. Events are streamed, never held at once.
"""

import collections
import contextlib
import csv
import gzip
import pathlib
from collections.abc import Callable, Iterator

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.dataset as pads

from onerec_jax import files
from onerec_jax.config import PrepareConfig
from onerec_jax.data import schema

_DELIMITERS = {".csv": ",", ".tsv": "\t"}
_NAMES = {",": "commas", "\t": "tabs", ";": "semicolons", "|": "bars"}
"""Of what may separate columns."""
_ONE_TYPE = "write each column with one type in all files"


def load(config: PrepareConfig) -> schema.Tables:
  """The files `config.events`, `config.items` and `config.users`.

  Raises:
    FileNotFoundError: a file is not there.
    ValueError: no events given, or a format that is not read.
  """
  if not config.events:
    raise ValueError(
      "data set 'tables' needs a file of events: "
      "--config.prepare.events=FILE.csv (or .tsv, .parquet)"
    )
  skipped: collections.Counter[str] = collections.Counter()
  skip = skipped if config.on_bad_row == "skip" else None
  events = _read("events", config, skip)
  source = {
    "events": config.events,
    "items": config.items or "the items table",
    "users": config.users or "the users table",
    "files": {},
    "skipped": skipped,
    "notes": [],
  }
  if not set(schema.TIMES) & set(events.schema.names):
    source["ordinal_time"] = True
    source["notes"].append(_without_times(events.schema.names))
  tables = schema.Tables(events, source=source)
  for name in ("items", "users"):
    if getattr(config, name):
      setattr(tables, name, _read(name, config, skip).read_all())
  for name in ("events", "items", "users"):
    if getattr(config, name):
      for path in _paths(name, config):
        source["files"][f"{name}/{path.name}"] = files.sha256(path)
  return tables


def _without_times(names: list[str]) -> str:
  """The note of events without times; one of another name is told there."""
  note = "no column of times: the order of rows is used"
  unused = [
    name
    for name in names
    if name not in schema.EVENTS and not name.startswith(schema.STAGE_PREFIX)
  ]
  if not unused:
    return note
  return (
    f"{note}; not used: {', '.join(unused)}; if one of these holds times, name "
    "it timestamp (dates or seconds) or timestamp_ms"
  )


def _paths(name: str, config: PrepareConfig) -> list[pathlib.Path]:
  path = pathlib.Path(getattr(config, name))
  if path.is_dir():
    _check_flat(path)
    found = sorted(path.glob("*.parquet"))
    if not found:
      raise FileNotFoundError(f"{path} holds no .parquet files")
    return found
  if not path.is_file():
    raise FileNotFoundError(
      f"{path} does not exist; --config.prepare.{name} must name a file"
    )
  return [path]


def _check_flat(folder: pathlib.Path) -> None:
  """Refuses a folder of which a part would not be read."""
  for path in sorted(folder.glob("*/**/*.parquet")):
    inner = path.relative_to(folder)
    # What programs keep for themselves, as Spark's _temporary.
    if not inner.parts[0].startswith((".", "_")):
      raise schema.TableError(
        f"{folder}: subfolders are not read, and {inner} lies in one; put all "
        ".parquet files into the folder itself. A column that only the names "
        "of subfolders tell, as year=2020, must be written into the files."
      )


def _read(
  name: str, config: PrepareConfig, skip: collections.Counter[str] | None
) -> pa.RecordBatchReader:
  paths = _paths(name, config)
  first = paths[0]
  if first.suffix == ".parquet":
    return _read_parquet(paths)
  suffix = first.with_suffix("").suffix if first.suffix == ".gz" else ""
  delimiter = _DELIMITERS.get(suffix or first.suffix)
  if delimiter is None:
    raise ValueError(
      f"{first}: cannot read {first.suffix!r}; give .csv, .tsv (or either "
      "with .gz) or .parquet"
    )
  return _read_csv(name, first, delimiter, skip)


def _read_parquet(paths: list[pathlib.Path]) -> pa.RecordBatchReader:
  """One file after another; columns that a file lacks are null in its rows."""
  names = [str(path) for path in paths]
  schemas = [pads.dataset([n], format="parquet").schema for n in names]
  whole = schemas[0]
  for name, found in zip(names, schemas):
    if not found.equals(whole):
      whole = _joined(name, whole, found)
  dataset = pads.dataset(names, schema=whole, format="parquet")
  reader = dataset.scanner().to_reader()

  def batches() -> Iterator[pa.RecordBatch]:
    try:
      yield from reader
    except pa.ArrowInvalid as error:
      # Whole numbers beyond 2^53, say, where another file has fractions.
      where = paths[0].parent if len(paths) > 1 else paths[0]
      raise schema.TableError(f"{where}: {error}; {_ONE_TYPE}") from error

  return pa.RecordBatchReader.from_batches(reader.schema, batches())


def _joined(name: str, before: pa.Schema, found: pa.Schema) -> pa.Schema:
  """The columns of both, each of a type that holds the values of both."""
  both = [_decoded(before), _decoded(found)]
  for column in {*both[0].names} & {*both[1].names}:
    both = [_widened(one, column, both) for one in both]
  try:
    return pa.unify_schemas(both, promote_options="permissive")
  except (pa.ArrowInvalid, pa.ArrowTypeError) as error:
    raise schema.TableError(
      f"{name}: its columns do not go with those of the files before it "
      f"({error}); {_ONE_TYPE}"
    ) from error


def _widened(given: pa.Schema, column: str, both: list[pa.Schema]) -> pa.Schema:
  """With whole numbers beside text as text, and flags beside them as numbers.

  Of known columns, whose meaning that does not change.
  """
  types = {one.field(column).type for one in both}
  known = schema.EVENTS.get(column)
  kind, wide = known.kind if known else "", None
  if kind in ("id", "text") and types & {pa.string(), pa.large_string()}:
    numbers = types - {pa.string(), pa.large_string()}
    wide = pa.string() if all(map(pa.types.is_integer, numbers)) else None
  if kind == "flag" and pa.bool_() in types:
    numbers = types - {pa.bool_()}
    wide = pa.int64() if all(map(pa.types.is_integer, numbers)) else None
  if wide is None:
    return given
  place = given.get_field_index(column)
  return given.set(place, given.field(place).with_type(wide))


def _decoded(given: pa.Schema) -> pa.Schema:
  """Categories as what they are of: files need not agree on that."""
  return pa.schema(
    field.with_type(field.type.value_type)
    if pa.types.is_dictionary(field.type)
    else field
    for field in given
  )


def _read_csv(
  name: str,
  path: pathlib.Path,
  delimiter: str,
  skip: collections.Counter[str] | None,
) -> pa.RecordBatchReader:
  """Every column as strings: schema.validate converts, and names bad rows."""
  header = _header(path, delimiter)
  # Raising inside the handler is not possible: it says what to raise later.
  problems: list[str] = []

  def wrong_width(row: pacsv.InvalidRow) -> str:
    if skip is not None:
      skip[f"{name}: wrong number of fields"] += 1
      return "skip"
    # Arrow counts the header.
    problems.append(
      f"{path}, row {(row.number or 0) - 1}: {row.actual_columns} fields where "
      f"the header has {row.expected_columns}: {row.text!r}. Mend the row, or "
      "leave such rows out and count them with "
      "--config.prepare.on_bad_row=skip."
    )
    return "error"

  @contextlib.contextmanager
  def named() -> Iterator[None]:
    try:
      yield
    except pa.ArrowInvalid as error:
      if "UTF8" in str(error):
        raise _not_utf8(path, error) from error
      message = problems[0] if problems else f"{path}: {error}"
      raise schema.TableError(message) from error

  def batches() -> Iterator[pa.RecordBatch]:
    with named():
      yield from reader

  with named():
    reader = _open_csv(path, delimiter, header, wrong_width)
  return pa.RecordBatchReader.from_batches(reader.schema, batches())


def _header(path: pathlib.Path, delimiter: str) -> list[str]:
  opener = gzip.open if path.suffix == ".gz" else open
  try:
    with opener(path, "rt", encoding="utf-8-sig", newline="") as file:
      header = next(csv.reader(file, delimiter=delimiter), None)
  except UnicodeDecodeError as error:
    raise _not_utf8(path, error) from error
  if not header:
    raise schema.TableError(f"{path}: empty; its first line must name columns")
  if len(header) == 1:
    _check_separator(path, delimiter, header[0])
  return header


def _check_separator(path: pathlib.Path, delimiter: str, name: str) -> None:
  """Refuses a file whose one column is all of them, separated otherwise."""
  for other, called in _NAMES.items():
    if other != delimiter and other in name:
      raise schema.TableError(
        f"{path}: its first line is one column, {name!r}, and seems to be "
        f"separated by {called}; {_NAMES[delimiter]} are read. Save it again "
        "with commas as .csv, or with tabs as .tsv"
      )


def _not_utf8(path: pathlib.Path, error: Exception) -> schema.TableError:
  return schema.TableError(
    f"{path}: not UTF-8 text ({error}). Save it again as UTF-8: a spreadsheet "
    "has it as 'CSV UTF-8', or: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW"
  )


def _open_csv(
  path: pathlib.Path,
  delimiter: str,
  header: list[str],
  wrong_width: Callable[[pacsv.InvalidRow], str],
) -> pacsv.CSVStreamingReader:
  return pacsv.open_csv(
    str(path),
    read_options=pacsv.ReadOptions(use_threads=False),
    parse_options=pacsv.ParseOptions(
      delimiter=delimiter,
      newlines_in_values=True,
      invalid_row_handler=wrong_width,
    ),
    convert_options=pacsv.ConvertOptions(
      column_types=dict.fromkeys(header, pa.string()),
      strings_can_be_null=True,
      null_values=[""],
    ),
  )
