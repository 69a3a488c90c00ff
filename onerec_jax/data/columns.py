"""One Arrow column → its declared type, and which rows cannot be converted.

Also which columns seem to be known ones under a misspelt name.
"""

import dataclasses
import datetime
import difflib
import math
from collections.abc import Collection, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


@dataclasses.dataclass(frozen=True)
class Column:
  """One column: its type and the values it may hold.

  Attributes:
    kind: `id` (kept as string), `text`, `int`, `float`, `flag`, `vector`.
    required: neither the column nor a value of it may be absent.
    low: smallest value.
    high: largest value.
  """

  kind: str
  required: bool = False
  low: int | float = -math.inf
  high: int | float = math.inf


ARROW = {
  "id": pa.string(),
  "text": pa.string(),
  "int": pa.int64(),
  "float": pa.float64(),
  "flag": pa.bool_(),
  "vector": pa.list_(pa.float32()),
}
_TIME = Column("int", required=True, low=0)


def misspelt(
  names: Collection[str], known: Collection[str]
) -> Iterator[tuple[str, str]]:
  """Names that are nearly, but not quite, known ones that are not there."""
  for name in names:
    near = difflib.get_close_matches(name.lower(), known, 1, cutoff=0.85)
    if name not in known and near and near[0] not in names:
      yield name, near[0]


def acceptable(kind: str, given: pa.DataType, name: str) -> bool:
  """Whether a column of this Arrow type can be read as that kind."""
  types = pa.types
  string = types.is_string(given) or types.is_large_string(given)
  number = types.is_integer(given) or types.is_floating(given)
  if types.is_null(given):
    return True
  if kind == "vector":
    return (
      types.is_list(given)
      or types.is_large_list(given)
      or types.is_fixed_size_list(given)
    )
  if name == "timestamp" and types.is_timestamp(given):
    return True
  if kind == "flag":
    return string or number or types.is_boolean(given)
  return string or number


def convert(
  array: pa.Array, column: Column, name: str
) -> tuple[pa.Array, dict[int, str]]:
  """The typed column and row → problem; bad values come out as null."""
  problems: dict[int, str] = {}
  if column.kind == "vector":
    return array.cast(ARROW["vector"]), problems
  if column.kind in ("id", "text"):
    typed = _as_string(array)
  elif name == "timestamp":
    typed, problems = _as_time(array)
  else:
    typed, problems = _as_number(array, column)
  if column.required:
    empty = pc.indices_nonzero(pc.is_null(typed))
    problems = dict.fromkeys(empty.to_pylist(), "missing") | problems
  return typed, problems


def _as_string(array: pa.Array) -> pa.Array:
  """Strings; whole floats lose their `.0`; empty strings are null."""
  if pa.types.is_floating(array.type):
    # Data frames turn integer ids into floats where some are missing.
    missing = pa.scalar(None, array.type)
    array = pc.if_else(pc.is_nan(array), missing, array)
    whole = pc.and_(
      pc.equal(pc.floor(array), array), pc.less(pc.abs(array), 2.0**63)
    )
    whole = pc.all(whole).as_py() is not False
    array = array.cast(pa.int64()) if whole else array
  array = array.cast(pa.string())
  return pc.if_else(pc.equal(array, ""), pa.scalar(None, pa.string()), array)


_WORDS = {"true": 1.0, "false": 0.0}
_NO_FLAG = "not a flag (0, 1, true, false)"
_ABSENT = ("", "null", "none")


def _parse(text: str | None) -> float | None:
  text = (text or "").strip().lower()
  return _WORDS[text] if text in _WORDS else _parse_number(text)


def _parse_number(text: str | None) -> float | None:
  text = (text or "").strip().lower()
  return float(text) if text not in _ABSENT else None


def _loop(array: pa.Array, parse: Any, kind: pa.DataType, problem: str):
  """Value by value, where the whole-column conversion failed."""
  values: list[Any] = []
  problems = {}
  for row, text in enumerate(array.to_pylist()):
    try:
      values.append(parse(text))
    except (ValueError, OverflowError):
      problems[row] = problem
      values.append(None)
  return pa.array(values, kind), problems


