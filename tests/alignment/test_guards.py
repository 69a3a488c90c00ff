"""What an alignment step logs of its answers, and when its sampler is renewed.

Against the definitions in docs/alignment.md and numbers made up here.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from onerec_jax import config as config_lib
from onerec_jax.alignment import learner, rollouts
from onerec_jax.alignment_config import AlignmentConfig
from tests import tiny
from tests.alignment import test_learner as joint_step

GROUPS = [
  # Of each answer: its reward, log p of the sampler, π / π_sampler.
  [(1, -1.0, 0.5), (2, -2.0, 1.5), (3, -3.5, 3.0), (4, -1.5, 1.5),
   (5, -2.5, 0.6), (99, -7.0, 9.0)],
  [(2, -4.0, 0.25), (np.nan, -9.0, 8.0), (2, -0.5, 1.4), (2, -3.0, 2.0),
   (2, -5.0, 0.9), (-99, -6.0, 0.1)],
]  # fmt: skip
LEGAL = np.array([[1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 1, 0]], bool)
"""The others are no items: whatever they are said to earn is no reward."""


def by_definition(epsilon):
  """The table's figures, one group after the other."""
  found = []
  for answers, legal in zip(GROUPS, LEGAL):
    kept = [answer for answer, one in zip(answers, legal) if one]
    rewards, old, ratios = np.array(kept, np.float64).T
    better, worse = rewards > rewards.mean(), rewards < rewards.mean()
    stopped = better & (ratios > 1 + epsilon) | worse & (ratios < 1 - epsilon)
    found.append({
      "legality": len(kept) / len(answers),
      "reward_mean": rewards.mean(),
      "reward_max": rewards.max(),
      "reward_spread": rewards.std(),
      "zero_spread": rewards.std() == 0,
      "kl": np.mean(-np.log(ratios)),
      "ratio_max": ratios.max(),
      # Of all answers: those without a reward have no gradient to stop.
      "clip_rate": stopped.sum() / len(answers),
      "entropy": np.mean(-old),
    })  # fmt: skip
  return {name: np.mean([one[name] for one in found]) for name in found[0]}


def test_figures_of_two_groups_by_hand(monkeypatch):
  """One of equal rewards, and answers that are no items in both.

  The search and the policy's second opinion are made up; what is logged of them
  goes through the whole step. ECPO, whose own ratio stops at 1 + ε + δ: that of
  the figures does not.
  """
  rewards, old, ratios = np.moveaxis(np.array(GROUPS, np.float32), -1, 0)
  config = AlignmentConfig(objective="ecpo", group=6, epsilon=0.3)
  state, function, batch, catalogue, index = joint_step.start(
    joint_step.lazy(), config
  )
  batch = batch.replace(requests=jax.tree.map(lambda x: x[:2], batch.requests))
  codes = jnp.zeros((2, 6, 1, len(tiny.CODEBOOK_SIZES)), jnp.int32)
  items = jnp.asarray(LEGAL * np.arange(1, 7), jnp.int32)
  answers = rollouts.Rollouts(
    items, codes, jnp.asarray(old), jnp.asarray(LEGAL)
  )
  new = jnp.asarray(old + np.log(ratios))
  monkeypatch.setattr(rollouts, "answer", lambda *_: answers)
  monkeypatch.setattr(rollouts, "log_probability", lambda *_: new)
  reward = jax.tree_util.Partial(lambda *_: jnp.asarray(rewards))
  _, sums = jax.jit(function)(state, batch, catalogue, (index, reward))
  found, want = joint_step.values(sums), by_definition(0.3)
  for name, expected in want.items():
    assert found[name] == pytest.approx(expected, rel=1e-5), name
  # The definitions' own values, in the head. Stopped are the first answer, bad
  # at .5, and the fourth, good at 1.5; not a bad 1.5, an average 3, a good .6.
  assert want["clip_rate"] == pytest.approx((2 / 6 + 0) / 2)
  assert want["ratio_max"] == (3 + 2) / 2
  assert want["reward_max"] == (5 + 2) / 2
  assert want["reward_spread"] == pytest.approx(np.sqrt(2) / 2)
  assert want["entropy"] == (10.5 / 5 + 12.5 / 4) / 2
  assert want["zero_spread"] == 0.5


