"""The marks of events and requests against plain Python."""

import collections

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.config import PrepareConfig, TokenizerConfig
from onerec_jax.data import marks, prepare, shards
from onerec_jax.tokenizer import tokenize
from onerec_jax.tokenizer.pairs import item_pairs

SESSION = (
  "count(*) FILTER (WHERE play_time_ms >= 3000) >= 2 AND "
  'sum(play_time_ms) >= 7000 AND bool_or("like") -- comment'
)
POSITIVE = 'play_time_ms > 1000 OR "like" -- comment'


def run(workdir, events, **fields):
  workdir.mkdir(parents=True, exist_ok=True)
  pq.write_table(pa.table(events), workdir / "events.parquet")
  config = PrepareConfig(
    dataset="tables", events=str(workdir / "events.parquet"), **fields
  )
  prepare.prepare(config, workdir)
  return shards.PreparedData.open(workdir)


def is_session(rows):
  times = [r["play_time_ms"] or 0 for r in rows]
  long = sum(time >= 3000 for time in times)
  return long >= 2 and sum(times) >= 7000 and any(r["like"] for r in rows)


ROWS = st.lists(
  st.fixed_dictionaries(
    {
      "user_id": st.sampled_from("ab"),
      "request_id": st.one_of(st.none(), st.sampled_from("pqr")),
      "like": st.one_of(st.none(), st.booleans()),
      "play_time_ms": st.one_of(st.none(), st.integers(0, 9000)),
      # Names the SQL uses itself; conditions may still be on such columns.
      "run": st.integers(0, 9),
      "request": st.integers(0, 9),
    }
  ),
  min_size=1,
  max_size=24,
)


@settings(max_examples=25, deadline=None)
@given(ROWS, st.integers(0, 9))
def test_marks_against_plain_python(tmp_path_factory, rows, least):
  """Events in time order; `where` leaves some out of sessions too."""
  for number, row in enumerate(rows):
    row |= {"item_id": f"i{number}", "timestamp_ms": number, "keep": number % 5}
  data = run(
    tmp_path_factory.mktemp("w"),
    pa.Table.from_pylist(
      rows,
      schema=pa.schema(
        [
          ("user_id", pa.string()),
          ("item_id", pa.string()),
          ("timestamp_ms", pa.int64()),
          ("request_id", pa.string()),
          ("like", pa.bool_()),
          ("play_time_ms", pa.int64()),
          ("run", pa.int64()),
          ("request", pa.int64()),
          ("keep", pa.int64()),
        ]
      ),
    ),
    where="keep < 4",
    positive=f'"request" >= {least} AND ({POSITIVE}\n)',
    session=f"max(run) >= {least} AND {SESSION}",
  )
  kept = collections.defaultdict(list)
  for row in rows:
    if row["keep"] < 4:
      kept[row["user_id"]].append(row)
  total = collections.Counter()
  for index, (_, events) in enumerate(kept.items()):
    record = data.user(index)
    runs = []
    for row in events:
      before = runs[-1][-1]["request_id"] if runs else None
      if before is not None and row["request_id"] == before:
        runs[-1].append(row)
      else:
        runs.append([row])
    assert record.request.tolist() == [
      number for number, run in enumerate(runs) for _ in run
    ]
    assert record.session.tolist() == [
      is_session(run) and max(r["run"] for r in run) >= least
      for run in runs
      for _ in run
    ]
    assert record.positive.tolist() == [
      r["request"] >= least
      and bool((r["play_time_ms"] or 0) > 1000 or r["like"])
      for r in events
    ]
    total["positive"] += int(record.positive.sum())
    total["session"] += int(record.session.sum())
  assert data.manifest["marked_events"] == {
    "positive": total["positive"],
    "session": total["session"],
  }


LOG = {
  "user_id": ["a"] * 4,
  "item_id": list("wxyz"),
  "timestamp_ms": [1, 2, 3, 4],
}


