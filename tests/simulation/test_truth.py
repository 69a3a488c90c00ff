import dataclasses

import numpy as np
import pytest

from onerec_jax.config import SimulationConfig
from onerec_jax.simulation import feedback, truth
from onerec_jax.simulation.policies import LoggingPolicy, UniformPolicy
from onerec_jax.simulation.state import State
from onerec_jax.simulation.step import run, step
from onerec_jax.simulation.world import World

TINY = SimulationConfig(
  num_users=1, num_items=12, num_days=1, new_items=0.0, slots=3
)


def _monte_carlo(world, policy, state, earlier, draws=80_000):
  """The item of the next slot's click, by playing the slot many times."""
  rng = np.random.default_rng(5)
  users = np.zeros(draws, np.int32)
  slate = policy(state, users, rng.random((draws, world.config.slots)))
  slot = len(earlier)
  fits = (slate.items[:, :slot] == np.array(earlier, np.int32)).all(axis=1)
  given = feedback.draw(
    world,
    state,
    users,
    slate.items,
    rng.random(
      (draws, world.config.slots, feedback.NUM_UNIFORMS), dtype=np.float32
    ),
    rng.standard_normal((draws, world.config.slots), dtype=np.float32),
  )
  items = slate.items[fits & given.click[:, slot], slot]
  return np.bincount(items, minlength=world.config.num_items), len(items)


@pytest.mark.parametrize("num_earlier", [0, 1])
def test_next_event_distribution_matches_monte_carlo(num_earlier):
  world = World.create(TINY)
  policy, state = LoggingPolicy.create(world), State.initial(world)
  user = np.zeros(1, np.int32)
  likely = policy.weights(state, user)[0].argsort()[::-1][:num_earlier]
  q = truth.next_event_probabilities(
    world, policy, state, user, likely[None].astype(np.int32)
  )[0]
  np.testing.assert_allclose(q.sum(), 1, atol=1e-5)
  assert (q[likely] == 0).all()
  counts, total = _monte_carlo(world, policy, state, likely.tolist())
  assert total > 500
  error = np.sqrt(q * (1 - q) / total)
  assert (np.abs(counts / total - q) < 4.5 * error + 1e-6).all()
  # The best k guesses: no other ranking catches more, in fact or on paper.
  best = np.argsort(-q)[:3]
  assert q[best].sum() >= np.sort(counts)[-3:].sum() / total - 0.06


@pytest.fixture(scope="module")
def small():
  world = World.create(
    SimulationConfig(
      num_users=150, num_items=100, num_days=4, seed=1, popularity_weight=1.5
    )
  )
  policy = LoggingPolicy.create(world)
  _, events = run(world, policy)
  return world, policy, events, truth.best_recall(world, policy, (1, 10))


def test_best_recall_covers_the_clicks_of_the_log(small):
  _, _, events, best = small
  clicks = events.take(events.click)
  log = np.lexsort((clicks.position, clicks.request))
  own = np.lexsort((best.position, best.request))
  for name in ("user", "request", "position"):
    np.testing.assert_array_equal(
      getattr(best, name)[own], getattr(clicks, name)[log]
    )
  last = best.last()
  assert len(last.user) == len(set(clicks.user.tolist()))
  end = {}
  for user, request, position in zip(best.user, best.request, best.position):
    end[user] = max(end.get(user, (-1, -1)), (request, position))
  for user, request, position in zip(last.user, last.request, last.position):
    assert end[user] == (request, position)


def test_closed_form_and_empirical_best_recall_agree(small):
  recall = small[3].recall()
  num = len(small[3].user)
  for k in (1, 10):
    p = recall["expected"][k]
    error = np.sqrt(p * (1 - p) / num)
    assert abs(p - recall["empirical"][k]) < 4 * error
    assert error < 0.01


