import dataclasses

import numpy as np
import pytest

from onerec_jax.config import SimulationConfig
from onerec_jax.simulation.policies import (
  GreedyTruePolicy,
  LoggingPolicy,
  Slate,
  UniformPolicy,
)
from onerec_jax.simulation.state import DAY_MS, DAY_ZERO_MS, State
from onerec_jax.simulation.step import concatenate, run, step
from onerec_jax.simulation.world import World

CONFIG = SimulationConfig(num_users=60, num_items=80, num_days=3, seed=3)


@pytest.fixture(scope="module")
def played():
  world = World.create(CONFIG)
  policy = LoggingPolicy.create(world)
  return world, policy, *run(world, policy)


def assert_same(a, b, exact=True):
  for field in dataclasses.fields(a):
    one, two = getattr(a, field.name), getattr(b, field.name)
    if field.name == "flags":
      assert one.keys() == two.keys()
      for name in one:
        np.testing.assert_array_equal(one[name], two[name], err_msg=name)
    elif exact or not np.issubdtype(np.asarray(one).dtype, np.floating):
      np.testing.assert_array_equal(one, two, err_msg=field.name)
    else:
      np.testing.assert_allclose(
        one, two, rtol=1e-4, atol=1e-4, err_msg=field.name
      )


def test_equal_seeds_give_equal_logs_and_others_do_not(played):
  _, _, state, events = played
  world = World.create(dataclasses.replace(CONFIG))
  again_state, again = run(world, LoggingPolicy.create(world))
  assert_same(events, again)
  assert_same(state, again_state)
  world = World.create(dataclasses.replace(CONFIG, seed=4))
  _, other = run(world, LoggingPolicy.create(world))
  assert len(other) != len(events) or (other.item != events.item).any()


def test_stepping_from_saved_states_equals_running_through(played, tmp_path):
  world, policy, end, events = played
  state, parts = State.initial(world), []
  for day in range(CONFIG.num_days):
    before = state.copy()
    following, part = step(world, state, policy)
    assert_same(state, before)  # a step leaves its input alone
    following.save(tmp_path / f"{day}.npz")
    state = State.load(tmp_path / f"{day}.npz")
    parts.append(part)
  assert_same(concatenate(parts), events)
  assert_same(state, end)


def test_another_format_version_is_refused(played, tmp_path):
  path = tmp_path / "state.npz"
  played[2].save(path)
  with np.load(path) as saved:
    values = dict(saved) | {"format_version": 99}
  np.savez(path, **values)
  with pytest.raises(ValueError, match="format version 99"):
    State.load(path)


@pytest.mark.parametrize("chunk_size", [1, 7, 1000])
def test_chunks_do_not_change_results(played, chunk_size):
  world, policy, _, _ = played
  state = State.initial(world)
  following, events = step(world, state, policy)
  chunked_state, chunked = step(world, state, policy, chunk_size=chunk_size)
  assert_same(events, chunked, exact=False)
  assert_same(following, chunked_state, exact=False)


def test_the_log_is_in_order_and_consistent(played):
  world, _, _, events = played
  assert (np.diff(events.timestamp) >= 0).all()
  order = np.lexsort((events.position, events.request, events.user))
  by_user = events.take(order)
  same_user = by_user.user[1:] == by_user.user[:-1]
  # Requests and slots of a user follow each other, after what was watched.
  pause = np.diff(by_user.timestamp) - by_user.play_time[:-1]
  assert (pause[same_user] >= 500).all()
  _, sizes = np.unique(events.request, return_counts=True)
  assert (sizes == CONFIG.slots).all()
  day = (events.timestamp - DAY_ZERO_MS) // DAY_MS
  assert set(day.tolist()) == {0, 1, 2}
  assert (world.item_launch[events.item] <= day).all()
  assert (world.item_launch[events.item] > 0).any(), "no new item was shown"
  assert (events.play_time <= world.item_duration[events.item]).all()
  assert (events.log_probability <= 0).all()


def test_nothing_is_shown_again_within_the_window(played):
  world, _, _, events = played
  window = world.repeat_window
  assert window == int((world.item_launch == 0).sum()) // 2
  for user in range(CONFIG.num_users):
    items = events.item[events.user == user]
    for end in range(0, len(items), CONFIG.slots):
      new = items[end : end + CONFIG.slots]
      assert not np.isin(new, items[max(0, end - window) : end]).any()


