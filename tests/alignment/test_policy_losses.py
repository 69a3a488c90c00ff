"""GRPO, ECPO and GBPO: formulas in probabilities, bounds, and gradients."""

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from onerec_jax.alignment import ecpo, gbpo, objectives

EPSILON, DELTA = 0.2, 0.1
PROBABILITIES = np.array([1e-30, 1e-6, 1e-3, 0.02, 0.3, 0.49, 0.51, 0.9, 0.999])


def grid():
  """Every policy with every sampler and both signs."""
  policy, old, advantage = np.meshgrid(
    PROBABILITIES, PROBABILITIES, [-2.0, -1.0, 0.0, 1.0, 0.3], indexing="ij"
  )
  return policy.ravel(), old.ravel(), advantage.ravel()


def logs(*values):
  return [jnp.log(jnp.asarray(v, jnp.float32)) for v in values]


def gradient(loss, policy, *rest):
  """In log π, entry by entry."""
  return np.asarray(jax.grad(lambda p: jnp.sum(loss(p, *rest)))(policy))


def by_definition(policy, old, advantage):
  """The paper's min of clipped and unclipped, in float64."""
  ratio = policy / old
  kept = np.clip(ratio, 1 - EPSILON, 1 + EPSILON)
  return -np.minimum(ratio * advantage, kept * advantage)


def test_grpo_by_definition():
  policy, old, advantage = grid()
  log_policy, log_old = logs(policy, old)
  got = ecpo.grpo(log_policy, log_old, jnp.asarray(advantage), EPSILON)
  fits = policy / old < 1e20  # beyond, float32 overflows: what ECPO mends
  np.testing.assert_allclose(
    got[fits], by_definition(policy, old, advantage)[fits], rtol=1e-4
  )


def test_ecpo_by_definition():
  policy, old, advantage = grid()
  log_policy, log_old = logs(policy, old)
  raised = np.maximum(policy / (1 + EPSILON + DELTA), old)
  got = ecpo.ecpo(log_policy, log_old, jnp.asarray(advantage), EPSILON, DELTA)
  want = by_definition(policy, raised, advantage)
  np.testing.assert_allclose(got, want, rtol=1e-4)


def test_ecpos_ratio_is_bounded():
  policy, old, _ = grid()
  log_policy, log_old = logs(policy, old)
  denominator = ecpo.early_clipped(log_policy, log_old, EPSILON, DELTA)
  ratio = np.exp(np.asarray(log_policy - denominator))
  assert ratio.max() <= (1 + EPSILON + DELTA) * (1 + 1e-5)
  assert ratio.max() == pytest.approx(1 + EPSILON + DELTA, rel=1e-5)


def test_ecpos_gradients():
  """As GRPO's for positives; for negatives bounded, and none below 1 − ε."""
  policy, old, advantage = grid()
  log_policy, log_old = logs(policy, old)
  advantage = jnp.asarray(advantage)
  early = gradient(ecpo.ecpo, log_policy, log_old, advantage)
  plain = gradient(ecpo.grpo, log_policy, log_old, advantage)
  positive = np.asarray(advantage) > 0
  np.testing.assert_allclose(early[positive], plain[positive], rtol=1e-4)
  bound = np.abs(np.asarray(advantage)) * (1 + EPSILON + DELTA)
  assert (np.abs(early) <= bound * (1 + 1e-5)).all()
  negative = np.asarray(advantage) < 0
  assert np.abs(plain[negative]).max() > 1e6
  small = negative & (policy / old < 1 - EPSILON - 1e-3)
  assert small.any()
  assert not early[small].any()
  # A negative that the policy has come to like keeps the most there is.
  liked = negative & (policy / old > 2)
  np.testing.assert_allclose(early[liked], bound[liked], rtol=1e-4)


def test_clipped_says_where_grpo_has_no_gradient():
  policy, old, advantage = grid()
  usual = (policy / old < 1e20) & (policy / old > 1e-20) & (advantage != 0)
  log_policy, log_old = logs(policy[usual], old[usual])
  advantage = jnp.asarray(advantage[usual])
  none = gradient(ecpo.grpo, log_policy, log_old, advantage) == 0
  got = np.asarray(ecpo.clipped(log_policy, log_old, advantage))
  np.testing.assert_array_equal(got, none)


