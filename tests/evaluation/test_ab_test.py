"""An online test's figures, by loops, and what intervals are worth."""

import collections

import numpy as np
import pytest
import scipy.sparse

from onerec_jax import config as config_lib
from onerec_jax.evaluation import ab_plots, ab_test
from onerec_jax.simulation.policies import (
  GreedyTruePolicy,
  LoggingPolicy,
  UniformPolicy,
)
from onerec_jax.simulation.step import run, step
from onerec_jax.simulation.world import World

FROM, DAYS = 3, 2
USERS, ITEMS = 150, 60


@pytest.fixture(scope="module")
def played():
  """(world, log of three days, name → two days more of a policy)."""
  world = World.create(
    config_lib.SimulationConfig(
      num_users=USERS, num_items=ITEMS, num_days=5, slots=3
    )
  )
  logging = LoggingPolicy.create(world)
  start, logged = run(world, logging, FROM)
  arms = {}
  for name, policy in {
    "logging": logging,
    "oracle": GreedyTruePolicy(world),
    "uniform": UniformPolicy(world),
  }.items():
    state, arms[name] = start, []
    for _ in range(DAYS):
      state, events = step(world, state, policy)
      arms[name].append(events)
  return world, logged, arms


def _cold(world, logged):
  shown = collections.Counter(logged.item.tolist())
  return [
    {
      item
      for item in range(ITEMS)
      if world.item_launch[item] <= day
      and (day - world.item_launch[item] <= 2 or shown[item] < 20)
    }
    for day in range(FROM, FROM + DAYS)
  ]


def test_figures_by_loops(played):
  world, logged, arms = played
  cold, total, requests = _cold(world, logged), collections.Counter(), {}
  for day, events in enumerate(arms["uniform"]):
    for i in range(len(events)):
      user, item = int(events.user[i]), int(events.item[i])
      cell = lambda name, user=user, day=day: (name, day, user)
      seconds = float(events.play_time[i]) / 1000
      total[cell("watch_s")] += seconds
      total[cell("stay_s")] += seconds + 0.5
      total[cell("clicks")] += int(events.click[i])
      view = int(events.flags["long_view"][i])
      total[cell("views")] += view
      for flag in ("like", "follow", "comment", "forward"):
        total[cell(f"{flag}s")] += int(events.flags[flag][i])
      total[cell("cold_shown")] += item in cold[day]
      total[cell("cold_views")] += view * (item in cold[day])
      key = (day, int(events.request[i]))
      requests.setdefault(key, []).append((item, float(events.satisfaction[i])))
  masks = ab_test.cold_items(world, logged, FROM, DAYS)
  assert [set(np.flatnonzero(mask)) for mask in masks] == cold
  assert 0 < len(cold[0]) < ITEMS / 2
  found = ab_test.user_days(world, arms["uniform"], masks)
  assert len(found.user) == USERS * DAYS
  for name, values in found.values.items():
    expected = [
      total[name, day, user] for day, user in zip(found.day, found.user)
    ]
    np.testing.assert_allclose(values, expected, err_msg=name)
  assert set(found.values) == {name for name, _, _ in total}
  units = ab_test.requests(world, arms["uniform"])
  order = sorted(requests)
  for name, of in {
    "satisfaction": lambda shown: np.mean([s for _, s in shown]),
    "topics": lambda shown: len({world.item_topic[i] for i, _ in shown}),
    "duration_s": lambda shown: (
      np.mean([world.item_duration[i] for i, _ in shown]) / 1000
    ),
  }.items():
    expected = [of(requests[key]) for key in order]
    np.testing.assert_allclose(units.values[name], expected, rtol=1e-5)


def test_an_oracle_wins_and_chance_loses(played):
  world, logged, arms = played
  for name, better in (("oracle", True), ("uniform", False)):
    rows = ab_test.compare(world, arms["logging"], arms[name], logged, FROM)
    found = {row["figure"]: row for row in rows}
    for figure in ("clicks", "views", "stay_s", "satisfaction"):
      row = found[figure]
      assert (row["low"] > 0) if better else (row["high"] < 0), figure
      assert row["relative"] == pytest.approx(
        row["treatment"] / row["control"] - 1
      )
      assert row["relative_low"] < row["relative"] < row["relative_high"]
    entropy = found["exposure_entropy"]
    for side, arm in (("control", "logging"), ("treatment", name)):
      counts = collections.Counter()
      for events in arms[arm]:
        counts.update(events.item.tolist())
      share = np.asarray([*counts.values()]) / sum(counts.values())
      assert entropy[side] == pytest.approx(-(share * np.log(share)).sum())
    assert entropy["low"] < entropy["difference"] < entropy["high"]


def _exposure(rng, num_items, users=1000):
  """125 items of a thousand, shown to each user by chance."""
  item = rng.integers(num_items, size=(users, 125))
  user = np.repeat(np.arange(users), 125)
  return scipy.sparse.csr_array(
    (np.ones(item.size), (user, item.ravel())), (users, 1000)
  )


def test_the_interval_of_entropy_is_finite_with_few_active_users():
  shown = np.zeros((3, 5))
  shown[0, :2] = 1
  row = ab_test.exposure_entropies(*[scipy.sparse.csr_array(shown)] * 2)
  assert row["low"] == row["difference"] == row["high"] == 0