def test_recent_impressions_are_the_end_of_the_log(played):
  _, _, state, events = played
  for user in range(CONFIG.num_users):
    mine = events.take(events.user == user)
    known = state.recent_items[user] >= 0
    count = min(len(mine), known.size)
    assert known.sum() == count
    np.testing.assert_array_equal(
      state.recent_items[user][known], mine.item[len(mine) - count :]
    )
    np.testing.assert_array_equal(
      state.recent_clicks[user][known], mine.click[len(mine) - count :]
    )


def test_drift_moves_interests_and_without_it_they_stay():
  def turned(drift):
    config = dataclasses.replace(CONFIG, drift=drift)
    world = World.create(config)
    start = State.initial(world)
    one, _ = step(world, start, UniformPolicy(world))
    two, _ = step(world, one, UniformPolicy(world))
    cosines = [(start.interests * s.interests).sum(axis=1) for s in (one, two)]
    return cosines, two

  (one, two), state = turned(0.0)
  np.testing.assert_allclose(one, 1, atol=1e-6)
  np.testing.assert_allclose(two, 1, atol=1e-6)
  (one, two), state = turned(0.3)
  assert 0.8 < one.mean() < 0.999
  assert two.mean() < one.mean()
  lengths = np.linalg.norm(state.interests, axis=1)
  np.testing.assert_allclose(lengths, 1, atol=1e-5)


def test_clicks_feed_back_into_popularity():
  world = World.create(CONFIG)
  state, events = step(world, State.initial(world), UniformPolicy(world))
  clicks = np.bincount(events.item[events.click], minlength=80)
  expected = 0.7 * world.item_popularity + 0.3 * clicks / clicks.mean()
  np.testing.assert_allclose(state.popularity, expected, rtol=1e-5)


def test_an_oracle_earns_more_than_the_logging_policy(played):
  world, _, _, logged = played
  _, best = run(world, GreedyTruePolicy(world))
  _, worst = run(world, UniformPolicy(world))
  assert best.click.mean() > logged.click.mean() + 0.04
  assert logged.click.mean() > worst.click.mean() + 0.04
  # Who visits when does not depend on the policy.
  assert len(best) == len(logged) == len(worst)


def test_two_policies_can_share_a_day():
  """The seam for A/B tests: a policy that asks another one per user."""
  world = World.create(CONFIG)
  greedy, uniform = GreedyTruePolicy(world), UniformPolicy(world)

  def split(state, users, noise):
    treated = users % 2 == 1
    items = np.zeros(noise.shape, np.int32)
    for arm, policy in ((treated, greedy), (~treated, uniform)):
      items[arm] = policy(state, users[arm], noise[arm]).items
    return Slate(items, np.full(noise.shape, np.nan, np.float32))

  state = State.initial(world)
  _, both = step(world, state, split)
  _, treated = step(world, state, greedy)
  odd = both.take(both.user % 2 == 1)
  np.testing.assert_array_equal(
    odd.item, treated.take(treated.user % 2 == 1).item
  )
  assert np.isnan(both.log_probability).all()


@pytest.mark.parametrize(
  ("items", "message"),
  [
    ([0, 1, 2, 3, 3], "stand there once"),
    ([0, 1, 2, 3, 80], "one of the 80 items"),
    ([0, 1, 2, 3], "users × slots"),
  ],
)
def test_a_wrong_slate_is_refused(items, message):
  world = World.create(dataclasses.replace(CONFIG, new_items=0.0))

  def policy(state, users, noise):
    slates = np.tile(np.array(items, np.int32), (len(users), 1))
    return Slate(slates, np.zeros(slates.shape, np.float32))

  with pytest.raises(ValueError, match=message):
    step(world, State.initial(world), policy)


@pytest.mark.parametrize(
  ("field", "value"),
  [("num_users", 0), ("num_items", 9), ("temperature", 0.0), ("drift", 1.0)],
)
def test_an_impossible_world_is_refused_by_name(field, value):
  config = dataclasses.replace(CONFIG, **{field: value})
  with pytest.raises(ValueError, match=rf"simulation\.{field}"):
    World.create(config)