def test_what_has_no_reward_leaves_its_group_whole(monkeypatch):
  """The others are learned from as if it were no item, and it is counted."""
  rewards, old, ratios = np.moveaxis(np.array(GROUPS, np.float32), -1, 0)
  config = AlignmentConfig(objective="ecpo", group=6)
  state, function, batch, catalogue, index = joint_step.start(
    joint_step.lazy(), config
  )
  batch = batch.replace(requests=jax.tree.map(lambda x: x[:2], batch.requests))
  codes = jnp.zeros((2, 6, 1, len(tiny.CODEBOOK_SIZES)), jnp.int32)
  new = jnp.asarray(old + np.log(ratios))
  monkeypatch.setattr(rollouts, "log_probability", lambda *_: new)

  def figures(legal, earned):
    answers = rollouts.Rollouts(
      jnp.asarray(legal * 1), codes, jnp.asarray(old), jnp.asarray(legal)
    )
    monkeypatch.setattr(rollouts, "answer", lambda *_: answers)
    reward = jax.tree_util.Partial(lambda *_: jnp.asarray(earned))
    return joint_step.values(
      jax.jit(lambda *given: function(*given))(
        state, batch, catalogue, (index, reward)
      )[1]
    )

  fewer = LEGAL.copy()
  fewer[0, 2] = fewer[1, 0] = False
  rewards[0, 2], rewards[1, 0] = np.nan, -np.inf
  found, want = figures(LEGAL, rewards), figures(fewer, rewards)
  assert found["objective"] == pytest.approx(want["objective"], rel=1e-6)
  assert want["objective"] != 0
  for name in ("reward_mean", "reward_spread", "entropy", "kl"):
    assert found[name] == pytest.approx(want[name], rel=1e-6), name
  assert found["unjudged"] == pytest.approx(2 / LEGAL.sum())
  assert want["unjudged"] == 0
  assert found["legality"] == pytest.approx(LEGAL.mean())


def test_the_gate_is_the_alignments():
  config = config_lib.Config(alignment=AlignmentConfig(gate=0.07))
  work = learner.Alignment(config, joint_step.lazy(), lambda: None, 3)
  assert work.gate == 0.07


def test_zero_renews_the_sampler_once_an_epoch():
  """Three steps an epoch here: the answers are a copy's that old, no older."""
  state, _, batch, catalogue, index = joint_step.sampled()
  config = config_lib.Config(
    # As of `sampled`, whose program this is, but for what is asked.
    alignment=AlignmentConfig(
      objective="ecpo", search="sample", group=8, weight=2.0, feedback="like",
      sync_every=0,
    )
  )  # fmt: skip
  config.training.seed, config.training.microbatches = 0, 1
  work = learner.Alignment(config, joint_step.lazy(), lambda: None, 3)
  tx = optax.with_extra_args_support(optax.sgd(0.1))
  compiled = jax.jit(work.step(tx))
  reward, policies = joint_step.reward_of(3), []
  for done in range(8):
    policies.append(jax.device_get(state.params))
    state, sums = compiled(state, batch, catalogue, (index, reward))
    equal = [same(state.sampler, params) for params in policies]
    # Steps 0, 3 and 6 begin with a copy; no two policies are alike.
    assert equal == [step == done // 3 * 3 for step in range(done + 1)]
    age = joint_step.values(sums)["sampler_age"]
    assert age == pytest.approx(done % 3, abs=1e-5)


def same(tree, other):
  return all(
    jax.tree.leaves(jax.tree.map(np.array_equal, jax.device_get(tree), other))
  )
