import math

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.data import schema, time_units

EVENTS = {
  "user_id": ["a", "b", "a"],
  "item_id": ["x", "x", "y"],
  "timestamp_ms": [30, 20, 10],
}


def check(columns, on_bad_row="error", items=None, users=None, **source):
  tables = schema.Tables(pa.table(columns), items, users, source)
  checked, skipped = schema.validate(tables, on_bad_row)
  return checked.events.read_all(), skipped


def test_types_and_source_rows():
  table, skipped = check(
    {
      "user_id": [7, 8, 7],
      "item_id": [1.0, 2.0, 1.0],
      "timestamp_ms": ["30", "20", "9007199254740993"],
      "rating": [5, 4, None],
      "like": [0, 1, None],
      "stage_ranking": [True, False, True],
      "mood": ["good", "bad", None],
    }
  )
  assert table["user_id"].to_pylist() == ["7", "8", "7"]
  assert table["item_id"].to_pylist() == ["1", "2", "1"]
  # One more than 2^53: text does not go through a float.
  assert table["timestamp_ms"].to_pylist() == [30, 20, 9007199254740993]
  assert table["rating"].to_pylist() == [5.0, 4.0, None]
  assert table["like"].to_pylist() == [False, True, None]
  assert table["stage_ranking"].type == pa.bool_()
  assert table["mood"].to_pylist() == ["good", "bad", None]
  assert table["source_row"].to_pylist() == [1, 2, 3]
  assert not skipped


@pytest.mark.parametrize(
  ("column", "values", "match"),
  [
    ("timestamp_ms", [1, -5, 2], r"row 2, column 'timestamp_ms': below 0.*-5"),
    ("timestamp_ms", [1.0, 2.0, math.inf], "row 3.*not finite, value inf"),
    ("timestamp_ms", [1.0, math.nan, 2.0], "row 2.*missing, value nan"),
    ("timestamp_ms", ["1", "2", "soon"], "row 3.*not a number, value 'soon'"),
    ("user_id", ["a", None, "b"], "row 2, column 'user_id': missing"),
    ("item_id", ["", "x", "y"], "row 1, column 'item_id': missing, value ''"),
    ("rating", [1.0, -math.inf, 2.0], "row 2, column 'rating': not finite"),
    ("play_time_ms", [1, 2, -3], "row 3, column 'play_time_ms': below 0"),
    ("click", [0, 2, 1], "row 2, column 'click': not a flag.*value 2"),
    (
      "stage_shown",
      ["True", "0", "yes"],
      r"row 3, .*: not a flag \(0, 1, true, false\), value 'yes'",
    ),
    ("latitude", [90.5, 0.0, 0.0], "row 1, column 'latitude': above 90"),
    ("log_probability", [0.1, 0, 0], "row 1, column 'log_probability': above"),
  ],
)
def test_bad_row_is_named_or_skipped(column, values, match):
  events = EVENTS | {column: values}
  with pytest.raises(schema.TableError, match=match) as error:
    check(events, events="log.csv")
  assert str(error.value).startswith("log.csv, row ")
  assert "--config.prepare.on_bad_row=skip" in str(error.value)
  table, skipped = check(events, "skip")
  assert table.num_rows == 2
  (reason,) = skipped
  assert reason.startswith(f"events.{column}: ")
  assert skipped[reason] == 1


@pytest.mark.parametrize(
  ("events", "match"),
  [
    ({"user_id": [1], "timestamp_ms": [1]}, "needs a column 'item_id'"),
    ({"user_id": [1], "item_id": [1]}, "needs a column 'timestamp_ms'"),
    (
      {"user_id": [1], "itemid": [1], "timestamp_ms": [1]},
      "needs a column 'item_id'",
    ),
    (
      EVENTS | {"playtime_ms": [1, 2, 3]},
      "unknown column 'playtime_ms'; rename it to 'play_time_ms'",
    ),
    (EVENTS | {"Rating": [1, 2, 3]}, "'Rating'; rename it to 'rating'"),
    (EVENTS | {"Request_ID": [1, 2, 3]}, "rename it to 'request_id'"),
    (EVENTS | {"timestamp": [1, 2, 3]}, "both timestamp and timestamp_ms"),
    (EVENTS | {"source_row": [1, 2, 3]}, "log.csv: .*'source_row'.*rename it"),
    (EVENTS | {"Source_Row": [1, 2, 3]}, "log.csv: .*'Source_Row'.*rename it"),
    (
      {"Item_ID": [1, 2, 3]} | EVENTS,
      "'Item_ID' and 'item_id' differ only in case.*rename one",
    ),
    (
      EVENTS | {"stage_a": [1, 1, 1], "stage_A": [0, 0, 0]},
      "'stage_a' and 'stage_A' differ only in case",
    ),
    (
      EVENTS | {"rating": [[1], [2], [3]]},
      "'rating' has type list.*cannot be read as float",
    ),
  ],
)
def test_wrong_column_is_named(events, match):
  with pytest.raises(schema.TableError, match=match):
    check(events, events="log.csv")


