"""What a serving recommender knows, against the log prepared again."""

import dataclasses

import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import online
from onerec_jax.data import prepare, rows, shards
from onerec_jax.inference import serving
from onerec_jax.simulation.policies import LoggingPolicy, UniformPolicy
from onerec_jax.simulation.state import DAY_MS, DAY_ZERO_MS
from onerec_jax.simulation.step import run, step
from onerec_jax.simulation.world import World

SIMULATION = config_lib.SimulationConfig(
  num_users=25, num_items=40, num_days=3, slots=3, requests_per_day=1.0
)


@pytest.fixture(scope="module")
def world():
  return World.create(SIMULATION)


def _prepared(folder, where=""):
  config = config_lib.PrepareConfig(
    dataset="simulator", where=where, split="time", simulation=SIMULATION,
    validation_from_ms=DAY_ZERO_MS + 2 * DAY_MS,
    test_from_ms=DAY_ZERO_MS + 3 * DAY_MS,
  )  # fmt: skip
  return config, shards.PreparedData.open(prepare.prepare(config, folder))


def _same(found, record):
  """A history, and a stored user of whom everything is known."""
  np.testing.assert_array_equal(found.items, record.items)
  np.testing.assert_array_equal(found.positive, record.positive)
  assert found.user_features == record.user_features
  assert set(found.features) == set(record.features)
  for name, values in record.features.items():
    np.testing.assert_array_equal(found.features[name], values, name)


@pytest.mark.parametrize("where", ["", "click = 1"])
def test_histories_are_what_preparation_would_store(world, tmp_path, where):
  """Two days more are played, and the whole log is prepared again."""
  config, prepared = _prepared(tmp_path / "before", where)
  known = serving.Histories(prepared, config, world)
  state, events = run(world, LoggingPolicy.create(world), 3)
  log = online.Log(world, events, config, prepared.manifest, tmp_path / "after")
  policy = UniformPolicy(world)
  for _ in range(2):
    state, today = step(world, state, policy, known.observe)
    again = log.append(today)
  stored = {
    int(raw[1:]): again.user(place)
    for place, raw in enumerate(again.users["raw_id"].to_pylist())
  }
  everybody = np.arange(25, dtype=np.int32)
  grown = 0
  for user, found in enumerate(known.of(everybody)):
    if user in stored:
      _same(found, stored[user])
      grown += len(found.items)
    else:
      assert not len(found.items)
  # Most came of the two days; and of one who was not stored before.
  assert grown == int(again.lengths.sum()) > 1.2 * int(prepared.lengths.sum())
  assert len(prepared.users) < len(stored) <= 25


def test_a_test_that_begins_earlier_knows_less(world, tmp_path):
  config, prepared = _prepared(tmp_path)
  until = DAY_ZERO_MS + DAY_MS
  known = serving.Histories(prepared, config, world, until)
  for place, raw in enumerate(prepared.users["raw_id"].to_pylist()):
    record = prepared.user(place)
    (found,) = known.of(np.asarray([int(raw[1:])], np.int32))
    early = [i for i, t in enumerate(record.timestamps) if t < until]
    np.testing.assert_array_equal(found.items, record.items[early])
    _same(found, record._replace(**vars_of(rows.before(
      prepared, record, len(early)
    ))))  # fmt: skip


def vars_of(history):
  return {
    name: getattr(history, name) for name in ("items", "positive", "features")
  }


def test_a_policy_may_show_what_is_launched_and_not_of_late(world, tmp_path):
  config, prepared = _prepared(tmp_path)
  known = serving.Histories(prepared, config, world)
  rng = np.random.default_rng(0)
  masks = []

  def answer(histories, allowed):
    masks.append(allowed)
    picked = [
      rng.choice(np.flatnonzero(mask), 3, replace=False) for mask in allowed
    ]
    return np.asarray(picked), np.full((len(allowed), 3), np.nan)

  policy = serving.RecommenderPolicy(world, known, answer)
  asked = []

  def observe(state, users, requests, slate, given, shown):
    asked.append((state.day, state.recent_items[users].copy(), slate.items))
    known.observe(state, users, requests, slate, given, shown)

  state, _ = run(world, LoggingPolicy.create(world), 1)
  step(world, state, policy, observe)
  assert len(masks) == len(asked) > 1
  late = 0
  for allowed, (day, recent, items) in zip(masks, asked):
    for row in range(len(allowed)):
      assert not allowed[row, 0]
      for item in range(40):
        launched = world.item_launch[item] <= day
        may = launched and item not in recent[row]
        assert allowed[row, item + 1] == may
        late += not launched
      assert allowed[row, items[row] + 1].all()
  assert late
  few = serving.RecommenderPolicy(
    world, known, lambda histories, allowed: [
      np.asarray([[1, 2, 0]] * len(allowed)), np.zeros((len(allowed), 3))
    ],
  )  # fmt: skip
  with pytest.raises(ValueError, match="fewer than 3 slots .* day 1: raise"):
    step(world, state, few)


def test_another_world_is_refused(world, tmp_path):
  config, prepared = _prepared(tmp_path)
  # As many items of as many users: their names do not tell.
  other = World.create(dataclasses.replace(SIMULATION, seed=7))
  with pytest.raises(ValueError, match="made by another world .* seed=7"):
    serving.Histories(prepared, config, other)
  larger = World.create(dataclasses.replace(SIMULATION, num_items=41))
  with pytest.raises(ValueError, match="40 items .* are not the 41"):
    serving.check(prepared, larger)
