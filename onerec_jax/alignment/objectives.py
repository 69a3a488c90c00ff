"""From judged answers to a loss: `alignment.objective` → what it means.

Two kinds. A pair is a request's best answer by reward and its worst (OneRec,
arXiv 2502.18965 §1.5), or its worst few; a group is all R answers with their
advantages (V1, arXiv 2506.13695 §2.5). Both hold log-probabilities of whole
answers, as the papers' equations do: the ratio is one of answers, not tokens.

The formulas are in dpo.py and ecpo.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Bool, Float, Int

from onerec_jax.alignment import dpo, ecpo
from onerec_jax.alignment_config import AlignmentConfig
from onerec_jax.data.batch import Batch

PAIRS: Mapping[
  str, Callable[[dpo.Pairs, AlignmentConfig, int], Float[Array, "B"]]
] = {
  "dpo": lambda pairs, c, n: dpo.dpo(pairs, c.beta),
  "ipo": lambda pairs, c, n: dpo.ipo(pairs, c.beta),
  "cdpo": lambda pairs, c, n: dpo.conservative_dpo(pairs, c.beta, c.noise),
  "rdpo": lambda pairs, c, n: dpo.robust_dpo(pairs, c.beta, c.noise),
  "cpo": lambda pairs, c, n: dpo.cpo(pairs, c.beta, c.likelihood),
  "simpo": lambda pairs, c, n: dpo.simpo(pairs, c.beta, c.margin, n),
  "s_dpo": lambda pairs, c, n: dpo.s_dpo(pairs, c.beta),
}
"""Losses of (pairs, settings, tokens of an answer)."""

GROUPS: Mapping[
  str, Callable[[Array, Array, Array, AlignmentConfig], Float[Array, "B R"]]
] = {
  "grpo": lambda new, old, a, c: ecpo.grpo(new, old, a, c.epsilon),
  "ecpo": lambda new, old, a, c: ecpo.ecpo(new, old, a, c.epsilon, c.delta),
}
"""Losses of (log π, log π_old, advantages, settings)."""


@struct.dataclass
class Group:
  """What a step learns from; rows are requests.

  Attributes:
    requests: a Batch with T = 1.
    codes: [B, R, N, L]; of pairs the winner, then the losers.
    old: [B, R] log-probability under the sampler.
    counts: [B, R] whether guards look at an answer.
    advantages: [B, R]; of pairs: whether there is a pair, in every column.
    format: [B, R] advantages of the format reward; None: there is none.
    scale: [B] of a request's loss in the sum over targets (losses.Sums).
  """

  requests: Batch
  codes: Any
  old: Any
  counts: Any
  advantages: Any
  format: Any
  scale: Any


def pairs_of(
  rewards: Float[Array, "B R"], legal: Bool[Array, "B R"], losers: int
) -> tuple[Int[Array, "B _"], Bool[Array, "B"]]:
  """The best answer, then the worst ones, worst first.

  Args:
    rewards: of the answers.
    legal: the answers that may be either.
    losers: how many worse answers.

  Returns:
    Their places, and whether each of the worse ones earned less than the best:
    where rewards are alike but for rounding there is nothing to prefer.
  """
  best = jnp.argmax(jnp.where(legal, rewards, -jnp.inf), axis=1)[:, None]
  order = jnp.argsort(jnp.where(legal, rewards, jnp.inf), axis=1)
  places = jnp.concatenate([best, order[:, :losers]], axis=1)
  earned = jnp.take_along_axis(
    jnp.where(legal, rewards, jnp.inf), places, axis=1
  )
  least = ecpo.rounding(rewards, legal)
  return places, jnp.all(earned[:, :1] - earned[:, 1:] > least, axis=1)


def loss(
  new: Float[Array, "B R"], group: Group, config: AlignmentConfig
) -> Float[Array, "B"]:
  """Of each request.

  Args:
    new: log-probabilities of the answers under the policy.
    group: the answers.
    config: the objective and its settings.
  """
  if config.objective in PAIRS:
    tokens = group.codes.shape[2] * group.codes.shape[3]
    of_pairs = PAIRS[config.objective](_pairs(new, group), config, tokens)
    return jnp.where(group.advantages[:, 0] > 0, of_pairs, 0.0)
  of_answers = GROUPS[config.objective]
  total = jnp.mean(of_answers(new, group.old, group.advantages, config), axis=1)
  if group.format is not None:
    judged = of_answers(new, group.old, group.format, config)
    # INFERRED: a mean over the K drawn, which are the format reward's group.
    of_format = jnp.sum(judged, axis=1) / config.format_samples
    total += config.format_weight * of_format
  return total


def guards(
  new: Float[Array, "B R"], group: Group, config: AlignmentConfig
) -> dict[str, Float[Array, "B"]]:
  """What to watch of each request, at the policy before the update.

  `kl`: the mean of log π_old − log π over the answers, which estimates
  KL(sampler ‖ policy) where they are samples. `ratio_max`: the largest π /
  π_old. `clip_rate`: the share of answers whose gradient GRPO's clip stops.
  Of pairs, `margin`: Δ (dpo.py).
  """
  log_ratio = jnp.where(group.counts, new - group.old, 0.0)
  count = jnp.maximum(jnp.sum(group.counts, axis=1), 1)
  found = {
    "kl": -jnp.sum(log_ratio, axis=1) / count,
    "ratio_max": jnp.exp(jnp.max(log_ratio, axis=1)),
  }
  if config.objective in PAIRS:
    margins = _pairs(new, group).margins()
    margin = jnp.mean(margins, axis=1)
    return found | {"margin": jnp.where(group.advantages[:, 0] > 0, margin, 0)}
  stopped = ecpo.clipped(new, group.old, group.advantages, config.epsilon)
  return found | {"clip_rate": jnp.mean(stopped, axis=1)}


def _pairs(new: Float[Array, "B R"], group: Group) -> dpo.Pairs:
  old = group.old
  return dpo.Pairs(new[:, 0], new[:, 1:], old[:, 0], old[:, 1:])
