import numpy as np
import pytest

from onerec_jax.config import SimulationConfig
from onerec_jax.simulation import feedback
from onerec_jax.simulation.policies import UniformPolicy
from onerec_jax.simulation.state import State
from onerec_jax.simulation.step import step
from onerec_jax.simulation.world import World


@pytest.fixture(scope="module")
def log():
  world = World.create(SimulationConfig(num_users=6000, num_items=300))
  _, events = step(world, State.initial(world), UniformPolicy(world))
  return world, events


def test_long_videos_are_watched_longer_at_equal_satisfaction(log):
  world, events = log
  duration = world.item_duration[events.item]
  for low in (0.1, 0.2, 0.4):
    band = (events.satisfaction >= low) & (events.satisfaction < 2 * low)
    rows = np.flatnonzero(band & events.click & (events.play_time > 0))
    x, y = np.log(duration[rows]), np.log(events.play_time[rows])
    assert np.corrcoef(x, y)[0, 1] > 0.3
    # d^0.6, a little flatter or steeper where the end of the video cuts.
    assert np.polyfit(x, y, 1)[0] == pytest.approx(0.65, abs=0.15)
    # The share watched falls instead.
    assert np.polyfit(x, y - x, 1)[0] < -0.2


def test_satisfaction_does_not_depend_on_duration(log):
  world, events = log
  duration = np.log(world.item_duration[events.item])
  assert abs(np.corrcoef(duration, events.satisfaction)[0, 1]) < 0.15


@pytest.mark.parametrize("name", sorted(feedback.RATES))
def test_satisfaction_raises_the_rate_of_positive_flags(log, name):
  world, events = log
  clicked = events.take(events.click)
  flag = clicked.flags[name]
  expected = feedback.flag_probability(
    world, name, clicked.item, clicked.satisfaction
  )
  high = clicked.satisfaction > np.median(clicked.satisfaction)
  assert flag[high].mean() > flag[~high].mean()
  for half in (high, ~high):
    error = np.sqrt(expected[half].mean() / half.sum())
    assert abs(flag[half].mean() - expected[half].mean()) < 4 * error
  assert not events.flags[name][~events.click].any()


def test_dislikes_are_of_what_does_not_please(log):
  _, events = log
  dislike = events.flags["dislike"]
  assert 0.005 < dislike.mean() < 0.05
  low = events.satisfaction < np.median(events.satisfaction)
  assert dislike[low].mean() > 1.2 * dislike[~low].mean()


def test_dear_items_are_bought_less(log):
  world, events = log
  price = world.item_price[events.item]
  dear = price > np.median(price)
  pay = events.flags["pay"] & events.click
  clicked = events.click
  assert pay[clicked & dear].mean() < pay[clicked & ~dear].mean()


def test_long_view_is_eighteen_seconds_or_the_end(log):
  world, events = log
  duration = world.item_duration[events.item]
  expected = (events.play_time >= 18_000) | (events.play_time == duration)
  np.testing.assert_array_equal(events.flags["long_view"], expected)


def test_expected_play_time_is_the_mean_of_what_is_drawn(log):
  """Every item and a range of satisfactions, against draws of the formula."""
  world, _ = log
  rng = np.random.default_rng(0)
  items = np.arange(40, dtype=np.int32)
  satisfaction = np.linspace(0.02, 0.98, 40, dtype=np.float32)
  draws = 40_000
  click = rng.random((draws, 40)) < satisfaction
  w = np.where(click, -0.4, -2.0)
  share = np.exp(w + satisfaction - 0.5 + 0.6 * rng.normal(size=(draws, 40)))
  duration = world.item_duration[items]
  watched = duration * np.minimum(1, share * (duration / 30_000) ** -0.4)
  expected = feedback.expected_play_time(world, items, satisfaction)
  error = watched.std(axis=0) / np.sqrt(draws)
  assert (np.abs(watched.mean(axis=0) - expected) < 5 * error).all()


def test_expected_play_time_is_that_of_the_log(log):
  world, events = log
  expected = feedback.expected_play_time(
    world, events.item, events.satisfaction
  )
  difference = events.play_time - expected
  error = difference.std() / np.sqrt(len(events))
  # Whole milliseconds: half of one is lost.
  assert abs(difference.mean() + 0.5) < 5 * error