@pytest.mark.parametrize(
  "name",
  [
    *("Timestamp", "TIMESTAMP", "timestmp", "time_stamp", "timestamps"),
    *("timestampms", "Timestamp_MS", "time_stamp_ms"),
  ],
)
def test_a_time_that_is_misspelt_is_no_order_of_rows(name):
  events = {"user_id": [1], "item_id": [1], name: [1]}
  with pytest.raises(
    schema.TableError,
    match=f"log.csv: unknown column '{name}'; rename it to 'timestamp'.* or "
    "'timestamp_ms'",
  ):
    check(events, events="log.csv", ordinal_time=True)


def test_beside_times_a_name_that_is_alike_is_ones_own():
  table, _ = check(EVENTS | {"timestamps": [1, 2, 3]})
  assert table["timestamps"].to_pylist() == [1, 2, 3]


def test_a_missing_column_is_told_with_the_names_of_the_file():
  events = {"userId": [1], "movieId": [1], "timestamp": [1]}
  with pytest.raises(schema.TableError) as error:
    check(events, events="log.csv")
  assert (
    "needs a column 'user_id'; it has ['userId', 'movieId', 'timestamp']"
    in (str(error.value))
  )


@pytest.mark.parametrize(
  ("low", "high", "told"),
  [
    # 14 November 2023 in each unit.
    (1_700_000_000, 1_700_000_009, "look like seconds; if they are, name"),
    (1_700_000_000_000, 1_700_000_000_009, ""),
    (1_700_000_000_000_000, 1_700_000_000_000_009, "microseconds; if they are"),
    (1_700_000_000_000_000_000, 1_700_000_000_000_000_009, "nanoseconds; if"),
    # One time that may be milliseconds; the first that may not.
    (99_999_999_999_999, 1_700_000_000_000_000, ""),
    (100_000_000_000_000, 1_700_000_000_000_000_000, "look like microseconds"),
    (None, None, ""),
  ],
)
def test_times_of_another_unit(low, high, told):
  note = time_units.unit_note(low, high)
  assert bool(note) == bool(told)
  assert told in note
  assert not told or f"every timestamp_ms lies from {low} to {high}" in note


def test_unknown_item():
  items = pa.table({"item_id": ["x"]})
  with pytest.raises(schema.TableError, match="row 3.*not in the items.*'y'"):
    check(EVENTS, items=items)
  table, skipped = check(EVENTS, "skip", items=items)
  assert table["source_row"].to_pylist() == [1, 2]
  assert skipped == {"events.item_id: not in the items table": 1}


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_items_without_rows_are_not_the_events_fault(on_bad_row):
  items = pa.table({"item_id": pa.array([], pa.string())})
  source = {"items": "items.csv"}
  tables = schema.Tables(pa.table(EVENTS), items, source=source)
  told = "^items.csv: there are no rows in the items table"
  with pytest.raises(schema.TableError, match=told):
    schema.validate(tables, on_bad_row)


def test_item_that_stands_twice():
  items = pa.table({"item_id": [1, 2, 1], "price": [1.0, 2.0, 3.0]})
  events = EVENTS | {"item_id": [1, 2, 1]}
  with pytest.raises(schema.TableError, match="row 3, column 'item_id'"):
    check(events, items=items)
  tables = schema.Tables(pa.table(events), items)
  checked, skipped = schema.validate(tables, "skip")
  assert checked.items["price"].to_pylist() == [1.0, 2.0]
  assert skipped == {"items.item_id: stands there already": 1}


@pytest.mark.parametrize("table", ["items", "users"])
def test_a_bad_row_does_not_take_an_id_from_a_good_one(table):
  """The first good row stays, later ones of the same id are counted."""
  if table == "items":
    rows = {"item_id": ["y", "x", "x", "x"], "price": [1.0, -1.0, 2.0, 3.0]}
    expected = {"item_id": ["y", "x"], "price": [1.0, 2.0]}
    reason = "items.price: below 0"
  else:
    # No other column of users can be bad; an id that is absent takes none.
    rows = {"user_id": [None, None, "a", "a"], "age": [1, 2, 3, 4]}
    expected = {"user_id": ["a"], "age": [3]}
    reason = "users.user_id: missing"
  given = schema.Tables(pa.table(EVENTS), **{table: pa.table(rows)})
  checked, skipped = schema.validate(given, "skip")
  assert getattr(checked, table).to_pydict() == expected
  key = next(iter(rows))
  bad = 1 if table == "items" else 2
  assert skipped == {reason: bad, f"{table}.{key}: stands there already": 1}