def _as_number(
  array: pa.Array, column: Column
) -> tuple[pa.Array, dict[int, str]]:
  problems: dict[int, str] = {}
  if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
    try:
      # Straight to int64: float64 would round beyond 2^53.
      exact = pa.int64() if column.kind == "int" else pa.float64()
      array = array.cast(exact)
    except pa.ArrowInvalid:
      problem = _NO_FLAG if column.kind == "flag" else "not a number"
      array, problems = _loop(array, _parse, pa.float64(), problem)
  if pa.types.is_floating(array.type):
    array = array.cast(pa.float64())
    # NaN is how data frames write "absent"; a required column refuses both.
    array = pc.if_else(pc.is_nan(array), pa.scalar(None, pa.float64()), array)
    _note(problems, pc.is_inf(array), "not finite")
  elif not pa.types.is_boolean(array.type):
    array = array.cast(pa.int64())
  if column.kind == "flag":
    numbers = array.cast(pa.float64())
    two = pc.is_in(numbers, value_set=pa.array([0.0, 1.0, None]))
    _note(problems, pc.invert(two), _NO_FLAG)
    return _without(pc.equal(numbers, 1.0), problems), problems
  if math.isfinite(column.low):
    _note(problems, pc.less(array, column.low), f"below {column.low:g}")
  if math.isfinite(column.high):
    _note(problems, pc.greater(array, column.high), f"above {column.high:g}")
  array = _without(array, problems)
  if column.kind == "int":
    if pa.types.is_floating(array.type):
      array = pc.round(array)
      _note(problems, pc.greater(array, 2.0**62), "too large")
      array = _without(array, problems)
    return array.cast(pa.int64()), problems
  return array.cast(pa.float64()), problems


# Later than the year 5000 in seconds; milliseconds of 1973.
_LARGEST_SECONDS = 1e11


def _as_time(array: pa.Array) -> tuple[pa.Array, dict[int, str]]:
  """Milliseconds from a date and time (UTC unless it says) or from seconds."""
  problems: dict[int, str] = {}
  if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
    try:
      array = array.cast(pa.float64())
    except pa.ArrowInvalid:
      array, problems = _read_times(array)
  if pa.types.is_timestamp(array.type):
    milliseconds = array.cast(pa.timestamp("ms", array.type.tz), safe=False)
    array = milliseconds.cast(pa.int64())
  elif (dates := _compact_dates(array.cast(pa.float64()))) is not None:
    array = dates.cast(pa.int64())
  else:
    array = array.cast(pa.float64())
    _note(
      problems,
      pc.greater(array, _LARGEST_SECONDS),
      "too large for seconds; name the column timestamp_ms if it is that",
    )
    array = pc.multiply(array, 1000.0)
  typed, more = _as_number(array, _TIME)
  return typed, more | problems


def _read_times(array: pa.Array) -> tuple[pa.Array, dict[int, str]]:
  """Seconds (float64) or times, whichever fewer values are not."""
  problem = "not a time (ISO 8601 or seconds)"
  seconds = _loop(array, _parse_number, pa.float64(), problem)
  if not seconds[1]:
    return seconds
  times, wrong = _loop(array, _parse_time, pa.int64(), problem)
  if len(seconds[1]) <= len(wrong):
    return seconds
  return times.cast(pa.timestamp("ms")), wrong


def _compact_dates(array: pa.Array) -> pa.Array | None:
  """Midnights, where all values are dates without dashes, such as 20240131.

  ISO 8601 allows that form; as seconds they would all lie in August 1970.
  """
  given = array.drop_null()
  date = pc.and_(
    pc.and_(pc.greater_equal(given, 19000101), pc.less(given, 21010101)),
    pc.equal(pc.floor(given), given),
  )
  if not len(given) or not pc.all(date).as_py():
    return None
  text = array.cast(pa.int64()).cast(pa.string())
  times = pc.strptime(text, "%Y%m%d", "ms", error_is_null=True)
  return times if times.null_count == array.null_count else None


def _parse_time(text: str | None) -> int | None:
  text = (text or "").strip()
  if text.lower() in _ABSENT:
    return None
  time = datetime.datetime.fromisoformat(text)
  if time.tzinfo is None:
    time = time.replace(tzinfo=datetime.UTC)
  return round(time.timestamp() * 1000)


def _note(problems: dict[int, str], wrong: pa.Array, problem: str) -> None:
  for row in pc.indices_nonzero(pc.fill_null(wrong, False)).to_pylist():
    problems.setdefault(row, problem)


def _without(array: pa.Array, problems: dict[int, str]) -> pa.Array:
  if not problems:
    return array
  bad = pa.array([row in problems for row in range(len(array))])
  return pc.if_else(bad, pa.scalar(None, array.type), array)
