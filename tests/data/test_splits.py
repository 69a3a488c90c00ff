import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.data import queries, splits

CONNECTION = duckdb.connect()


def run(users, times, split):
  """Splits by the SQL that prepare runs."""
  marked = pa.table(
    {
      "user_id": users,
      "timestamp_ms": times,
      "request_id": pa.nulls(len(users), pa.string()),
      "source_row": list(range(len(users))),
      "dropped": [""] * len(users),
    }
  )
  CONNECTION.register("marked", marked)
  rows = CONNECTION.execute(
    f"SELECT source_row, split FROM ({queries.kept(split)}) x"
  ).fetchall()
  return [code for _, code in sorted(rows)]


LOGS = st.lists(
  st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=25
)


@settings(max_examples=40, deadline=None)
@given(LOGS)
def test_leave_one_out(log):
  users, times = map(list, zip(*log))
  expected = [0] * len(log)
  for user in set(users):
    rows = [i for i, u in enumerate(users) if u == user]
    rows.sort(key=lambda i: (times[i], i))
    if len(rows) >= 3:
      expected[rows[-1]] = 2
      expected[rows[-2]] = 1
  assert run(users, times, splits.leave_one_out()) == expected


@settings(max_examples=40, deadline=None)
@given(LOGS, st.integers(0, 5), st.integers(0, 5))
def test_by_time(log, one, other):
  first, last = sorted((one, other))
  users, times = map(list, zip(*log))
  expected = [2 if t >= last else 1 if t >= first else 0 for t in times]
  assert run(users, times, splits.by_time(first, last)) == expected


def test_boundaries_are_quantiles():
  times = np.random.default_rng(0).permutation(1000)
  CONNECTION.register("log", pa.table({"timestamp_ms": times}))
  found = CONNECTION.execute(splits.boundaries("log")).fetchone()
  assert found == pytest.approx((800, 900), abs=1)


def test_refusals():
  with pytest.raises(ValueError, match="no times.*leave_one_out"):
    splits.check("time", ordinal_time=True)
  with pytest.raises(ValueError, match="'half'"):
    splits.check("half", ordinal_time=False)
  with pytest.raises(ValueError, match="validation starts at 5 ms, after"):
    splits.by_time(5, 4)
