"""Rows decoded through `visible` against brute-force histories."""

import collections
import itertools

import grain
import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec_jax import config as config_lib
from onerec_jax import files
from onerec_jax.data import batch as batch_lib
from onerec_jax.data import pipeline, shards, splits


def _user(user, rng, longest):
  """A user whose every event has an item of its own: user · 1000 + index."""
  n = int(rng.integers(0, longest + 1))
  test, validation = int(rng.integers(0, 3)), int(rng.integers(0, 3))
  split = np.zeros(n, np.int8)
  split[max(0, n - test - validation) :] = splits.VALIDATION
  split[max(0, n - test) :] = splits.TEST
  items = user * 1000 + np.arange(1, n + 1, dtype=np.int32)
  return shards.UserRecord(
    user=user,
    items=items,
    timestamps=np.arange(n, dtype=np.int64),
    split=split,
    # Requests of one to four events; some straddle two splits.
    request=np.cumsum(rng.random(n) < 0.4).astype(np.int32),
    positive=items % 3 == 0,
    session=np.ones(n, bool),
    features={"rating": items % 7, "click": items % 3},
    user_features={"age": user + 1},
    signals={"play_time_ms": (items / 8).astype(np.float32)},
  )


def write(directory, users):
  """Prepared data of these records; returns it opened."""
  directory.mkdir(exist_ok=True)
  written = shards.write(directory, users, len(users), 3)
  training = [int((u.split == splits.TRAIN).sum()) for u in users]
  tables = {
    shards.ITEMS: {"item_id": pa.array([1], pa.int32())},
    shards.USERS: {
      "num_events": [len(u.items) for u in users],
      "training_events": training,
    },
  }
  for name, columns in tables.items():
    pq.write_table(pa.table(columns), directory / name)
  manifest = {
    "format_version": shards.FORMAT_VERSION,
    "fingerprint": "f",
    "num_users": len(users),
    "num_items": 1000 * (len(users) + 2),
    "event_features": {"rating": 7, "click": 3},
    "user_features": {"age": len(users) + 3},
    "item_features": {},
    "signals": ["play_time_ms"],
    "bucketing": {
      "event": {"rating": {"kind": "edges"}, "click": {"kind": "flag"}}
    },
    "shards": written,
    "tables": [
      {"name": name, "sha256": files.sha256(directory / name)}
      for name in tables
    ],
  }
  files.write_json(directory / shards.MANIFEST, manifest)
  return shards.PreparedData.open(directory)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """(prepared data, its records); the third user has no events at all."""
  rng = np.random.default_rng(0)
  users = [_user(u, rng, 0 if u == 3 else 25) for u in range(1, 24)]
  return write(tmp_path_factory.mktemp("prepared"), users), users


def _config(**changes):
  values = {
    "batch_size": 4,
    "row_positions": 12,
    "row_targets": 9,
    "max_history": 5,
  }
  return config_lib.PipelineConfig(**{**values, **changes})


def _batches(world, config, count, seed=0, held=None):
  dataset, _ = pipeline.training_dataset(world[0], config, seed, held)
  return list(itertools.islice(iter(dataset), count))


def _rows(batch):
  """A row as bytes, for each row."""
  return [
    b"".join(
      np.asarray(column[i]).tobytes()
      for column in (batch.items, batch.segment, batch.targets)
    )
    for i in range(len(batch.items))
  ]


def _epoch(world, config, **kwargs):
  """Batches that hold every row at least once, by the count of an epoch."""
  _, steps = pipeline.training_dataset(world[0], config, 0)
  return _batches(world, config, steps + 1, **kwargs)


def _see(batch):
  """(row, target item) → items seen, in order, and user tokens seen."""
  mask = np.asarray(batch_lib.visible(jax.tree.map(jnp.asarray, batch)))
  seen = []
  for row, target in np.argwhere(batch.targets > 0):
    places = np.flatnonzero(mask[row, target])
    items = batch.items[row, places]
    tokens = places[items == 0]
    ages = batch.features["user_age"][row, tokens].tolist()
    seen.append((row, int(batch.targets[row, target]), items[items > 0], ages))
  assert not mask[np.asarray(batch.targets) == 0].any()
  return seen


