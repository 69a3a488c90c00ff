"""AUCs against counting pairs, and what counts as feedback."""

import numpy as np
import pytest

from onerec_jax.evaluation import rewards
from onerec_jax.models.reward import Term


def by_counting(scores, positive, users=None):
  """Every pair of a positive and another, of one user if given."""
  right = pairs = 0
  for i in np.flatnonzero(positive):
    for j in np.flatnonzero(~positive):
      if users is None or users[i] == users[j]:
        pairs += 1
        right += (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])
  return right / pairs


def drawn(seed, values=7):
  """Scores with many ties, labels, users."""
  rng = np.random.default_rng(seed)
  scores = rng.integers(0, values, 60).astype(np.float64)
  positive = rng.random(60) < 1 / (1 + np.exp(3 - scores))
  return scores, positive, rng.integers(0, 9, 60)


@pytest.mark.parametrize("seed", range(4))
def test_auc_equals_counting_pairs(seed):
  scores, positive, users = drawn(seed)
  assert rewards.auc(scores, positive) == pytest.approx(
    by_counting(scores, positive)
  )
  assert rewards.user_auc(scores, positive, users) == pytest.approx(
    by_counting(scores, positive, users)
  )


def test_auc_at_its_ends():
  scores, positive = np.arange(6.0), np.arange(6) > 3
  assert rewards.auc(scores, positive) == 1.0
  assert rewards.auc(-scores, positive) == 0.0
  assert rewards.auc(np.zeros(6), positive) == 0.5
  assert np.isnan(rewards.auc(scores, np.ones(6, bool)))
  # Nobody has both kinds.
  assert np.isnan(rewards.user_auc(scores, positive, positive.astype(int)))


def test_a_model_that_knows_users_alone_has_no_user_auc_above_half():
  _, positive, users = drawn(5)
  rate = np.asarray([positive[users == u].mean() for u in users])
  assert rewards.auc(rate, positive) > 0.6
  assert rewards.user_auc(rate, positive, users) == 0.5


@pytest.mark.parametrize(
  ("labels", "expected"),
  [
    ([0.0, 1.0, 0.0], [False, True, False]),
    ([1.0, 1.0], [True, True]),
    ([0.1, 0.2, 0.7, 0.4, 0.5], [False, False, True, True, True]),
    # The median itself is reached by all: what lies above it.
    ([0.0, 0.0, 0.0, 0.3, 0.6], [False, False, False, True, True]),
  ],
)
def test_shares_count_from_their_median_up(labels, expected):
  found = rewards.positives(np.asarray(labels))
  np.testing.assert_array_equal(found, expected)


def test_measure_skips_the_unknown_and_tells_towers_from_the_fused_score():
  scores, positive, users = drawn(6)
  rng = np.random.default_rng(1)
  unknown = rng.random(60) < 0.3
  labels = {
    "a": np.where(unknown, np.nan, positive),
    "b": (rng.random(60) < 0.5).astype(np.float64),
    "c": np.zeros(60),
  }
  logits = {"a": -scores, "b": scores, "c": scores, "p": scores + users}
  own = [Term(name, name) for name in "abc"]
  fused = [Term("p", name, 2.0) for name in "abc"]
  found = rewards.measure((*own, *fused), (logits, labels, users))
  kept = ~unknown
  assert found["auc_a"] == pytest.approx(
    by_counting((scores + users)[kept], positive[kept])
  )
  assert found["tower/auc_a"] == pytest.approx(
    by_counting(-scores[kept], positive[kept])
  )
  assert found["user_auc_a"] == pytest.approx(
    by_counting((scores + users)[kept], positive[kept], users[kept])
  )
  assert found["rate_a"] == pytest.approx(positive[kept].mean())
  # Nobody ever did c.
  assert not [name for name in found if name.endswith("_c")]
  assert found["auc"] == pytest.approx((found["auc_a"] + found["auc_b"]) / 2)
  # Without a fused score the towers are the reward.
  plain = rewards.measure(tuple(own), (logits, labels, users))
  assert plain["auc_a"] == found["tower/auc_a"]
  assert not [name for name in plain if name.startswith("tower/")]