def test_no_other_ranking_beats_the_best(small):
  """Rankings that know much: true taste, exposure, popularity, their mix."""
  world, policy, _, best = small
  rankings = {name: [] for name in ("taste", "exposure", "tempered")}

  def observe(state, users, requests, slate, given, shown):
    weights = policy.weights(state, users)
    for slot in range(slate.items.shape[1]):
      rows = np.flatnonzero(given.click[:, slot])
      every = np.tile(np.arange(100, dtype=np.int32), (len(rows), 1))
      taste = truth.true_preference(world, state, users[rows], every)
      shown = np.where(weights[rows] > 0, taste, 0)
      scores = {
        "taste": shown,
        "exposure": weights[rows],
        "tempered": weights[rows] ** 0.3 * taste,
      }
      for name, score in scores.items():
        np.put_along_axis(score, slate.items[rows, :slot], -1, axis=1)
        top = np.argsort(-score, axis=1)[:, :1]
        item = slate.items[rows, slot, None]
        rankings[name].extend((top == item).any(axis=1).tolist())

  run(world, policy, observe=observe)
  optimum = best.recall()["expected"][1]
  num = len(best.user)
  for name, hits in rankings.items():
    assert len(hits) == num
    assert np.mean(hits) < optimum + 3 * np.sqrt(0.25 / num), name
  assert np.mean(rankings["taste"]) < optimum - 0.02


def test_defaults_leave_room_between_popularity_and_the_optimum():
  world = World.create(SimulationConfig(num_users=100))
  policy = LoggingPolicy.create(world)
  _, events = run(world, policy)
  clicks = events.take(events.click)
  assert 50 < len(clicks) / 100 < 100
  optimum = truth.best_recall(world, policy, (10,)).last()
  recall = optimum.recall()["expected"][10]
  assert 0.2 < recall < 0.5
  # The ten most clicked items of all days, known in hindsight.
  top = np.argsort(-np.bincount(clicks.item))[:10]
  assert np.isin(clicks.item, top).mean() < recall / 3


def test_what_was_clicked_just_now_tells_what_comes_next(small):
  """The control: the same user's clicks in random order."""
  world, _, events, _ = small
  clicks = events.take(events.click)
  shuffled = np.random.default_rng(0).random(len(clicks))

  def same_topic_follows(order):
    by_user = clicks.take(np.lexsort((order, clicks.user)))
    topic = world.item_topic[by_user.item]
    same_user = by_user.user[1:] == by_user.user[:-1]
    return (topic[1:] == topic[:-1])[same_user].mean()

  in_order = same_topic_follows(clicks.timestamp)
  assert in_order > same_topic_follows(shuffled) + 0.05


def test_true_preference_is_what_users_click():
  """Calibrated: of impressions with satisfaction s a share of s is clicked."""
  world = World.create(SimulationConfig(num_users=800, num_items=100))
  _, events = step(world, State.initial(world), UniformPolicy(world))
  for low in (0.0, 0.2, 0.4, 0.6):
    band = events.take(
      (events.satisfaction >= low) & (events.satisfaction < low + 0.2)
    )
    error = 4 * 0.5 / np.sqrt(len(band))
    assert abs(band.click.mean() - band.satisfaction.mean()) < error
    assert error < 0.15


def test_true_preference_formula():
  """Against the formula written out for one user and one item."""
  config = dataclasses.replace(TINY, num_users=3)
  world = World.create(config)
  state, _ = step(world, State.initial(world), UniformPolicy(world))
  state.mood[:] = np.random.default_rng(0).normal(size=state.mood.shape)
  state.recent_items[:] = -1
  state.recent_items[1, 0] = 4
  for user, item in ((0, 4), (1, 4), (2, 7)):
    wish = config.affinity * state.interests[user]
    wish = wish + config.momentum * state.mood[user]
    away = state.location[user] - world.item_place[item]
    utility = -2.0 + 0.5 * world.item_quality[item]
    utility += wish @ world.item_latent[item]
    utility -= 0.5 * (away**2).sum() / config.geo_radius_km**2
    utility -= 3.0 * (user == 1)
    expected = 1 / (1 + np.exp(-utility))
    users, items = np.array([user], np.int32), np.array([[item]], np.int32)
    actual = truth.true_preference(world, state, users, items)
    np.testing.assert_allclose(actual[0, 0], expected, rtol=1e-4)


