import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax.config import SimulationConfig
from onerec_jax.simulation import affinity, policies
from onerec_jax.simulation.state import State
from onerec_jax.simulation.step import run
from onerec_jax.simulation.truth import true_slate_value
from onerec_jax.simulation.world import World


def _plackett_luce(weights, slate):
  """The closed form, in plain Python."""
  probability, left = 1.0, float(sum(weights))
  for item in slate:
    probability *= weights[item] / left
    left -= weights[item]
  return probability


def test_sample_frequencies_match_the_closed_form():
  weights = np.array([0.5, 1.0, 0.0, 0.2, 0.7], np.float32)
  draws = 60_000
  noise = np.random.default_rng(1).random((draws, 2))
  slate = policies.sample(np.tile(weights, (draws, 1)), noise)
  pairs = slate.items[:, 0] * 5 + slate.items[:, 1]
  counts = np.bincount(pairs, minlength=25)
  chi_square = 0.0
  for pair in itertools.permutations(range(5), 2):
    expected = draws * _plackett_luce(weights, pair)
    seen = counts[pair[0] * 5 + pair[1]]
    if expected == 0:
      assert seen == 0
    else:
      chi_square += (seen - expected) ** 2 / expected
  assert counts[::6].sum() == 0, "an item twice in a request"
  # 12 ordered pairs, 11 degrees of freedom: the 99.9% quantile is 31.3.
  assert chi_square < 31.3


@settings(max_examples=40, deadline=None)
@given(
  st.integers(5, 200),
  st.integers(0, 2**32 - 1),
  st.floats(0.1, 30.0),
)
def test_logged_probability_is_the_closed_form(num_items, seed, spread):
  rng = np.random.default_rng(seed)
  logits = spread * rng.normal(size=(7, num_items))
  weights = np.exp(logits - logits.max(axis=1, keepdims=True))
  # Float32 sums cannot tell smaller weights from 0 behind large ones.
  weights = np.maximum(weights, 1e-4).astype(np.float32)
  slate = policies.sample(weights, rng.random((7, 4)))
  for row in range(7):
    assert len(set(slate.items[row].tolist())) == 4
    expected = np.log(_plackett_luce(weights[row], slate.items[row]))
    np.testing.assert_allclose(
      slate.log_probability[row].sum(), expected, atol=2e-3
    )
  np.testing.assert_allclose(
    policies.slate_log_probability(weights, slate.items),
    slate.log_probability,
    atol=2e-3,
  )


@pytest.mark.parametrize("noise", [0.0, 1.0 - 2.0**-53])
def test_sample_at_the_ends_takes_only_items_with_weight(noise):
  weights = np.zeros((1, 130), np.float32)
  weights[0, [3, 64, 100]] = [0.1, 1e-3, 0.7]
  slate = policies.sample(weights, np.full((1, 3), noise))
  assert sorted(slate.items[0].tolist()) == [3, 64, 100]
  assert slate.log_probability[0, 2] == pytest.approx(0, abs=1e-6)


def test_sample_refuses_more_slots_than_items():
  weights = np.array([[1.0, 1.0, 1.0], [1.0, 0.0, 0.0]], np.float32)
  with pytest.raises(ValueError, match=r"only 1 of 2 slots.*row 1"):
    policies.sample(weights, np.full((2, 2), 0.5))


def test_propensities_of_a_log_are_calibrated():
  """Inverse propensities of the first slot count the items that are there.

  E[1 / π] over what is shown is the number of items that can be shown.
  """
  config = SimulationConfig(
    num_users=400, num_items=20, num_days=3, new_items=0.0, repeat_window=0
  )
  world = World.create(config)
  # A flatter policy than the default, so that few samples suffice.
  config.temperature = 4.0
  world = World.create(config)
  _, events = run(world, policies.LoggingPolicy.create(world))
  first = events.take(events.position == 0)
  inverse = np.exp(-first.log_probability.astype(np.float64))
  error = inverse.std() / np.sqrt(len(first))
  assert abs(inverse.mean() - 20) < 4 * error
  assert error < 0.5


def test_uniform_policy_knows_its_propensity():
  world = World.create(
    SimulationConfig(num_users=9, num_items=40, num_days=2, new_items=0.25)
  )
  state = State.initial(world)
  users = np.arange(9, dtype=np.int32)
  slate = policies.UniformPolicy(world)(
    state, users, np.random.default_rng(0).random((9, 5))
  )
  expected = -np.log(30 - np.arange(5))
  np.testing.assert_allclose(
    slate.log_probability, np.tile(expected, (9, 1)), rtol=1e-5
  )
  assert (world.item_launch[slate.items] == 0).all()


def test_greedy_first_slot_is_the_best_item_and_the_request_is_better():
  world = World.create(SimulationConfig(num_users=30, num_items=60))
  state = State.initial(world)
  users = np.arange(30, dtype=np.int32)
  noise = np.random.default_rng(0).random((30, 5))
  greedy = policies.GreedyTruePolicy(world)(state, users, noise).items
  utility = affinity.utilities(world, state, users)
  there = affinity.eligible(world, state, users)
  best = np.where(there, utility, -np.inf).max(axis=1)
  chosen = np.take_along_axis(utility, greedy[:, :1], axis=1)[:, 0]
  np.testing.assert_array_equal(chosen, best)
  logged = policies.LoggingPolicy.create(world)(state, users, noise).items
  value = true_slate_value(world, state, users, greedy)
  assert (value >= true_slate_value(world, state, users, logged) - 1e-5).all()


def test_policies_fit_their_protocols():
  world = World.create(SimulationConfig(num_users=2, num_items=30))
  logging = policies.LoggingPolicy.create(world)
  assert isinstance(logging, policies.PlackettLucePolicy)
  assert isinstance(policies.UniformPolicy(world), policies.PlackettLucePolicy)
  greedy = policies.GreedyTruePolicy(world)
  assert isinstance(greedy, policies.Policy)
  assert not isinstance(greedy, policies.PlackettLucePolicy)
