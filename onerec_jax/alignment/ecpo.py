"""Group-relative policy losses: GRPO, and OneRec-V1's early-clipped ECPO.

A group is R answers to one request, with rewards r_i (arXiv 2506.13695 §2.5):

  A_i = (r_i − mean r) / std r
  ρ_i = π(o_i) / π'_old(o_i)
  loss = −mean_i min(ρ_i A_i, clip(ρ_i, 1 − ε, 1 + ε) A_i)

GRPO has π'_old = π_old: under a negative advantage ρ, and with it the gradient,
grows without bound where the sampler was less sure than the policy is. ECPO
raises the denominator, π'_old = max(sg(π) / (1 + ε + δ), π_old), so that
ρ ≤ 1 + ε + δ always. Where A > 0 the clip was there before it: both are alike.
A negative whose ratio is below 1 − ε gets no gradient in either.

All log-probabilities are in nats and of any shape that the advantages
broadcast to: of whole answers, or of tokens with their answer's advantage.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

ROUNDING = 1e-6
"""Differences of rewards below so much of the largest of their group, or of 1,
count as none: divided by them, rounding errors would become advantages."""


def rounding(
  rewards: Float[Array, "*batch R"], legal: Bool[Array, "*batch R"]
) -> Float[Array, "*batch 1"]:
  """What rewards of a group differ by although they are alike."""
  size = jnp.where(legal, jnp.abs(rewards), 0.0)
  return ROUNDING * jnp.maximum(jnp.max(size, axis=-1, keepdims=True), 1.0)


def spread(
  rewards: Float[Array, "*batch R"], legal: Bool[Array, "*batch R"]
) -> tuple[Float[Array, "*batch R"], Float[Array, "*batch 1"]]:
  """Distances to the group's mean, and their standard deviation.

  The latter is 0 where it is no more than rounding.

  Args:
    rewards: of a group's answers.
    legal: those that are part of it; the distance of others is 0.
  """
  # From the best down, so that equal rewards differ by nothing: the rounded
  # mean of large ones need not be any of them.
  best = jnp.max(jnp.where(legal, rewards, -jnp.inf), axis=-1, keepdims=True)
  below = jnp.where(legal, rewards - best, 0.0)
  # In units of the whole range: the square of a large one would be infinite.
  unit = jnp.max(-below, axis=-1, keepdims=True)
  below /= jnp.where(unit > 0, unit, 1.0)
  # 1, not 0, answers: an empty group's mean would be NaN.
  count = jnp.maximum(jnp.sum(legal, axis=-1, keepdims=True), 1)
  mean = jnp.sum(below, axis=-1, keepdims=True) / count
  centred = jnp.where(legal, below - mean, 0.0)
  square = jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / count
  deviation = unit * jnp.sqrt(square)
  known = deviation > rounding(rewards, legal)
  return unit * centred, jnp.where(known, deviation, 0.0)


def advantages(
  rewards: Float[Array, "*batch R"],
  legal: Bool[Array, "*batch R"] | None = None,
) -> Float[Array, "*batch R"]:
  """Rewards standardised in their group; zeros where all are alike.

  Args:
    rewards: of a group's answers.
    legal: the answers that have a reward; others have advantage 0 and are not
      part of the group. None: all.
  """
  if legal is None:
    legal = jnp.ones(rewards.shape, bool)
  centred, deviation = spread(rewards.astype(jnp.float32), legal)
  some = deviation > 0
  return jnp.where(some, centred / jnp.where(some, deviation, 1.0), 0.0)


def grpo(
  log_probability: Float[Array, "*shape"],
  old: Float[Array, "*shape"],
  advantage: Float[Array, "*#shape"],
  epsilon: float = 0.2,
) -> Float[Array, "*shape"]:
  """GRPO's loss of each answer or token.

  Args:
    log_probability: under the policy.
    old: under the sampler, when it was sampled.
    advantage: A.
    epsilon: ε.
  """
  log_ratio = log_probability - jax.lax.stop_gradient(old)
  # What is dropped by an advantage of 0 may have any ratio: ∞ · 0 is NaN.
  ratio = jnp.exp(jnp.where(advantage == 0, 0.0, log_ratio))
  return _clipped(ratio, advantage, epsilon)


def ecpo(
  log_probability: Float[Array, "*shape"],
  old: Float[Array, "*shape"],
  advantage: Float[Array, "*#shape"],
  epsilon: float = 0.2,
  delta: float = 0.1,
) -> Float[Array, "*shape"]:
  """ECPO's loss of each answer or token; ε is INFERRED, δ the paper's.

  Arguments as of `grpo`; `delta` is δ.
  """
  return grpo(
    log_probability,
    early_clipped(log_probability, old, epsilon, delta),
    advantage,
    epsilon,
  )


def early_clipped(
  log_probability: Float[Array, "*shape"],
  old: Float[Array, "*shape"],
  epsilon: float,
  delta: float,
) -> Float[Array, "*shape"]:
  """Log π'_old; no gradient passes."""
  least = log_probability - math.log(1 + epsilon + delta)
  return jax.lax.stop_gradient(jnp.maximum(least, old))


def clipped(
  log_probability: Float[Array, "*shape"],
  old: Float[Array, "*shape"],
  advantage: Float[Array, "*#shape"],
  epsilon: float = 0.2,
) -> Bool[Array, "*shape"]:
  """Where GRPO's clip stops the gradient: its share is the clip rate."""
  ratio = jnp.exp(log_probability - old)
  above = (ratio > 1 + epsilon) & (advantage > 0)
  return above | ((ratio < 1 - epsilon) & (advantage < 0))


def _clipped(ratio, advantage, epsilon):
  kept = jnp.clip(ratio, 1 - epsilon, 1 + epsilon)
  return -jnp.minimum(ratio * advantage, kept * advantage)
