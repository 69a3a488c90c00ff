"""Tables → per-user, time-ordered events, as portable SQL.

Only standard SQL (common table expressions, window functions), so the same
text runs on DuckDB on one machine and on Spark on a cluster. The engine makes
each SELECT below a table under the name of its function and gives `events`:
the checked events with `source_row`.
"""

import dataclasses
from collections.abc import Sequence

_CORE = ("user_id", "item_id", "timestamp_ms", "request_id", "source_row")


@dataclasses.dataclass(frozen=True)
class Filters:
  """Who is left out, in this order: where, copies, items, users."""

  where: str
  min_item_events: int
  min_user_events: int


def marked(filters: Filters, positive: str, features: Sequence[str]) -> str:
  """Every event, with the reason it is left out or '' in `dropped`.

  Of events with the same user, item, time and request the first in the source
  is kept. Items are counted before users, each once.

  Args:
    filters: which events to leave out.
    positive: condition on event columns; 0 or 1 in `is_positive`.
    features: event columns to carry along.
  """
  columns = ", ".join((*_CORE, *map(quote, features)))
  where = filters.where.strip() or "1 = 1"
  return f"""
WITH chosen AS (
  SELECT {columns}, CASE WHEN (
{where}
  ) THEN 1 ELSE 0 END AS is_chosen, CASE WHEN (
{positive}
  ) THEN 1 ELSE 0 END AS is_positive
  FROM events
), copies AS (
  SELECT *, CASE WHEN is_chosen = 1 THEN row_number() OVER (
    PARTITION BY is_chosen, user_id, item_id, timestamp_ms, request_id
    ORDER BY source_row) ELSE 0 END AS copy
  FROM chosen
), item_counts AS (
  SELECT *, sum(CASE WHEN copy = 1 THEN 1 ELSE 0 END) OVER (
    PARTITION BY item_id) AS item_events
  FROM copies
), user_counts AS (
  SELECT *, sum(CASE WHEN copy = 1
      AND item_events >= {int(filters.min_item_events)} THEN 1 ELSE 0 END)
    OVER (PARTITION BY user_id) AS user_events
  FROM item_counts
)
SELECT {columns}, is_positive, CASE
  WHEN is_chosen = 0 THEN 'where'
  WHEN copy > 1 THEN 'duplicate_event'
  WHEN item_events < {int(filters.min_item_events)} THEN 'min_item_events'
  WHEN user_events < {int(filters.min_user_events)} THEN 'min_user_events'
  ELSE '' END AS dropped
FROM user_counts"""


def check(condition: str, aggregate: bool) -> tuple[str, str, str]:
  """A SELECT that fails where a condition is none; what it is on; an example.

  Args:
    condition: SQL.
    aggregate: on the events of a request together, not on each.
  """
  if aggregate:
    return (
      f"SELECT CASE WHEN (\n{condition}\n) THEN 1 ELSE 0 END FROM events "
      "GROUP BY user_id",
      "the events of a request",
      'count(*) FILTER (WHERE play_time_ms >= 3000) >= 5 AND bool_or("like")',
    )
  return (
    f"SELECT count(CASE WHEN (\n{condition}\n) THEN 1 END) FROM events",
    "event columns",
    '"like" = true AND timestamp_ms > 1000',
  )


def kept(split: str, request_gap_ms: int = 0) -> str:
  """The events that stay, each with its place, its request and its split.

  Args:
    split: an expression of splits.py.
    request_gap_ms: an event without a request joins the one before it, if that
      has none either and is at most so long ago; 0: it is a request of its own.
  """
  joins = "request_id = last_request"
  if request_gap_ms:
    joins += (
      " OR (request_id IS NULL AND last_request IS NULL AND "
      f"timestamp_ms - last_ms <= {int(request_gap_ms)})"
    )
  return f"""
WITH placed AS (
  SELECT *,
    row_number() OVER (
      PARTITION BY user_id ORDER BY timestamp_ms, source_row) AS place,
    count(*) OVER (PARTITION BY user_id) AS length
  FROM marked WHERE dropped = ''
), compared AS (
  SELECT *, lag(request_id) OVER (
    PARTITION BY user_id ORDER BY place) AS last_request,
    lag(timestamp_ms) OVER (PARTITION BY user_id ORDER BY place) AS last_ms
  FROM placed
)
SELECT *, {split} AS split,
  -- A null request equals nothing, nor does the first event's last one.
  sum(CASE WHEN {joins} THEN 0 ELSE 1 END) OVER (
    PARTITION BY user_id ORDER BY place) - 1 AS request
FROM compared"""