def _expected(record, event, config):
  """What a target may see, by the definition."""
  until = event
  if config.targets == "request":
    while until and record.request[until - 1] == record.request[event]:
      until -= 1
  return record.items[max(0, until - config.max_history) : until]


@pytest.mark.parametrize(
  "changes",
  [
    {},
    {"max_history": 11},
    {"max_history": 0},
    {"row_targets": 1},
    {"row_positions": 40, "row_targets": 40, "max_history": 39},
    {"targets": "request"},
    {"targets": "request", "row_targets": 2},
    {"targets": "request", "max_history": 11},
  ],
  ids=str,
)
def test_each_training_target_sees_its_own_past(world, changes):
  config = _config(**changes)
  batches = _epoch(world, config)
  targets = collections.Counter()
  distinct = set()
  for batch in batches:
    for row, target, items, ages in _see(batch):
      user, event = target // 1000, target % 1000 - 1
      record = world[1][user - 1]
      assert record.split[event] == splits.TRAIN
      expected = _expected(record, event, config)
      np.testing.assert_array_equal(items, expected, err_msg=str(target))
      assert ages == [user + 1], "its own user token, once"
      key = _rows(batch)[row]
      if (key, target) not in distinct:
        distinct.add((key, target))
        targets[target] += 1
  every = [
    int(item) for u in world[1] for item in u.items[u.split == splits.TRAIN]
  ]
  assert targets == dict.fromkeys(every, 1)


@pytest.mark.parametrize("targets", ["next_item", "request"])
def test_training_rows_hold_no_held_out_event(world, targets):
  held_out = np.concatenate(
    [u.items[u.split != splits.TRAIN] for u in world[1]]
  )
  assert len(held_out) > 20
  for batch in _epoch(world, _config(targets=targets)):
    assert not np.isin(batch.items, held_out).any()
    assert not np.isin(batch.targets, held_out).any()


