"""V2's ways to organise training data, against brute force over histories."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax.data import batch as batch_lib
from onerec_jax.data import pipeline, shards, splits
from tests.data import test_pipeline

HISTORY = 4


def _user(user, rng):
  """Events at random times; item user · 1000 + index + 1."""
  n = int(rng.integers(1, 15))
  split = np.zeros(n, np.int8)
  split[n - n // 4 :] = splits.TEST
  items = user * 1000 + np.arange(1, n + 1, dtype=np.int32)
  # Requests of up to three events, each at one time.
  request = (np.arange(n) // 3).astype(np.int32)
  times = np.sort(rng.choice(10_000, request[-1] + 1, replace=False))
  return shards.UserRecord(
    user=user, items=items, timestamps=times[request].astype(np.int64),
    split=split, request=request, positive=items > 0, session=items > 0,
    features={"rating": items % 7, "click": items % 3},
    user_features={"age": user + 1},
    signals={"play_time_ms": (items / 8).astype(np.float32)},
  )  # fmt: skip


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """(prepared data, its records)."""
  rng = np.random.default_rng(0)
  users = [_user(user, rng) for user in range(1, 16)]
  folder = tmp_path_factory.mktemp("prepared")
  return test_pipeline.write(folder, users), users


def _config(**changes):
  values = {
    "batch_size": 2,
    "row_positions": 12,
    "row_targets": 10,
    "max_history": HISTORY,
  }
  return config_lib.PipelineConfig(**{**values, **changes})


def _epoch(world, config, **kwargs):
  """Batches of one epoch, and what its rows are."""
  packed = pipeline.training_rows(world[0], config)
  dataset, _ = pipeline.training_dataset(world[0], config, 0, **kwargs)
  count = len(packed) // config.batch_size
  return packed, list(itertools.islice(iter(dataset), count))


def _targets(batches):
  """(target, what it sees) in the order of rows and slots."""
  found = []
  for batch in batches:
    seen = np.asarray(batch_lib.visible(jax.tree.map(jnp.asarray, batch)))
    for row, slot in np.argwhere(batch.targets > 0):
      items = batch.items[row][seen[row, slot]]
      found.append(
        (int(batch.targets[row, slot]), tuple(items[items > 0].tolist()))
      )
  return found


def _expected(users, repeated):
  """Of every request, its items and, if so, what they see, as targets."""
  for record in users:
    for number in np.unique(record.request[record.split == splits.TRAIN]):
      own = (record.request == number) & (record.split == splits.TRAIN)
      first, stop = np.flatnonzero(own)[[0, -1]] + [0, 1]
      start = max(0, first - HISTORY)
      for event in range(start if repeated else first, stop):
        seen = record.items[start : min(event, first)]
        yield int(record.items[event]), tuple(seen.tolist())


@pytest.mark.parametrize("order", ["shuffled", "time"])
@pytest.mark.parametrize("targets", ["history", "request"])
def test_samples_are_those_of_brute_force(world, targets, order):
  config = _config(targets=targets, order=order, batch_size=1)
  _, batches = _epoch(world, config)
  found = collections.Counter(_targets(batches))
  expected = collections.Counter(_expected(world[1], targets == "history"))
  assert found == expected
  assert max(found.values()) == 1 or targets == "history"


@pytest.mark.parametrize("targets", ["next_item", "request", "history"])
def test_a_stream_goes_through_time_once(world, targets):
  """Over all users; sample after sample ends no earlier than the last."""
  config = _config(targets=targets, order="time", batch_size=1)
  packed, batches = _epoch(world, config)
  when = {
    int(item): int(time)
    for record in world[1]
    for item, time in zip(record.items, record.timestamps)
  }
  ends = []
  for batch in batches:
    items = batch.targets[0][batch.targets[0] > 0]
    # A sample's last target is followed by another's user or another request.
    ends += [when[int(items[-1])]]
  assert ends == sorted(ends)
  assert sum(len(row) for row in packed.rows) == len(packed.segments)
  again = _epoch(world, config)[1]
  for one, other in zip(batches, again):
    np.testing.assert_array_equal(one.targets, other.targets)


def test_new_impressions_are_trained_before_any_later_one(world):
  config = _config(targets="request", order="time", batch_size=1)
  when = {
    int(item): int(time)
    for record in world[1]
    for item, time in zip(record.items, record.timestamps)
  }
  times = [when[target] for target, _ in _targets(_epoch(world, config)[1])]
  assert times == sorted(times)
  shuffled = _config(targets="request", batch_size=1)
  times = [when[target] for target, _ in _targets(_epoch(world, shuffled)[1])]
  assert times != sorted(times)


def test_processes_share_the_stream(world):
  config = _config(targets="request", order="time", batch_size=4)
  _, whole = _epoch(world, config)
  for held in ([0, 2], [1, 3]):
    _, part = _epoch(world, config, held=held)
    for batch, own in zip(whole, part, strict=True):
      np.testing.assert_array_equal(own.targets, batch.targets[held])


def test_what_does_not_fit_is_refused(world):
  with pytest.raises(ValueError, match="order='random': want shuffled or time"):
    pipeline.training_rows(world[0], _config(order="random"))
  ordinal = shards.PreparedData.open(world[0].directory)
  ordinal.manifest["ordinal_time"] = True
  with pytest.raises(ValueError, match="this source has none"):
    pipeline.training_rows(ordinal, _config(order="time"))
