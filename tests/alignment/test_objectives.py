"""What judged answers become: pairs, advantages, losses and guards."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.alignment import dpo, ecpo, feedback, objectives
from onerec_jax.alignment_config import AlignmentConfig
from tests import tiny

B, R = 40, 6


def draw(seed=0):
  """Rewards with ties, and which answers are legal."""
  rng = np.random.default_rng(seed)
  rewards = rng.integers(0, 4, (B, R)).astype(np.float32)
  legal = rng.random((B, R)) < 0.7
  legal[0], legal[1] = False, [True] + [False] * (R - 1)
  # What is not legal may earn anything.
  rewards[~legal] = rng.choice([-99, 99, np.nan], (~legal).sum())
  return rewards, legal


def group(rng, rewards, advantages, judged=None):
  old = rng.normal(-4, 2, rewards.shape)
  codes = jnp.zeros((*rewards.shape, 2, 3), jnp.int32)
  scale = jnp.full(len(rewards), 1 / len(rewards))
  return objectives.Group(
    tiny.batch(), codes, jnp.asarray(old, jnp.float32),
    jnp.ones(rewards.shape, bool), jnp.asarray(advantages), judged, scale,
  )  # fmt: skip


@pytest.mark.parametrize("losers", [1, 3])
def test_pairs_row_by_row(losers):
  rewards, legal = draw()
  places, usable = objectives.pairs_of(
    jnp.asarray(rewards), jnp.asarray(legal), losers
  )
  for row in range(B):
    ranked = sorted(np.flatnonzero(legal[row]), key=lambda i: rewards[row, i])
    worse = [i for i in ranked if rewards[row, i] < rewards[row, ranked[-1]]]
    assert usable[row] == (len(worse) >= losers)
    if usable[row]:
      earned = rewards[row, places[row]]
      assert earned[0] == rewards[row, ranked[-1]]
      np.testing.assert_array_equal(earned[1:], rewards[row, ranked[:losers]])
      assert legal[row, places[row]].all()
  assert 0 < np.sum(usable) < B


def test_advantages_are_those_of_the_legal_alone():
  rewards, legal = draw()
  got = ecpo.advantages(jnp.asarray(rewards), jnp.asarray(legal))
  for row in range(B):
    kept = rewards[row, legal[row]].astype(np.float64)
    want = np.zeros(R)
    if len(kept) and kept.std() > 0:
      want[legal[row]] = (kept - kept.mean()) / kept.std()
    np.testing.assert_allclose(got[row], want, atol=1e-5)


@pytest.mark.parametrize("name", objectives.GROUPS)
def test_what_is_dropped_may_have_any_ratio(name):
  """exp(200) is ∞ in float32, and ∞ · 0 is no number."""
  new, old = jnp.asarray([200.0, -1.0]), jnp.asarray([0.0, -1.0])
  advantage = jnp.asarray([0.0, 1.0])
  value, slope = jax.value_and_grad(
    lambda x: jnp.sum(
      objectives.GROUPS[name](x, old, advantage, AlignmentConfig())
    )
  )(new)
  assert value == -1.0
  np.testing.assert_array_equal(slope, [0.0, -1.0])


def test_grpo_and_ecpo_differ_where_a_negative_has_become_likely():
  rng = np.random.default_rng(2)
  advantages = rng.normal(size=(B, R)).astype(np.float32)
  given = group(rng, advantages, advantages)
  new = given.old + jnp.asarray(rng.normal(0, 0.5, (B, R)), jnp.float32)
  values, slopes = {}, {}
  for name in objectives.GROUPS:
    config = AlignmentConfig(objective=name)
    total = lambda x, c=config: R * jnp.sum(objectives.loss(x, given, c))
    of_answers = objectives.GROUPS[name](
      new, given.old, given.advantages, config
    )
    values[name], slopes[name] = of_answers, jax.grad(total)(new)
    np.testing.assert_allclose(
      objectives.loss(new, given, config), of_answers.mean(1), rtol=1e-6
    )
  ratio = np.exp(np.asarray(new - given.old))
  early = (advantages < 0) & (ratio > 1.3)
  assert early.any()
  for found in (values, slopes):
    apart = np.abs(np.asarray(found["grpo"] - found["ecpo"])) > 1e-4
    np.testing.assert_array_equal(apart, early)


def test_every_loss_on_pairs_has_its_own_settings():
  """Names → formulas of dpo.py, and 0 where there is no pair."""
  rng = np.random.default_rng(3)
  usable = rng.integers(0, 2, B).astype(np.float32)
  given = group(rng, np.zeros((B, 2)), np.stack([usable] * 2, axis=1))
  new = given.old + jnp.asarray(rng.normal(0, 1, (B, 2)), jnp.float32)
  pairs = dpo.Pairs(new[:, 0], new[:, 1:], given.old[:, 0], given.old[:, 1:])
  want = {
    "dpo": dpo.dpo(pairs, 0.3),
    "ipo": dpo.ipo(pairs, 0.3),
    "cdpo": dpo.conservative_dpo(pairs, 0.3, 0.2),
    "rdpo": dpo.robust_dpo(pairs, 0.3, 0.2),
    "cpo": dpo.cpo(pairs, 0.3, 0.7),
    # Two items of three codes.
    "simpo": dpo.simpo(pairs, 0.3, 0.4, 6),
    "s_dpo": dpo.s_dpo(pairs, 0.3),
  }
  assert set(want) == set(objectives.PAIRS)
  for name, expected in want.items():
    config = AlignmentConfig(
      objective=name, beta=0.3, noise=0.2, likelihood=0.7, margin=0.4
    )
    np.testing.assert_allclose(
      objectives.loss(new, given, config), usable * expected, rtol=1e-5
    )
  found = objectives.guards(new, given, AlignmentConfig(objective="dpo"))
  log_ratio = np.asarray(new - given.old)
  margin = log_ratio[:, 0] - log_ratio[:, 1]
  np.testing.assert_allclose(found["margin"], usable * margin, atol=1e-5)
  np.testing.assert_allclose(found["kl"], -log_ratio.mean(1), atol=1e-5)
  np.testing.assert_allclose(
    found["ratio_max"], np.exp(log_ratio.max(1)), rtol=1e-4
  )


def labelled(**labels):
  """`tiny.batch`, its 7 targets labelled in reading order, 0 at padding."""
  batch = tiny.batch()
  places = np.asarray(batch.targets) > 0
  found = {}
  for name, values in labels.items():
    found[name] = np.zeros(places.shape, np.float32)
    found[name][places] = values
  return batch.replace(labels=jax.tree.map(jnp.asarray, found)), places


@pytest.mark.parametrize(
  ("kind", "want"),
  [
    # A quarter of the five known quantiles is one.
    ("duration", [0, 0, 0, 1, -1, 0, 0]),
    ("play_time", [1, 0, 0, 0, -1, 0, 0]),
    ("like", [0, 1, 0, 0, -1, 0, 0]),
  ],
)
def test_feedback_becomes_advantages(kind, want):
  """Padding, labelled 0, is no part of the quarter; dislikes are −1."""
  nan = np.nan
  batch, places = labelled(
    play_quantile=[0.3, 0.5, nan, 0.9, 0.8, nan, 0.1],
    play_time_ms=[90e3, 2e3, nan, 9e3, 8e3, nan, 1e3],
    like=[0, 1, 0, 0, 1, nan, 0],
    dislike=[0, 0, 0, 0, 1, nan, 0],
  )
  got = np.asarray(feedback.advantages(batch, kind, jax.random.key(0)))
  np.testing.assert_array_equal(got[places], want)
  assert not got[~places].any()


def test_pairs_are_of_one_users_liked_and_disliked():
  """Against loops over targets; padding and other users' are no pairs."""
  rng = np.random.default_rng(5)
  batch, places = labelled(like=[0] * 7)
  advantage = rng.choice([-0.5, 0.0, 2.0], places.shape).astype(np.float32)
  advantage[~places] = 0
  tokens = -rng.exponential(1.0, (*places.shape, 3)).astype(np.float32)
  last = np.maximum(np.asarray(batch.visible_until) - 1, 0)
  user = np.take_along_axis(np.asarray(batch.segment), last, axis=1)
  want = np.zeros(places.shape)
  for b, i in np.argwhere(advantage > 0):
    worse = [
      j for j in np.flatnonzero(advantage[b] < 0) if user[b, j] == user[b, i]
    ]
    margins = [tokens[b, i].sum() - tokens[b, j].sum() for j in worse]
    losses = [np.log1p(np.exp(-margin)) for margin in margins]
    want[b, i] = advantage[b, i] * (np.mean(losses) if losses else 0.0)
  got = feedback.pair_loss(jnp.asarray(tokens), batch, jnp.asarray(advantage))
  np.testing.assert_allclose(got, want, rtol=1e-5)
  assert (want > 0).any()