@pytest.mark.parametrize("targets", ["next_item", "request"])
def test_rows_are_laid_out_as_the_batch_promises(world, targets):
  config = _config(targets=targets)
  for batch in _epoch(world, config):
    shapes = {
      name: getattr(batch, name).shape
      for name in ("items", "segment", "targets", "visible_until")
    }
    assert shapes == {
      "items": (4, 12),
      "segment": (4, 12),
      "targets": (4, 9),
      "visible_until": (4, 9),
    }
    assert sorted(batch.features) == ["click", "rating", "user_age"]
    event = batch.items > 0
    token = (batch.items == 0) & (batch.segment > 0)
    np.testing.assert_array_equal(
      batch.features["rating"], np.where(event, batch.items % 7, 0)
    )
    np.testing.assert_array_equal(
      batch.features["click"], np.where(event, batch.items % 3, 0)
    )
    assert (batch.features["user_age"][~token] == 0).all()
    for row in range(4):
      used = batch.segment[row][batch.segment[row] > 0]
      np.testing.assert_array_equal(
        used, batch.segment[row][: len(used)], err_msg="no gaps"
      )
      starts = np.flatnonzero(np.diff(used, prepend=0))
      np.testing.assert_array_equal(starts, np.flatnonzero(token[row]))
      np.testing.assert_array_equal(used[starts], 1 + np.arange(len(starts)))
      for number in used[starts]:
        users = batch.items[row][(batch.segment[row] == number) & event[row]]
        assert len(set(users // 1000)) <= 1
    # Position visible_until - 1 lies in the target's segment.
    real = batch.targets > 0
    assert (batch.visible_until[real] >= 1).all()
    assert (batch.visible_until[~real] == 0).all()


def test_order_is_a_function_of_the_seed_and_new_each_epoch(world):
  config = _config(batch_size=1)
  dataset, steps = pipeline.training_dataset(world[0], config, 0)
  rows = [_rows(b)[0] for b in itertools.islice(iter(dataset), 3 * steps)]
  again = [_rows(b)[0] for b in _batches(world, config, 3 * steps)]
  assert rows == again
  other = [_rows(b)[0] for b in _batches(world, config, 3 * steps, seed=1)]
  epochs = [rows[i * steps : (i + 1) * steps] for i in range(3)]
  epochs += [other[i * steps : (i + 1) * steps] for i in range(3)]
  for epoch in epochs:
    assert len(set(epoch)) == steps  # every row once
    assert sorted(epoch) == sorted(epochs[0])
  for one, two in itertools.combinations(epochs, 2):
    assert one != two


@pytest.mark.parametrize(
  "held",
  [
    [[0, 1, 2, 3]],
    [[0, 1], [2, 3]],
    [[0], [1], [2], [3]],
    # As where the devices of a host are no neighbours on the mesh, and where
    # one axis of it keeps two processes at the same rows.
    [[0, 3], [1, 2]],
    [[0, 1], [0, 1], [2, 3], [2, 3]],
  ],
  ids=str,
)
def test_processes_share_the_global_batch(world, held):
  """Step by step, the pieces make up the batch of one process."""
  config = _config()
  whole = _batches(world, config, 12)
  for rows in held:
    part = _batches(world, config, 12, held=np.asarray(rows))
    for step, batch in enumerate(whole):
      assert _rows(part[step]) == [_rows(batch)[row] for row in rows]


def test_the_batch_of_a_step_is_a_piece_of_one_sequence(world):
  """Of the rows in grain's own order, whatever the size of a batch."""
  prepared, _ = world
  config = _config()
  singles = _batches(world, _config(batch_size=1), 80)
  sequence = [_rows(batch)[0] for batch in singles]
  for step, batch in enumerate(_batches(world, config, 20)):
    assert _rows(batch) == sequence[4 * step : 4 * step + 4]
  assert len(set(sequence)) < 60, "less than two epochs: weak data"


@pytest.mark.parametrize("before", [1, 2, 4])
@pytest.mark.parametrize("after", [1, 2, 4])
def test_another_number_of_processes_goes_on(world, before, after):
  """The place of one process's iterator is that of all, of any number."""
  config = _config()
  whole = _batches(world, config, 12)
  places = []
  for rows in np.split(np.arange(4), before):
    dataset, _ = pipeline.training_dataset(world[0], config, 0, rows)
    iterator = iter(dataset)
    for _ in range(7):
      next(iterator)
    places.append(iterator.get_state())
  assert places == [places[0]] * before
  for rows in np.split(np.arange(4), after):
    dataset, _ = pipeline.training_dataset(world[0], config, 0, rows)
    iterator = iter(dataset)
    iterator.set_state(places[0])
    for batch in whole[7:]:
      assert _rows(next(iterator)) == [_rows(batch)[row] for row in rows]


def test_resumes_from_any_step(world):
  dataset, steps = pipeline.training_dataset(world[0], _config(), 0)
  grain.experimental.assert_equal_output_after_checkpoint(
    grain.experimental.LimitIterDataset(dataset.map(vars), steps + 2)
  )


def test_pipeline_errors(world, tmp_path):
  prepared, _ = world
  with pytest.raises(ValueError, match="targets='sessions'.*next_item"):
    pipeline.training_dataset(prepared, _config(targets="sessions"), 0)
  with pytest.raises(ValueError, match="max_history=12"):
    pipeline.training_dataset(prepared, _config(max_history=12), 0)
  record = world[1][0]
  nothing = record._replace(split=np.full_like(record.split, splits.TEST))
  for targets in ("next_item", "request"):
    with pytest.raises(ValueError, match="holds no events"):
      pipeline.training_dataset(
        write(tmp_path / targets, [nothing]), _config(targets=targets), 0
      )