def test_advantages_are_standardised():
  rewards = jnp.asarray([[1.0, 2.0, 3.0, 6.0], [5.0, 5.0, 5.0, 5.0]])
  got = ecpo.advantages(rewards)
  np.testing.assert_allclose(
    got[0], np.array([-2, -1, 0, 3]) / np.sqrt(3.5), rtol=1e-5
  )
  np.testing.assert_array_equal(got[1], 0)


def test_rounding_errors_are_no_spread():
  """Equal rewards as float32 sums give them differ in the last digit."""
  rewards = 0.3 + (jnp.arange(8) % 2 * 3e-8)[None]
  np.testing.assert_array_equal(ecpo.advantages(rewards), 0)


@hypothesis.settings(deadline=None)  # the first compiles
@hypothesis.given(
  value=st.floats(-1e6, 1e6, width=32),
  legal=st.lists(st.booleans(), min_size=24, max_size=24),
)
def test_equal_rewards_of_any_size_are_no_spread(value, legal):
  """Their float32 mean need not be any of them."""
  rewards, legal = jnp.full((1, 24), value), jnp.asarray(legal)[None]
  np.testing.assert_array_equal(ecpo.advantages(rewards, legal), 0)
  assert not objectives.pairs_of(rewards, legal, 1)[1].any()


def test_one_reward_far_below_the_others_is_the_bad_one():
  """Though the square of its distance is no float32."""
  rewards = jnp.asarray([[0.9, -1e30, 0.1, 0.5]])
  got = np.asarray(ecpo.advantages(rewards))[0]
  np.testing.assert_allclose(got, np.array([1, -3, 1, 1]) / 3**0.5, rtol=1e-5)


def test_pairs_differ_by_more_than_rounding():
  """A session's reward is the same in any order but for its last digits."""
  rewards = jnp.asarray([[0.6, 0.6000001, 0.6], [700.0, 700.0001, 699.9]])
  legal = jnp.ones(rewards.shape, bool)
  np.testing.assert_array_equal(
    objectives.pairs_of(rewards, legal, 1)[1], [False, True]
  )


def test_gbpo_of_a_positive_is_the_likelihood():
  (log_policy,) = logs(PROBABILITIES)
  got = gradient(gbpo.gbpo, log_policy, None, jnp.ones(len(PROBABILITIES)))
  np.testing.assert_allclose(got, -1.0, rtol=1e-5)


def test_gbpo_of_a_negative_is_binary_cross_entropy_below_a_half():
  """d −log(1 − π) / d log π = π / (1 − π); above a half 1."""
  (log_policy,) = logs(PROBABILITIES)
  got = gradient(gbpo.gbpo, log_policy, None, -jnp.ones(len(PROBABILITIES)))
  below = PROBABILITIES < 0.5
  want = PROBABILITIES / (1 - PROBABILITIES)
  np.testing.assert_allclose(got[below], want[below], rtol=1e-4)
  np.testing.assert_allclose(got[~below], 1.0, rtol=1e-4)
  cross_entropy = lambda p: -jnp.log1p(-jnp.exp(p))
  np.testing.assert_allclose(
    got[below], gradient(cross_entropy, log_policy)[below], rtol=1e-4
  )


def test_gbpo_of_certainty_is_finite():
  certain = jnp.zeros(2)
  advantage = jnp.asarray([1.0, -1.0])
  assert np.isfinite(gbpo.gbpo(certain, None, advantage)).all()
  assert np.isfinite(gradient(gbpo.gbpo, certain, None, advantage)).all()


@pytest.mark.parametrize(
  ("policy", "old", "advantage", "want"),
  [
    # Denominator max(.2, .1): above the bound of the current policy.
    (0.9, 0.2, -1.0, 4.5),
    (0.01, 0.3, 1.0, -0.01 / 0.3),
    # The logged probability below what the policy itself gives: as unknown.
    (0.3, 0.1, 1.0, -1.0),
    (0.3, 0.1, -1.0, 0.3 / 0.7),
    # Below a half too binary cross-entropy's .3 / .7 needs π_old ≤ 1 − π: here
    # max(.8, .7) is the logged probability's.
    (0.3, 0.8, -1.0, 0.3 / 0.8),
  ],
)
def test_gbpo_with_a_logged_probability(policy, old, advantage, want):
  log_policy, log_old = logs([policy], [old])
  got = gradient(gbpo.gbpo, log_policy, log_old, jnp.asarray([advantage]))
  np.testing.assert_allclose(got, want, rtol=1e-4)
