"""Rows of the user pathways against rows written out by hand."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax import config as config_lib
from onerec_jax.data import pipeline, shards, snapshots, splits
from onerec_jax.data import rows as rows_lib
from onerec_jax.evaluation import held_out
from tests.data import test_pipeline

LIFELONG = config_lib.LifelongConfig(every=4, max_items=2, iterations=3)
LENGTHS = (3, 4, 5)


def _config(lengths=LENGTHS, **changes):
  values = {"targets": "request", "row_targets": 3, "batch_size": 4}
  config = config_lib.PipelineConfig(**{**values, **changes})
  config.pathways = config_lib.PathwaysConfig(*lengths)
  return config


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """Prepared users of up to 30 events, with compressed histories."""
  rng = np.random.default_rng(4)
  records = [test_pipeline._user(user, rng, 30) for user in range(1, 15)]
  workdir = tmp_path_factory.mktemp("world")
  prepared = test_pipeline.write(workdir / "prepared", records)
  prepared.manifest["bucketing"] = {
    "event": {"rating": {"kind": "edges"}, "click": {"kind": "flag"}}
  }
  vectors = rng.normal(size=(prepared.num_items, 3)).astype(np.float32)
  prepared.snapshots = snapshots.compress(
    LIFELONG, LENGTHS[2], prepared, vectors, "ids", workdir
  )
  return prepared, records


def by_hand(record, event, lengths, store):
  """Positions as (item, rating, click, age, segment), without the pipeline."""
  short, positive, lifelong = lengths
  past = [
    (int(record.items[i]), int(record.features["rating"][i]),
     int(record.features["click"][i]), 0, 1)
    for i in range(event)
  ]  # fmt: skip
  nothing = (0, 0, 0, 0, 0)

  def at_the_end(rows, length):
    rows = rows[max(0, len(rows) - length) :] if length else []
    return [nothing] * (length - len(rows)) + rows

  row = [(0, 0, 0, record.user_features["age"], 1)]
  row += at_the_end(past, short)
  liked = [past[i] for i in range(event) if record.positive[i]]
  row += at_the_end(liked, positive)
  kept = []
  if lifelong and event >= LIFELONG.every:
    found = [s for s in store.user(record.user - 1) if s.until <= event][-1]
    for place, average in zip(found.event, found.averages["rating"]):
      item, _, click, *rest = past[place]
      kept.append((item, int(average), click, *rest))
  return row + at_the_end(kept, lifelong)


def found_in(batch, row):
  """The positions of a batch's row, likewise."""
  columns = [batch.items, *(batch.features[n] for n in ("rating", "click"))]
  columns += [batch.features["user_age"], batch.segment]
  return list(zip(*(np.asarray(c)[row].tolist() for c in columns)))


@settings(max_examples=30, deadline=None)
@given(
  st.tuples(st.integers(0, 6), st.integers(0, 6), st.sampled_from([0, 5, 8])),
  st.data(),
)
def test_a_row_by_hand(world, lengths, data):
  if not any(lengths):
    lengths = (1, 0, 0)
  prepared, records = world
  record = data.draw(st.sampled_from(records))
  event = data.draw(st.integers(0, len(record.items)))
  config = _config(lengths)
  history = rows_lib.before(prepared, record, event)
  names = sorted(rows_lib.feature_sizes(prepared))
  batch = rows_lib.request_batch([history], names, config, 2)
  expected = by_hand(record, event, lengths, prepared.snapshots)
  assert found_in(batch, 0) == expected
  assert batch.visible_until.tolist() == [[config.pathways.positions], [0]]
  assert not batch.items[1].any()
  assert not batch.segment[1].any()


def test_training_rows_are_the_requests_of_the_training_split(world):
  prepared, records = world
  config = _config()
  packed = pipeline.training_rows(prepared, config)
  found = []
  for number in range(len(packed)):
    row = packed[number]
    targets = row["targets"][row["targets"] > 0].tolist()
    # Items tell user and event: user · 1000 + event + 1.
    record = records[targets[0] // 1000 - 1]
    events = [target % 1000 - 1 for target in targets]
    request = record.request[events[0]]
    assert (record.request[events] == request).all()
    first = int(np.flatnonzero(record.request == request)[0])
    batch = rows_lib.Batch(**{
      name: (
        {key: x[None] for key, x in value.items()}
        if name in ("features", "labels")
        else value[None]
      )
      for name, value in row.items()
    })  # fmt: skip
    assert found_in(batch, 0) == by_hand(
      record, first, LENGTHS, prepared.snapshots
    )
    seen = np.where(row["targets"] > 0, config.pathways.positions, 0)
    np.testing.assert_array_equal(row["visible_until"], seen)
    found += targets
  assert sorted(found) == sorted(
    int(i) for r in records for i in r.items[r.split == splits.TRAIN]
  )


def test_no_position_is_of_the_request_or_after_it(world):
  """Whatever came later, and at the same time, is in none of the pathways."""
  prepared, _ = world
  dataset, steps = pipeline.training_dataset(prepared, _config(), 0)
  batches = [batch for batch, _ in zip(dataset, range(2 * steps))]
  full = 0
  for batch in batches:
    for items, targets in zip(batch.items, batch.targets):
      seen, wanted = items[items > 0], targets[targets > 0]
      assert (seen // 1000 == wanted[0] // 1000).all()
      assert (seen[:, None] < wanted[None]).all()
      full += len(seen) > 0
  assert full


def test_evaluation_asks_with_the_same_rows(world):
  prepared, records = world
  asked = 0
  for batch, queries in pipeline.evaluation_batches(
    prepared, splits.TEST, _config(), 4
  ):
    for row, (user, target) in enumerate(zip(queries.user, queries.target)):
      if user:
        event = int(target) % 1000 - 1
        assert found_in(batch, row) == by_hand(
          records[user - 1], event, LENGTHS, prepared.snapshots
        )
        asked += 1
  assert asked == sum(int((r.split == splits.TEST).sum()) for r in records)


def test_held_out_requests_ask_with_the_same_rows(world):
  prepared, records = world
  asked = held_out.requests(prepared, splits.TEST, 1)
  for batch, places in held_out.batches(prepared, asked, _config(), 1, 4):
    for row, place in enumerate(places):
      record = records[asked.user[place] - 1]
      assert found_in(batch, row) == by_hand(
        record, int(asked.first[place]), LENGTHS, prepared.snapshots
      )


@pytest.mark.parametrize("targets", ["next_item", "history"])
def test_targets_at_other_times_are_refused(world, targets):
  with pytest.raises(ValueError, match="pipeline.targets"):
    pipeline.training_rows(world[0], _config(targets=targets))


def test_histories_that_are_not_compressed_are_named(world):
  prepared = shards.PreparedData(world[0].directory, world[0].manifest)
  with pytest.raises(ValueError, match="launch.compress"):
    pipeline.training_rows(prepared, _config())
  assert len(pipeline.training_rows(prepared, _config((3, 4, 0))))