def test_the_interval_of_entropy_holds_it():
  """A narrow arm and a wide one: resamples of the wide one lie lower."""
  rng = np.random.default_rng(0)
  narrow, wide = _exposure(rng, 50), _exposure(rng, 1000)
  row = ab_test.exposure_entropies(narrow, wide)
  assert row["low"] < row["difference"] < row["high"]
  assert row["relative_low"] < row["relative"] < row["relative_high"]
  # It holds what other users of the same kind are shown, and is not wide.
  for _ in range(5):
    again = ab_test.exposure_entropies(_exposure(rng, 50), _exposure(rng, 1000))
    assert row["low"] < again["difference"] < row["high"]
  assert row["high"] - row["low"] < 0.002


def test_an_arm_against_itself_differs_by_nothing(played):
  world, logged, arms = played
  logging = LoggingPolicy.create(world)
  state, again = run(world, logging, FROM)[0], []
  for _ in range(DAYS):
    state, events = step(world, state, logging)
    again.append(events)
  for row in ab_test.compare(world, arms["logging"], again, logged, FROM):
    for name in ("difference", "low", "high"):
      assert row[name] == 0.0, row
    for name in ("relative", "relative_low", "relative_high"):
      assert row[name] == 0.0 or np.isnan(row[name]), row


def test_other_requests_are_refused(played):
  world, logged, arms = played
  late = [arms["logging"][1], arms["logging"][0]]
  with pytest.raises(ValueError, match="did not serve the same requests"):
    ab_test.compare(world, arms["logging"], late, logged, FROM)


def test_intervals_cover_what_was_planted():
  """Users differ much, treatment adds a tenth: 95% intervals hold it."""
  rng = np.random.default_rng(0)
  users = np.repeat(np.arange(60), 3)
  trials, held, relative = 150, 0, 0
  for _ in range(trials):
    taste = rng.gamma(4.0, 1.0, 60)[users]
    effect = 0.1 * taste * rng.gamma(1.0, 1.0, 60)[users]
    control = taste + rng.normal(0, 0.5, len(users))
    treatment = taste + effect + rng.normal(0, 0.5, len(users))
    (row,) = ab_test.differences(control[:, None], treatment[:, None], users)
    held += row["low"] <= 0.4 <= row["high"]
    relative += row["relative_low"] <= 0.1 <= row["relative_high"]
  # Of 60 users percentile intervals are a little short; ± 2 sd is 0.035.
  for covered in (held / trials, relative / trials):
    assert 0.87 < covered <= 0.99


def test_a_figure_that_is_never_seen_has_no_relative_difference():
  users = np.arange(8)
  (row,) = ab_test.differences(np.zeros((8, 1)), np.ones((8, 1)), users)
  assert row["difference"] == row["low"] == row["high"] == 1.0
  assert np.isnan(row["relative"])


def test_days_and_pictures(played, tmp_path):
  world, logged, arms = played
  named = {"control: $a": arms["logging"], "treatment: b": arms["oracle"]}
  days = ab_test.by_day(world, named, logged, FROM)
  assert [(row["arm"], row["day"]) for row in days] == [
    (name, day) for name in named for day in (3, 4)
  ]
  clicks = arms["oracle"][1].click.sum() / USERS
  assert days[3]["clicks"] == pytest.approx(clicks)
  rows = ab_test.compare(world, *named.values(), logged, FROM)
  ab_plots.forest(rows, tmp_path / "forest.png")
  ab_plots.curves(days, tmp_path / "days.png")
  requests = ab_test.by_request(world, named)
  ab_plots.curves(requests, tmp_path / "requests.png", "request")
  for name in ("forest.png", "days.png", "requests.png"):
    assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_requests_in_the_order_that_each_user_made_them(played):
  world, _, arms = played
  log = [
    (int(e.timestamp[i]), int(e.user[i]), int(e.request[i]), day, i)
    for day, e in enumerate(arms["uniform"])
    for i in range(len(e))
  ]
  come, nth, watched, satisfied, lengths, seen = (
    collections.Counter(), {}, *(collections.defaultdict(list) for _ in "abcd"),
  )  # fmt: skip
  for _, user, request, day, i in sorted(log):
    if (day, request) not in nth:
      come[user] += 1
      nth[day, request] = come[user]
    number, events = nth[day, request], arms["uniform"][day]
    watched[number].append(float(events.play_time[i]) / 1000)
    satisfied[number].append(float(events.satisfaction[i]))
    lengths[number].append(float(world.item_duration[events.item[i]]) / 1000)
    seen[number].append(user)
  rows = ab_test.by_request(world, {"one": arms["uniform"]})
  assert [row["request"] for row in rows] == list(range(1, len(rows) + 1))
  assert len(rows) == min(max(come.values()), ab_test.FIRST_REQUESTS)
  slots = world.config.slots
  for row in rows:
    number = row["request"]
    assert row["users"] == len(set(seen[number])) == len(seen[number]) // slots
    assert row["watch_s"] == pytest.approx(np.mean(watched[number]) * slots)
    assert row["satisfaction"] == pytest.approx(np.mean(satisfied[number]))
    assert row["duration_s"] == pytest.approx(np.mean(lengths[number]))
  both = {"one": arms["uniform"], "other": arms["oracle"]}
  assert ab_test.by_request(world, both)[: len(rows)] == rows