def sessions(condition: str) -> str:
  """Whether each request of a user is a session to learn from, as 0 or 1.

  Args:
    condition: on aggregates of the request's events that were kept, over any
      event column; empty: every request is one.
  """
  if not condition.strip():
    return """
SELECT DISTINCT user_id AS run_user, request AS run_number, 1 AS is_session
FROM kept"""
  # The names of `runs` must not hide columns that the condition may name.
  return f"""
WITH runs AS (
  SELECT user_id AS run_user, request AS run_number, source_row AS run_row
  FROM kept
)
SELECT run_user, run_number, CASE WHEN (
{condition}
  ) THEN 1 ELSE 0 END AS is_session
FROM events JOIN runs ON source_row = run_row
GROUP BY run_user, run_number"""


def user_ids() -> str:
  """Users, numbered from 1 by first appearance in the source."""
  return """
SELECT user_id, row_number() OVER (ORDER BY min(source_row)) AS dense_user,
  count(*) AS num_events,
  sum(CASE WHEN split = 0 THEN 1 ELSE 0 END) AS training_events
FROM kept GROUP BY user_id"""


def item_ids() -> str:
  """Items, numbered from 1 by first appearance: when there is no item table."""
  return """
SELECT item_id, row_number() OVER (ORDER BY min(source_row)) AS dense_item
FROM kept GROUP BY item_id"""


def item_counts() -> str:
  """Training events of each item that has any."""
  return """
SELECT i.dense_item AS dense_item, count(*) AS events
FROM kept k JOIN item_ids i ON k.item_id = i.item_id
WHERE k.split = 0 GROUP BY i.dense_item"""


def quantiles(column: str, count: int) -> str:
  """`count` training quantiles of a column, one column each: q0, q1, …"""
  parts = ", ".join(
    f"percentile_disc({(i + 0.5) / count}) WITHIN GROUP "
    f"(ORDER BY {quote(column)}) AS q{i}"
    for i in range(count)
  )
  return f"SELECT {parts} FROM kept WHERE split = 0"


def distinct(column: str, limit: int) -> str:
  """Up to `limit` distinct training values of a column."""
  return (
    f"SELECT DISTINCT {quote(column)} AS value FROM kept WHERE split = 0 "
    f"AND {quote(column)} IS NOT NULL LIMIT {int(limit)}"
  )


def records(features: Sequence[str], flags: Sequence[str]) -> str:
  """Events in the order of the shards, all numbers.

  Args:
    features: numeric event columns, as doubles.
    flags: boolean event columns, as 0.0 and 1.0.
  """
  values = [f"CAST(k.{quote(f)} AS DOUBLE) AS {quote(f)}" for f in features]
  values += [
    f"CAST(CASE WHEN k.{quote(f)} THEN 1 WHEN NOT k.{quote(f)} THEN 0 END "
    f"AS DOUBLE) AS {quote(f)}"
    for f in flags
  ]
  columns = ",\n  ".join(
    (
      "u.dense_user AS dense_user",
      "i.dense_item AS dense_item",
      "k.timestamp_ms AS timestamp_ms",
      "k.split AS split",
      "CAST(k.request AS BIGINT) AS request",
      "k.is_positive AS positive",
      "s.is_session AS session",
      *values,
    )
  )
  return f"""
SELECT
  {columns}
FROM kept k
JOIN user_ids u ON k.user_id = u.user_id
JOIN item_ids i ON k.item_id = i.item_id
JOIN sessions s ON k.user_id = s.run_user AND k.request = s.run_number
ORDER BY u.dense_user, k.place"""


def quote(name: str) -> str:
  """A column name as SQL: `like` is a word of the language.

  Spark reads double quotes so with spark.sql.ansi.doubleQuotedIdentifiers.
  """
  return '"' + name.replace('"', '""') + '"'
