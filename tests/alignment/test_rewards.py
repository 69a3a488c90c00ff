"""Rewards by hand, and shares over many draws."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.alignment import rewards
from tests import tiny

KEYS = [jax.random.key(seed) for seed in range(200)]


def by_item(histories, candidates):
  del histories
  return candidates.astype(jnp.float32)


@pytest.mark.parametrize(
  ("text", "parsed"),
  [
    ("p_score", ("p_score", 1.0)),
    ("p_score/ltr=0.5", ("p_score/ltr", 0.5)),
    ("mine:reward=-2", ("mine:reward", -2.0)),
    ("p_score=0", ("p_score", 0.0)),
  ],
)
def test_a_reward_is_named_and_weighed(text, parsed):
  assert rewards.parse(text) == parsed


@pytest.mark.parametrize(
  ("text", "told"),
  [
    ("", "names no reward"),
    ("=1", "names no reward"),
    ("p_score=nan", "nan is not finite"),
    ("p_score=-inf", "-inf is not finite"),
    ("p_score=much", "could not convert"),
  ],
)
def test_no_name_and_no_number_are_refused(text, told):
  with pytest.raises(ValueError, match=told):
    rewards.parse(text)


def by_history(histories, candidates):
  seen = jnp.sum(histories.items > 0, axis=1, keepdims=True)
  return jnp.broadcast_to(seen, candidates.shape).astype(jnp.float32)


def test_rewards_add_up():
  histories = tiny.batch()
  candidates = jnp.asarray([[1, 2, 3], [4, 5, 0]], jnp.int32)
  reward = rewards.weighted(
    {"item": (2.0, by_item), "seen": (-1.0, by_history)}
  )
  seen = np.sum(np.asarray(histories.items) > 0, axis=1)
  np.testing.assert_allclose(
    reward(histories, candidates),
    2 * np.array([[1, 2, 3], [4, 5, 0]]) - seen[:, None],
  )


@pytest.mark.parametrize("shape", [(2, 1), (3,), (2, 3, 1), ()])
def test_a_reward_of_another_shape_is_refused_by_name(shape):
  reward = rewards.weighted(
    {"item": (1.0, by_item), "mine": (1.0, lambda *_: jnp.ones(shape))}
  )
  candidates = jnp.asarray([[1, 2, 3], [4, 5, 0]], jnp.int32)
  told = f"mine gave {re.escape(str(shape))}.*want {re.escape('(2, 3)')}"
  with pytest.raises(ValueError, match=told):
    reward(tiny.batch(), candidates)


def test_a_crowd_of_suppressed_items_earns_less():
  suppressed = jnp.asarray([False, True, True, False, False])
  reward = rewards.industrial(by_item, suppressed, share=0.5, factor=0.1)
  candidates = jnp.asarray([[1, 2, 2, 3], [1, 2, 3, 4]], jnp.int32)
  np.testing.assert_allclose(
    reward(tiny.batch(), candidates),
    [[0.1, 0.2, 0.2, 3.0], [1.0, 2.0, 3.0, 4.0]],
    rtol=1e-6,
  )


def test_what_is_no_item_is_no_part_of_the_share():
  """Two of three items, not two of five."""
  suppressed = jnp.asarray([False, True, True, False, False])
  reward = rewards.industrial(by_item, suppressed, share=0.5, factor=0.1)
  candidates = jnp.asarray([[1, 2, 3, 0, 0], [0, 0, 0, 0, 0]], jnp.int32)
  np.testing.assert_allclose(
    reward(tiny.batch(), candidates),
    [[0.1, 0.2, 3.0, 0.0, 0.0], [0.0] * 5],
    rtol=1e-6,
  )


def test_a_session_with_a_suppressed_item_earns_less_in_a_crowd():
  """Of the first group's eight items three are suppressed, of the second's
  seven two."""
  suppressed = jnp.asarray([False, True, True, False, False])
  constant = lambda histories, candidates: jnp.ones(candidates.shape[:2])
  reward = rewards.industrial(constant, suppressed, share=0.3, factor=0.1)
  candidates = jnp.asarray(
    [
      [[1, 2], [3, 4], [3, 1], [4, 4]],
      [[1, 2], [3, 4], [3, 4], [4, 0]],
    ],
    jnp.int32,
  )
  np.testing.assert_allclose(
    reward(tiny.batch(), candidates),
    [[0.1, 1.0, 0.1, 1.0], [1.0, 1.0, 1.0, 1.0]],
    rtol=1e-6,
  )


def test_the_format_reward_draws_its_share_and_drops_the_illegal():
  items = jnp.asarray([[7, 0, 9, 0, 3, 0], [0, 0, 0, 0, 0, 0]], jnp.int32)
  drawn = np.mean(
    [np.asarray(rewards.format_advantages(items, key, 2)) for key in KEYS],
    axis=0,
  )
  assert not drawn[1].any()
  assert not drawn[0, [1, 3, 5]].any()
  # 2 of 6: each legal one in a third of the draws.
  error = 4 * np.sqrt(2 / 9 / len(KEYS))
  np.testing.assert_allclose(drawn[0, [0, 2, 4]], 1 / 3, atol=error)


def test_the_rejected_choice_takes_the_most_probable():
  items = jnp.asarray([[7, 0, 9, 4]], jnp.int32)
  scores = jnp.asarray([[-3.0, -1.0, -2.0, -9.0]])
  np.testing.assert_array_equal(
    rewards.most_probable(items, scores, 2), [[0, 0, 1, 0]]
  )


def test_among_equals_exactly_so_many_are_the_most_probable():
  """Draws repeat: a threshold would take all three of −1."""
  items = jnp.asarray([[7, 7, 9, 7, 4], [1, 2, 3, 4, 5]], jnp.int32)
  scores = jnp.asarray([[-1.0, -1.0, -2.0, -1.0, -9.0], [-3.0] * 5])
  taken = np.asarray(rewards.most_probable(items, scores, 2))
  np.testing.assert_array_equal(taken.sum(axis=1), [2, 2])
  assert not taken[0, [2, 4]].any()
  # What is no item has its place among the probable ones, and no advantage.
  none = rewards.most_probable(jnp.zeros_like(items), scores, 2)
  assert not np.asarray(none).any()


def test_duration_advantages_by_hand():
  nan = np.nan
  quantile = jnp.asarray([0.9, 0.1, 0.5, nan, 0.8, 1.0, nan, 0.2, 0.3, 0.4])
  disliked = jnp.asarray([0, 1, 0, 1, 0, 1, 0, 0, 0, 0], bool)
  got = rewards.duration_advantages(quantile, disliked, KEYS[0])
  # A quarter of the eight known are two: 1.0, which is disliked, and 0.9.
  np.testing.assert_array_equal(got, [1, -1, 0, -1, 0, -1, 0, 0, 0, 0])


def test_equal_quantiles_are_drawn_among():
  quantile = jnp.asarray([1.0] * 6 + [0.5] * 2)
  none = jnp.zeros(8, bool)
  drawn = np.stack(
    [rewards.duration_advantages(quantile, none, key) for key in KEYS]
  )
  assert (drawn.sum(axis=1) == 2).all()
  assert not drawn[:, 6:].any()
  error = 4 * np.sqrt(2 / 9 / len(KEYS))
  np.testing.assert_allclose(drawn[:, :6].mean(axis=0), 1 / 3, atol=error)


@pytest.mark.parametrize("size", [1, 3])
def test_less_than_a_share_is_none(size):
  quantile = jnp.linspace(0, 1, size)
  got = rewards.duration_advantages(quantile, jnp.zeros(size, bool), KEYS[0])
  assert not np.asarray(got).any()
