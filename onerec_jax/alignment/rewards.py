"""Rewards of generated items, and advantages straight from feedback.

A reward is one function, yours or one of these:

  reward(histories, candidates) -> rewards

of a Batch with T = 1 (whom the candidates are for) and dense item ids [B, R];
it gives [B, R] float32, and another shape is refused. Of sessions the
candidates are [B, R, m]. Item 0 is no item: what it earns is not looked at, as
illegal IDs have rewards of their own (`format_advantages`).
"""

import math
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from onerec_jax.data.batch import Batch

Reward = Callable[[Batch, Array], Array]


def parse(text: str) -> tuple[str, float]:
  """`name=weight` → both; a name alone weighs 1.

  Raises:
    ValueError: there is no name, or the weight is no finite number.
  """
  name, _, weight = text.partition("=")
  if not name:
    raise ValueError("names no reward; want name=weight")
  value = float(weight or 1)
  if not math.isfinite(value):
    raise ValueError(f"the weight {weight} is not finite; want a number")
  return name, value


def runs_of(texts: Sequence[str]) -> list[str]:
  """The runs of reward models that `alignment.rewards` names."""
  names = (parse(text)[0] for text in texts)
  return sorted({name.split("/")[0] for name in names if ":" not in name})


def weighted(rewards: Mapping[str, tuple[float, Reward]]) -> Reward:
  """The weighted sum of rewards: name → (weight, reward).

  Raises:
    ValueError: when called, a reward of another shape than [B, R].
  """

  def reward(
    histories: Batch, candidates: Int[Array, "B R *m"]
  ) -> Float[Array, "B R"]:
    total = jnp.zeros(candidates.shape[:2], jnp.float32)
    for name, (weight, of) in rewards.items():
      earned = of(histories, candidates)
      # [B, 1] or [R] would broadcast without a word.
      if jnp.shape(earned) != candidates.shape[:2]:
        raise ValueError(
          f"the reward {name} gave {jnp.shape(earned)} for candidates "
          f"{candidates.shape}; want {candidates.shape[:2]}, one an answer"
        )
      total += weight * earned
    return total

  return reward


def industrial(
  reward: Reward, suppressed: Bool[Array, "items"], share: float, factor: float
) -> Reward:
  """V1's industrial reward (arXiv 2506.13695 §2.5): too much of one kind.

  Where the share of suppressed items among a request's candidates is above
  `share` (f), answers that hold one earn `factor` (α < 1) of their reward.
  INFERRED: the share is that of the group's items, what is no item left out;
  rewards are not negative, or α would raise them.

  Args:
    reward: what items earn otherwise.
    suppressed: [I + 1] by dense item id.
    share: f.
    factor: α.
  """

  def changed(
    histories: Batch, candidates: Int[Array, "B R *m"]
  ) -> Float[Array, "B R"]:
    earned = reward(histories, candidates)
    items = candidates.reshape(*candidates.shape[:2], -1)
    real = items > 0
    hit = suppressed[items] & real
    count = jnp.maximum(jnp.sum(real, axis=(1, 2)), 1)
    crowded = jnp.sum(hit, axis=(1, 2)) / count > share
    limited = jnp.any(hit, axis=2) & crowded[:, None]
    return jnp.where(limited, factor * earned, earned)

  return changed


def format_advantages(
  items: Int[Array, "B R"], key: jax.Array, count: int
) -> Float[Array, "B R"]:
  """V1's format reward (§2.5): 1 for a legal one of `count` drawn at random.

  All others, illegal or not drawn, have advantage 0: they are dropped. Drawn at
  random, not the most probable: those are legal anyway, and the rest would be
  left to itself.

  Args:
    items: of a group's answers; 0 is no item.
    key: of the draw.
    count: K of R, the paper's 5 of 128.
  """
  order = jax.random.uniform(key, items.shape)
  least = jnp.sort(order, axis=1)[:, count - 1 : count]
  return ((order <= least) & (items > 0)).astype(jnp.float32)


def most_probable(
  items: Int[Array, "B R"], log_probability: Float[Array, "B R"], count: int
) -> Float[Array, "B R"]:
  """The format reward's rejected choice: the `count` most probable answers."""
  # Draws repeat, and equal ones tie: ranks, not a threshold, choose `count`.
  order = jnp.argsort(-log_probability, axis=1)
  rank = jnp.argsort(order, axis=1)
  return ((rank < count) & (items > 0)).astype(jnp.float32)


def duration_advantages(
  quantile: Float[Array, "N"],
  disliked: Bool[Array, "N"],
  key: jax.Array,
  share: float = 0.25,
) -> Float[Array, "N"]:
  """V2's duration-aware advantages (arXiv 2508.20900 §3.6) of a batch.

  +1 for the `share` of largest quantiles, −1 for what was explicitly disliked,
  however long it was played, 0 else; not normalised. Equal quantiles are drawn
  among, so that the share is met: many are exactly 1.

  Args:
    quantile: of each event (data/duration.py); NaN: none, never +1.
    disliked: explicit negative feedback.
    key: of the draw among equals.
    share: of the events with a quantile; the rest of a place is rounded down.
  """
  known = ~jnp.isnan(quantile)
  best_first = jnp.lexsort(
    (jax.random.uniform(key, quantile.shape), -jnp.where(known, quantile, -1.0))
  )
  place = jnp.argsort(best_first)
  top = known & (place < jnp.floor(share * jnp.sum(known)))
  return jnp.where(disliked, -1.0, top.astype(jnp.float32))
