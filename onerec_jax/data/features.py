"""Values → small integers a model can embed; 0 is always "absent".

What is fitted (category codes, rating edges) is fitted on the training split
and stored in the manifest under `bucketing`, so that requests are bucketed
the way the shards were: `bucketing[table][feature]` is a *spec* with a `kind`:

  log2   1 + min(40, floor(log2(1 + x))); milliseconds, prices.
  flag   1 false, 2 true.
  edges  how many of `edges` are at or below x, at least 1; ratings.
  codes  1 + the place of x in `values`, most frequent first; categories.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

MAX_CODES = 1000
"""Categories beyond the most frequent thousand are 0."""
USER_ID = "user_id"
"""The user feature that is the user's own id, if `prepare.user_ids`."""
MAX_EDGES = 32
_MAX_LOG2 = 40
_WHOLE = re.compile(r"-?\d+\.0")

Spec = dict[str, Any]


def vocab_size(spec: Spec) -> int:
  """How many values a feature takes, 0 included."""
  kind = spec["kind"]
  if kind == "log2":
    return _MAX_LOG2 + 2
  if kind == "flag":
    return 3
  return 1 + len(spec["edges" if kind == "edges" else "values"])


def vocab_sizes(specs: Mapping[str, Spec]) -> dict[str, int]:
  """Feature name → vocabulary size."""
  return {name: vocab_size(spec) for name, spec in specs.items()}


def bucket_numbers(spec: Spec, values: np.ndarray) -> np.ndarray:
  """Buckets float values [n] (NaN: absent) into int32 [n]."""
  values = np.asarray(values, np.float64)
  absent = np.isnan(values)
  values = np.where(absent, 0.0, values)
  kind = spec["kind"]
  if kind == "log2":
    exponent = np.floor(np.log2(1.0 + np.maximum(values, 0.0)))
    buckets = 1 + np.minimum(exponent, _MAX_LOG2)
  elif kind == "flag":
    buckets = np.where(values != 0.0, 2, 1)
  elif kind == "edges":
    edges = np.asarray(spec["edges"], np.float64)
    buckets = np.maximum(np.searchsorted(edges, values, side="right"), 1)
  else:
    raise ValueError(f"kind {kind!r} does not take numbers")
  return np.where(absent, 0, buckets).astype(np.int32)


def bucket_codes(
  spec: Spec, values: pa.Array | pa.ChunkedArray | Sequence[Any]
) -> np.ndarray:
  """Codes of categories [n] as int32 [n]; unknown ones are 0.

  Values of a request, a plain sequence, are matched however they are spelt:
  3, 3.0, "3" and "3.0" are one category, and so are True and "true".
  """
  if not isinstance(values, pa.Array | pa.ChunkedArray):
    spelt = [_spelt(value, spec["values"]) for value in values]
    values = pa.array(spelt, pa.string())
  known = pa.array(spec["values"], pa.string())
  places = pc.index_in(_as_text(values), value_set=known)
  codes = pc.fill_null(pc.add(places, 1), 0)
  return np.asarray(codes.to_numpy(zero_copy_only=False), np.int32)


def fit_codes(
  values: pa.Array | pa.ChunkedArray,
  weights: np.ndarray,
  most: int | None = MAX_CODES,
) -> Spec:
  """The most frequent categories, by total weight, then by name.

  Args:
    values: [n] categories; null is no category.
    weights: [n] training events (items) or 1 for a training user.
    most: how many get a code; None: all.

  Returns:
    A spec; categories of no weight were never trained on and stay unknown.
  """
  table = pa.table(
    {"value": _as_text(values), "weight": np.asarray(weights, np.int64)}
  )
  table = table.filter(pc.is_valid(table["value"]))
  table = table.group_by("value").aggregate([("weight", "sum")])
  table = table.filter(pc.greater(table["weight_sum"], 0))
  table = table.sort_by([("weight_sum", "descending"), ("value", "ascending")])
  return {"kind": "codes", "values": table["value"][:most].to_pylist()}


def _as_text(
  values: pa.Array | pa.ChunkedArray,
) -> pa.Array | pa.ChunkedArray:
  """Categories as text; NaN and empty text are no category."""
  if pa.types.is_floating(values.type):
    missing = pa.scalar(None, values.type)
    values = pc.if_else(pc.is_nan(values), missing, values)
  text = values.cast(pa.string())
  return pc.if_else(pc.equal(text, ""), pa.scalar(None, pa.string()), text)


def _spelt(value: Any, known: Sequence[str]) -> str | None:
  """A request's value as the tables spell it; as it is if they do not."""
  if value is None:
    return None
  try:
    # The cast of the tables: Parquet's True is "true" there, its 3.0 is "3".
    text = _as_text(pa.array([value]))[0].as_py()
  except (pa.ArrowException, OverflowError, UnicodeError):
    text = str(value)
  if text is None or text in known:
    return text
  # A CSV file keeps its own spelling: "True", "3.0".
  plain = _plain(text)
  return next((other for other in known if _plain(other) == plain), text)


def _plain(text: str) -> str:
  if text.lower() in ("true", "false"):
    return text.lower()
  return text.removesuffix(".0") if _WHOLE.fullmatch(text) else text


def gaps(timestamps: np.ndarray, first: np.ndarray) -> np.ndarray:
  """Milliseconds since the previous event [n]; NaN where `first` is true."""
  gap = np.diff(timestamps, prepend=timestamps[:1]).astype(np.float64)
  return np.where(first, np.nan, gap)


def event_features(
  bucketing: Mapping[str, Mapping[str, Spec]],
  columns: Mapping[str, np.ndarray],
  timestamps: np.ndarray,
  first: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
  """Buckets events of one or several users, oldest first within each.

  Args:
    bucketing: the manifest's.
    columns: event column → float [n], NaN absent; flags 0 or 1. Columns that
      were not there when the data was prepared do not count.
    timestamps: int64 [n], milliseconds.
    first: bool [n], the first event of each user; absent: one user.

  Returns:
    Every event feature of the manifest → int32 [n].
  """
  if first is None:
    first = np.arange(len(timestamps)) == 0
  absent = np.full(len(timestamps), np.nan)
  values = {"gap": gaps(timestamps, first), **columns}
  return {
    name: bucket_numbers(spec, values.get(name, absent))
    for name, spec in bucketing["event"].items()
  }


def user_features(
  bucketing: Mapping[str, Mapping[str, Spec]], values: Mapping[str, Any]
) -> dict[str, int]:
  """Every user feature of the manifest → its code for one user."""
  return {
    name: int(bucket_codes(spec, [values.get(name)])[0])
    for name, spec in bucketing["user"].items()
  }