def test_logged_probabilities_bound_positives_as_on_whole_items():
  """GBPO's gradient on items, in probabilities; negatives stay per token."""
  rng = np.random.default_rng(4)
  batch, places = labelled(log_probability=[-1, -9, np.nan, -9, -1, -2, -7])
  advantage = np.zeros(places.shape, np.float32)
  advantage[places] = [1, 1, 1, 0, -1, -1, 1]
  tokens = jnp.asarray(-rng.exponential(1.0, (*places.shape, 3)), jnp.float32)

  def slope(logged):
    total = lambda x: jnp.sum(
      feedback.loss(x, batch, jnp.asarray(advantage), logged)
    )
    return 3 * np.asarray(jax.grad(total)(tokens))

  item = np.exp(np.asarray(tokens).sum(-1))
  old = np.exp(np.asarray(batch.labels["log_probability"]))
  old = np.where(np.isnan(old), 0, old)
  # d/dx of −π / max(π_old, π), π = exp(Σ x), is −π / max(π_old, π).
  of_items = -item / np.maximum(old, item)
  positive = (advantage > 0)[..., None]
  np.testing.assert_allclose(
    slope(True), np.where(positive, of_items[..., None], slope(False)),
    rtol=1e-4,
  )  # fmt: skip
  assert (of_items[places][:2] > -1).any()