@pytest.mark.parametrize(
  ("columns", "expected"),
  [
    ({}, [True] * 4),
    ({"click": [1, 0, None, 1]}, [True, False, False, True]),
    # A click is weak: other feedback decides where there is some.
    (
      {"click": [1, 1, 1, 1], "like": [0, 1, None, 0]},
      [False, True, False, False],
    ),
    ({"rating": [5.0, 4.0, 3.5, None]}, [True, True, False, False]),
    (
      {"rating": [5.0, 1.0, None, 2.0], "follow": [0, 1, 0, 0]},
      [True, True, False, False],
    ),
    # A column of nulls is no feedback, nor is a dislike.
    ({"like": [None] * 4, "dislike": [1, 0, 0, 0]}, [True] * 4),
  ],
)
def test_default_of_positive(tmp_path, columns, expected):
  data = run(tmp_path, LOG | columns)
  assert data.user(0).positive.tolist() == expected
  assert data.user(0).session.all()
  assert not {"positive", "session"} & set(data.manifest["event_features"])
  present = {n for n, v in columns.items() if any(x is not None for x in v)}
  assert data.manifest["positive"] == marks.positive("", present)


@pytest.mark.parametrize(
  ("option", "condition"),
  [
    ("positive", "nonsense > 1"),
    ("positive", "count(*) > 1"),
    ("session", "timestamp_ms > 1"),
    ("session", "bool_or(nonsense)"),
    ("session", "count(*) >"),
  ],
)
def test_bad_condition_names_its_option(tmp_path, option, condition):
  with pytest.raises(ValueError, match=f"prepare.{option}") as error:
    run(tmp_path, LOG, **{option: condition})
  assert repr(condition) in str(error.value)
  assert not (tmp_path / "prepared").exists()


@pytest.mark.parametrize(
  ("given", "condition", "marked", "expected"),
  [
    ("", "rating >= 4", 0, "rating >= 4, marks none of the 1,200 events"),
    ("", "rating >= 4", 1200, ""),
    ("", '"like"', 0, '"like", marks none'),
    ("", "rating >= 4", 1, ""),
    ("", "rating >= 4", 1199, ""),
    # As it was asked for; and data without feedback.
    ("rating >= 1", "rating >= 1", 1200, ""),
    ("", marks.positive("", ()), 1200, ""),
  ],
)
def test_note_where_the_default_tells_nothing_apart(
  given, condition, marked, expected
):
  note = marks.note(given, condition, marked, 1200)
  assert bool(note) == bool(expected)
  assert expected in note
  assert not expected or "--config.prepare.positive='rating >= 1'" in note


def test_ratings_of_another_scale_and_aligned_vectors(tmp_path):
  """The default mark leaves no pairs, one that fits the scale does not."""
  rows = [(user, (user + place) % 6) for user in range(6) for place in range(5)]
  log = {
    "user_id": [f"u{user}" for user, _ in rows],
    "item_id": [f"i{item}" for _, item in rows],
    "timestamp_ms": list(range(len(rows))),
    "rating": [1.0] * len(rows),
  }
  items = {
    "item_id": [f"i{item}" for item in range(6)],
    "title": [f"red {word}" for word in ("a1", "b2", "c3", "a1", "b2", "c3")],
  }
  pq.write_table(pa.table(items), tmp_path / "items.parquet")
  config = TokenizerConfig(
    vectors="aligned", num_codes=8, num_levels=2, vector_size=4
  )
  given = {"items": str(tmp_path / "items.parquet")}
  data = run(tmp_path / "none", log, **given)
  assert data.manifest["marked_events"]["positive"] == 0
  with pytest.raises(
    ValueError, match="events give 0 pairs, 0 of them.*prepare.positive"
  ):
    tokenize.tokenize(config, data, tmp_path / "none")
  data = run(tmp_path / "all", log, positive="rating >= 1", **given)
  assert data.manifest["marked_events"]["positive"] == 30
  # Of five events a user the last two are held out.
  offsets, events = tokenize.training_events(data, True)
  assert offsets.tolist() == [0, 3, 6, 9, 12, 15, 18]
  pairs = item_pairs(offsets, events, np.eye(6, dtype=np.float32))
  assert len(pairs) >= 2
