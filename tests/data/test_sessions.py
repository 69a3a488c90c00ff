"""Requests from gaps in time; targets in whole sessions, by plain Python."""

import itertools

import duckdb
import jax
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax import config as config_lib
from onerec_jax.data import batch as batch_lib
from onerec_jax.data import pipeline, queries, splits
from tests.data import test_pipeline as worlds

CONNECTION = duckdb.connect()
ROWS = st.lists(
  st.tuples(
    st.integers(0, 2),
    st.integers(0, 40),
    st.one_of(st.none(), st.none(), st.sampled_from("pq")),
  ),
  min_size=1,
  max_size=25,
)


@settings(max_examples=40, deadline=None)
@given(ROWS, st.integers(0, 9))
def test_events_close_in_time_are_one_request(rows, gap):
  users, times, requests = map(list, zip(*rows))
  marked = pa.table(
    {
      "user_id": users,
      "timestamp_ms": times,
      "request_id": pa.array(requests, pa.string()),
      "source_row": list(range(len(rows))),
      "dropped": [""] * len(rows),
    }
  )
  CONNECTION.register("marked", marked)
  query = queries.kept(splits.leave_one_out(), gap)
  found = CONNECTION.execute(
    f"SELECT source_row, request FROM ({query}) x"
  ).fetchall()
  expected = {}
  for user in set(users):
    own = [i for i, u in enumerate(users) if u == user]
    own.sort(key=lambda i: (times[i], i))
    number = 0
    for last, i in zip([None, *own], own):
      if last is not None:
        same = requests[i] is not None and requests[i] == requests[last]
        close = gap and times[i] - times[last] <= gap
        if not (same or (close and requests[i] is requests[last] is None)):
          number += 1
      expected[i] = number
  assert dict(found) == expected


def test_gaps_need_times():
  with pytest.raises(ValueError, match="no times.*prepare.request_gap_ms"):
    splits.check("leave_one_out", True, 5)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """Requests of one to nine events, two thirds of them good sessions."""
  rng = np.random.default_rng(3)
  users = []
  for user in range(1, 16):
    record = worlds._user(user, rng, 40)
    n = len(record.items)
    request = np.repeat(np.arange(40), rng.integers(1, 10, 40))[:n]
    good = rng.random(40) < 0.67
    users.append(
      record._replace(request=request.astype(np.int32), session=good[request])
    )
  return worlds.write(tmp_path_factory.mktemp("prepared"), users), users


@pytest.mark.parametrize("m", [1, 2, 3])
def test_targets_are_whole_sessions_of_good_requests(world, m):
  """Every row's targets by m, against the requests cut by hand."""
  prepared, records = world
  config = config_lib.PipelineConfig(
    batch_size=2, row_positions=30, row_targets=4 * m, max_history=6,
    targets="session", session_items=m,
  )  # fmt: skip
  expected = {}
  for record in records:
    train = [i for i, s in enumerate(record.split) if s == splits.TRAIN]
    for request in np.unique(record.request[train]):
      events = [i for i in train if record.request[i] == request]
      history = record.items[max(0, events[0] - 6) : events[0]].tolist()
      while record.session[events[0]] and len(events) >= m:
        session, events = events[:m], events[m:]
        expected[tuple(record.items[session].tolist())] = history
        if not events:
          break
  dataset, steps = pipeline.training_dataset(prepared, config, 0)
  found = {}
  for batch in itertools.islice(iter(dataset), steps + 1):
    mask = np.asarray(batch_lib.visible(jax.tree.map(np.asarray, batch)))
    for row, session in np.ndindex(2, 4):
      slots = slice(session * m, session * m + m)
      items = batch.targets[row, slots]
      assert (items > 0).all() or not items.any(), "whole or empty"
      if items.any():
        shown = [batch.items[row][seen] for seen in mask[row, slots]]
        histories = [x[x > 0].tolist() for x in shown]
        assert histories == [histories[0]] * m
        found[tuple(items.tolist())] = histories[0]
  assert found == expected
  assert len(expected) > 20
