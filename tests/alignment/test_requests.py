"""Requests to answer: whose they are, and that their order can be resumed."""

import collections
import json

import jax
import numpy as np
import pytest

from onerec_jax import workflow
from onerec_jax.alignment import requests
from onerec_jax.data import pipeline
from tests import worlds


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  folder = tmp_path_factory.mktemp("requests")
  config = worlds.config(worlds.write_csv(folder / "raw", users=7))
  return config, workflow.assembled(config, folder).prepared


def test_an_epoch_asks_every_training_request_once(world):
  """Against histories cut from the users' own records."""
  config, prepared = world
  want = collections.Counter()
  for user in range(len(prepared)):
    record = prepared.user(user)
    # No request ids: every event is a request of its own; the last two events
    # are held out.
    for event in range(len(record.items) - 2):
      want[tuple(record.items[max(0, event - 8) : event].tolist())] += 1
  total = 7 * 10
  assert len(requests.training_requests(prepared)) == total
  stream = iter(requests.dataset(prepared, config.pipeline, 10, seed=3))
  got = collections.Counter()
  for _ in range(total // 10):
    batch = next(stream)
    assert batch.targets.shape == (10, 1)
    for row in range(10):
      seen = batch.items[row, : batch.visible_until[row, 0]]
      got[tuple(seen[1:].tolist())] += 1
  # Users begin with nothing seen, so some are asked for more than once.
  assert got == want
  assert got[()] == 7


def test_earlier_requests_are_left_out(world):
  """Against the users' own times; a time that nobody reached is an error."""
  _, prepared = world
  times = [prepared.user(user).timestamps[:-2] for user in range(7)]
  since = int(np.median(np.concatenate(times)))
  found = requests.training_requests(prepared, since)
  assert 0 < len(found) < 70
  want = {(u, e) for u in range(7) for e in np.flatnonzero(times[u] >= since)}
  assert set(map(tuple, found.tolist())) == want
  with pytest.raises(ValueError, match="held out or earlier than"):
    requests.training_requests(prepared, 1 + max(int(t.max()) for t in times))


def test_held_rows_are_rows_of_the_whole_batch(world):
  config, prepared = world
  asked = prepared, config.pipeline, 8, 0
  whole = next(iter(requests.dataset(*asked)))
  part = next(iter(requests.dataset(*asked, held=[1, 6])))
  np.testing.assert_array_equal(part.items, whole.items[[1, 6]])


@pytest.mark.parametrize("asks", [True, False])
def test_both_streams_resume_from_one_place(world, asks):
  config, prepared = world

  def both():
    logged, _ = pipeline.training_dataset(prepared, config.pipeline, 0)
    asked = requests.dataset(prepared, config.pipeline, 4, 0)
    return requests.beside(logged, asked if asks else None)

  stream, other = iter(both()), iter(both())
  assert (next(stream).requests is not None) == asks
  first = next(stream)
  place = json.loads(json.dumps(stream.get_state()))  # as checkpoints keep it
  want = next(stream)
  other.set_state(place)
  jax.tree.map(np.testing.assert_array_equal, next(other), want)
  assert not np.array_equal(first.items, want.items)
