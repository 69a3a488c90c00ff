"""The two marks of an event: positive feedback, and the session's quality.

Marks are no model features. `positive` says which events the positive-feedback
pathway takes (OneRec-V1 §2.2), `session` which requests are sessions worth
imitating (OneRec §3.2: a session-wise list is learned from sessions of high
quality alone).
"""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from onerec_jax.data import queries, schema

FEEDBACK = (
  "like", "follow", "comment", "forward", "collect", "long_view",
  "profile_enter", "pay",
)  # fmt: skip
"""Flags that say more than a click."""

GOOD_RATING = 4
_EVERY = "1 = 1"


def positive(condition: str, columns: Collection[str]) -> str:
  """The SQL condition of a positive event.

  The default is INFERRED: any flag of `FEEDBACK` or a rating of at least
  `GOOD_RATING`, whichever the data have; where they have neither, a click;
  where they have no feedback at all, every event.

  Args:
    condition: prepare.positive; empty: the default.
    columns: the event columns that hold values.
  """
  if condition.strip():
    return condition
  parts = [queries.quote(name) for name in FEEDBACK if name in columns]
  if "rating" in columns:
    parts.append(f"rating >= {GOOD_RATING}")
  if not parts and "click" in columns:
    parts.append(queries.quote("click"))
  return " OR ".join(parts) or _EVERY


def note(given: str, condition: str, marked: int, events: int) -> str:
  """What to say where the default of prepare.positive marks nothing.

  Args:
    given: prepare.positive.
    condition: what `positive` made of it.
    marked: events that meet it.
    events: all events.

  Returns:
    A sentence, or nothing where some events meet it, where the condition was
    given, or where the data have no feedback.
  """
  if given.strip() or condition == _EVERY or marked:
    return ""
  return (
    f"the default of prepare.positive, {condition}, marks none of the "
    f"{events:,} events as positive feedback; if yours is on another scale, "
    "set it, as --config.prepare.positive='rating >= 1'"
  )


def positive_events(
  manifest: Mapping[str, Any],
  columns: Mapping[str, Sequence[float]],
  count: int,
) -> np.ndarray:
  """Which events of a request's history are positive, as preparation marks.

  Args:
    manifest: of the prepared data.
    columns: event column → `count` numbers, NaN absent.
    count: number of events.

  Returns:
    bool [count]; events without the columns that the mark looks at are not
    positive.

  Raises:
    ValueError: the mark looks at a column no number stands for.
  """
  values = {"event_place": pa.array(range(count), pa.int64())}
  for name in {*schema.EVENTS, *manifest["event_features"],
               *manifest["unused_columns"], *columns}:  # fmt: skip
    given = pa.array(columns.get(name, [None] * count), pa.float64())
    given = given if name not in columns else _nan_to_null(given)
    is_flag = name in schema.FLAGS or name.startswith(schema.STAGE_PREFIX)
    values[name] = given.cast(pa.bool_()) if is_flag else given
  with duckdb.connect() as connection:
    connection.register("events", pa.table(values))
    try:
      rows = connection.execute(
        "SELECT CASE WHEN (\n" + manifest["positive"] + "\n) THEN 1 ELSE 0 END "
        "AS mark FROM events ORDER BY event_place"
      ).fetchnumpy()
    except duckdb.Error as error:
      raise ValueError(
        f"prepare.positive = {manifest['positive']!r} cannot be told of a "
        f"request's events ({error})"
      ) from error
  return np.asarray(rows["mark"]) == 1


def _nan_to_null(values: pa.Array) -> pa.Array:
  return pc.if_else(pc.is_nan(values), pa.scalar(None, pa.float64()), values)


assert set(FEEDBACK) < set(schema.FLAGS)