def test_a_repeated_topic_lowers_a_request():
  world = World.create(SimulationConfig(num_users=1, num_items=200))
  state, user = State.initial(world), np.zeros(1, np.int32)
  topic = np.bincount(world.item_topic).argmax()
  items = np.flatnonzero(world.item_topic == topic)[:3].astype(np.int32)
  alone = truth.true_preference(world, state, user, items[None])[0]
  logit = np.log(alone / (1 - alone)) - 0.5 * np.arange(3)
  value = truth.true_slate_value(world, state, user, items[None])
  np.testing.assert_allclose(
    value[0], (1 / (1 + np.exp(-logit))).sum(), rtol=1e-4
  )


def test_session_values_are_those_of_the_moment_of_the_request():
  """The log's own sessions get the satisfaction that the log was drawn from."""
  config = SimulationConfig(num_users=12, num_items=40, num_days=2, slots=3)
  world = World.create(config)
  policy = LoggingPolicy.create(world)
  _, events = run(world, policy)
  # By (user, time): a user's requests in order, three events each.
  order = np.lexsort((events.position, events.request, events.user))
  events = events.take(order)
  user = events.user[::3]
  shown = events.item.reshape(-1, 3)
  number = np.arange(len(user)) - np.searchsorted(user, user)
  mine = (shown + 7) % 40
  rows = np.random.default_rng(0).permutation(len(user))[:20]
  found = truth.session_values(
    world, policy, user[rows], number[rows].astype(np.int64), mine[rows]
  )
  clicks = events.satisfaction.reshape(-1, 3).sum(axis=1)
  np.testing.assert_allclose(found["logged_clicks"], clicks[rows], atol=1e-4)
  watch = feedback.expected_play_time(world, events.item, events.satisfaction)
  np.testing.assert_allclose(
    found["logged_watch_s"], watch.reshape(-1, 3).sum(axis=1)[rows] / 1000,
    rtol=1e-4,
  )  # fmt: skip
  # Given the log's own sessions, both agree; given others, they do not.
  again = truth.session_values(
    world, policy, user[rows], number[rows].astype(np.int64), shown[rows]
  )
  np.testing.assert_allclose(again["clicks"], found["logged_clicks"], atol=1e-5)
  assert not np.allclose(found["clicks"], found["logged_clicks"], atol=0.1)
  assert found["oracle_clicks"].mean() > 1.2 * found["logged_clicks"].mean()
  with pytest.raises(ValueError, match="user 3 makes no request 999"):
    truth.session_values(
      world, policy, np.asarray([3], np.int32), np.asarray([999]), mine[:1]
    )
  # A request that is asked for twice has two answers.
  twice = np.asarray([rows[0], rows[1], rows[0]])
  both = truth.session_values(
    world, policy, user[twice], number[twice].astype(np.int64),
    np.stack([mine[rows[0]], mine[rows[1]], shown[rows[0]]]),
  )  # fmt: skip
  np.testing.assert_array_equal(both["clicks"][:2], found["clicks"][:2])
  np.testing.assert_array_equal(both["clicks"][2], again["clicks"][0])
  np.testing.assert_array_equal(
    both["logged_clicks"], found["logged_clicks"][[0, 1, 0]]
  )


def _small_day():
  """(world, its policy, one day's events, who is in them); three slots."""
  config = SimulationConfig(num_users=6, num_items=30, num_days=1, slots=3)
  world = World.create(config)
  policy = LoggingPolicy.create(world)
  _, events = run(world, policy)
  user = np.unique(events.user)
  return world, policy, events, user