def test_ordinal_time_has_no_other_times():
  with pytest.raises(schema.TableError, match="'timestamp_ms'.*rename it"):
    check(EVENTS, ordinal_time=True)


@pytest.mark.parametrize(
  ("times", "expected"),
  [
    (["1970-01-01T00:00:01Z", "1970-01-01 00:00:02.5"], [1000, 2500]),
    (["1970-01-01T01:00:01+01:00", "1970-01-02"], [1000, 86_400_000]),
    ([1.5, 2], [1500, 2000]),
    (["1", "2"], [1000, 2000]),
    # Without dashes ISO 8601 dates look like numbers.
    (["19700102", "19700104"], [86_400_000, 3 * 86_400_000]),
    ([19700102, 19700104], [86_400_000, 3 * 86_400_000]),
    ([20240131, 20240132], [20240131000, 20240132000]),
  ],
)
def test_timestamp_is_date_time_or_seconds(times, expected):
  events = {"user_id": [1, 1], "item_id": [1, 2], "timestamp": times}
  table, _ = check(events)
  assert table["timestamp_ms"].to_pylist() == expected


@pytest.mark.parametrize(
  ("time", "match"),
  [
    (1_700_000_000_000, "too large for seconds; name the column timestamp_ms"),
    ("yesterday", "not a time"),
    (-4, "below 0, value -4"),
  ],
)
def test_wrong_timestamp(time, match):
  events = {"user_id": [1], "item_id": [1], "timestamp": [time]}
  with pytest.raises(schema.TableError, match=match):
    check(events)


def test_float_ids_too_large_for_whole_numbers_are_kept_as_they_are():
  ids = [1e20, float("inf"), 2.0]
  events = {"user_id": [1, 1, 1], "item_id": ids, "timestamp_ms": [1, 2, 3]}
  table, _ = check(events)
  assert [float(item) for item in table["item_id"].to_pylist()] == ids


@pytest.mark.parametrize("absent", ["NULL", "N/A", "", " ", "true"])
@pytest.mark.parametrize(
  ("first", "last", "expected"),
  [
    ("1", "2.5", [1000, 2500]),
    ("19700102", "19700104", [86_400_000, 3 * 86_400_000]),
    ("1970-01-02", "1970-01-01T00:00:01Z", [86_400_000, 1000]),
  ],
)
def test_one_bad_time_costs_no_other_row(first, last, expected, absent):
  times = [first, absent, last]
  events = {"user_id": [1] * 3, "item_id": [1, 2, 3], "timestamp": times}
  with pytest.raises(schema.TableError, match="row 2"):
    check(events)
  table, _ = check(events, on_bad_row="skip")
  assert table["timestamp_ms"].to_pylist() == expected


def test_seconds_too_large_beside_a_bad_time_say_what_to_do():
  times = ["1700000000000", "N/A"]
  events = {"user_id": [1, 1], "item_id": [1, 2], "timestamp": times}
  with pytest.raises(schema.TableError, match="name the column timestamp_ms"):
    check(events)


def test_ordinal_time_repeats_the_source_row():
  events = {"user_id": [1, 1], "item_id": [1, 2]}
  table, _ = check(events, ordinal_time=True)
  assert table["timestamp_ms"].to_pylist() == [1, 2]


def test_rows_are_numbered_across_batches():
  batch = pa.record_batch({"user_id": ["u"], "item_id": ["i"]})
  batch = batch.append_column("timestamp_ms", pa.array([1]))
  bad = batch.set_column(2, "timestamp_ms", pa.array([-1]))
  reader = pa.RecordBatchReader.from_batches(batch.schema, [batch, batch, bad])
  checked, _ = schema.validate(schema.Tables(reader))
  with pytest.raises(schema.TableError, match="row 3"):
    checked.events.read_all()


def test_on_bad_row_must_be_known():
  with pytest.raises(ValueError, match="'error' or 'skip'"):
    check(EVENTS, "ignore")


@settings(max_examples=40, deadline=None)
@given(
  st.lists(
    st.one_of(
      st.none(), st.floats(), st.integers(-5, 5).map(float), st.just(1e300)
    ),
    min_size=1,
    max_size=8,
  )
)
def test_skip_keeps_exactly_the_good_times(times):
  def good(t):
    return t is not None and math.isfinite(t) and 0 <= t <= 2.0**62

  n = len(times)
  events = {
    "user_id": ["u"] * n,
    "item_id": ["i"] * n,
    "timestamp_ms": pa.array(times, pa.float64()),
  }
  table, skipped = check(events, "skip")
  rows = [i + 1 for i, t in enumerate(times) if good(t)]
  assert table["source_row"].to_pylist() == rows
  assert sum(skipped.values()) == n - len(rows)