def test_sessions_shorter_than_a_request_are_compared_with_as_many_items():
  """The log's first two items, and the oracle's, not all three."""
  world, policy, events, user = _small_day()
  asked = user, np.zeros(len(user), np.int64)
  first = events.take(np.lexsort((events.position, events.request)))
  shown = np.stack([first.item[first.user == u][:2] for u in user])
  found = truth.session_values(world, policy, *asked, shown)
  for name in ("clicks", "watch_s", "long_views", "any_like", "duration_s"):
    np.testing.assert_array_equal(found[name], found[f"logged_{name}"])
  assert (found["oracle_clicks"] >= found["clicks"]).all()
  assert (found["oracle_clicks"] <= 2).all()
  whole = truth.session_values(
    world, policy, *asked, np.zeros((len(user), 3), np.int32)
  )
  assert (whole["oracle_clicks"] > found["oracle_clicks"]).all()
  long = np.zeros((len(user), 4), np.int32)
  with pytest.raises(ValueError, match="of 4 items stand beside .* of 3: set"):
    truth.session_values(world, policy, *asked, long)


def test_candidate_sessions_are_valued_side_by_side():
  world, policy, events, user = _small_day()
  number = np.zeros(len(user), np.int64)
  rng = np.random.default_rng(0)
  many = rng.permuted(np.tile(np.arange(30, dtype=np.int32), (len(user), 4, 1)),
                      axis=2)[..., :3]  # fmt: skip
  found = truth.session_values(world, policy, user, number, many)
  for w in range(4):
    alone = truth.session_values(world, policy, user, number, many[:, w])
    for name, value in alone.items():
      of_log = name.startswith(("logged_", "oracle_"))
      whole = found[name] if of_log else found[name][:, w]
      np.testing.assert_allclose(whole, value, rtol=1e-5)


def test_expected_feedback_matches_monte_carlo():
  """Every figure of a session, against playing it many times."""
  world = World.create(
    dataclasses.replace(TINY, num_items=30, affinity=6.0, seed=2)
  )
  state = State.initial(world)
  # A short video and long ones: a long view is its end, or 18 s of it.
  liked = affinity_order(world, state).astype(np.int32)
  short = world.item_duration[liked] < 18_000
  best = np.append(liked[short][:1], liked[~short][:2])
  worth = truth.session_worth(world, state, np.zeros(1, np.int32), best[None])
  draws, rng = 60_000, np.random.default_rng(3)
  given = feedback.draw(
    world, state, np.zeros(draws, np.int32), np.tile(best, (draws, 1)),
    rng.random((draws, 3, feedback.NUM_UNIFORMS), dtype=np.float32),
    rng.standard_normal((draws, 3), dtype=np.float32),
  )  # fmt: skip
  played = {
    "clicks": given.click.sum(axis=1),
    "watch_s": given.play_time.sum(axis=1) / 1000,
    "long_views": given.flags["long_view"].sum(axis=1),
    "any_like": given.flags["like"].any(axis=1),
    "any_follow": given.flags["follow"].any(axis=1),
  } | {
    f"{name}s": given.flags[name].sum(axis=1)
    for name in ("like", "follow", "comment", "forward")
  }
  assert {*played, "duration_s"} == {*worth}
  for name, values in played.items():
    error = values.std() / np.sqrt(draws)
    # Play time is logged in whole ms, rounded down: 1.5 ms a session.
    slack = 2e-3 if name == "watch_s" else 0
    assert abs(values.mean() - worth[name][0]) < 4.5 * error + slack, name
  assert worth["duration_s"][0] == pytest.approx(
    sum(world.item_duration[i] for i in best) / 3000, rel=1e-5
  )


def affinity_order(world, state):
  """Items of user 0, most liked first."""
  every = np.arange(world.config.num_items, dtype=np.int32)
  taste = truth.true_preference(
    world, state, np.zeros(1, np.int32), every[None]
  )
  return np.argsort(-taste[0])
