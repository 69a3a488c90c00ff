"""Rollouts: what the sampler, a recent copy of the policy, answers.

Answers to one request share its context, in the search and in the step that
learns from them: a group of R costs R targets, not R contexts. They carry the
sampler's log-probability of the whole answer, the sum over its codes, be it an
item (L codes) or a session (m · L).

V1 (arXiv 2506.13695 §2.5) prefers the beams of a search to draws; OneRec takes
beams too. Both may be of items only or of any codes. Beams are no sample of the
sampler's distribution: ratios to it are as the papers' are, and expectations
over beams are not over it.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int

from onerec_jax.alignment import policy
from onerec_jax.alignment_config import AlignmentConfig
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.inference import (
  beam_search,
  free_search,
  sampling,
  session_search,
)
from onerec_jax.inference.prefix_index import PrefixIndex


@struct.dataclass
class Rollouts:
  """R answers to each request.

  Attributes:
    items: [B, R] or, of sessions, [B, R, m]; 0 where an ID is no item.
    codes: [B, R, N, L] the answers' semantic IDs; N = 1, or m of sessions.
    log_probability: [B, R] of the whole answer under the sampler, in nats.
    legal: [B, R] whether an answer is made of items.
  """

  items: Any
  codes: Any
  log_probability: Any
  legal: Any


def session_items(model: nn.Module) -> int:
  """N, items of an answer."""
  return getattr(model, "session_items", 1)


def answer(
  model: nn.Module,
  params: Any,
  requests: Batch,
  catalogue: Catalogue,
  index: PrefixIndex,
  key: jax.Array,
  config: AlignmentConfig,
) -> Rollouts:
  """Asks a model. Pure, with static shapes; no gradient passes.

  Args:
    model: generative.
    params: the sampler's parameters.
    requests: with T = 1.
    catalogue: the items.
    index: over the catalogue; may be restricted.
    key: of draws.
    config: `group`, `search`, `constrained`, `temperature`. Sessions are asked
      for by constrained beams alone (checks.py).

  Raises:
    ValueError: free answers from a model whose softmax is constrained.
  """
  arguments = model, params, requests, catalogue, index
  if config.search == "sample":
    drawn = sampling.sample(
      *arguments, key, config.group, config.constrained, config.temperature
    )
    found = Rollouts(
      drawn.items,
      drawn.codes[:, :, None],
      jnp.sum(drawn.log_probability, axis=-1),
      drawn.items > 0,
    )
  elif config.constrained:
    found = _beams(arguments, config.group, session_items(model))
  else:
    best = free_search.free_search(*arguments, config.group)
    found = Rollouts(
      best.items, best.codes[:, :, None], best.scores, best.items > 0
    )
  return jax.lax.stop_gradient(found)


def _beams(arguments: tuple[Any, ...], width: int, size: int) -> Rollouts:
  catalogue = arguments[3]
  if size > 1:
    items, scores = session_search.session_search(*arguments, width)
    each = items
  else:
    items, _, scores = beam_search.beam_search(*arguments, width)
    each = items[:, :, None]
  # Where fewer IDs than beams are allowed, the rest is dead: item 0, -inf.
  legal = (scores > -jnp.inf) & jnp.all(each > 0, axis=-1)
  codes = jnp.take(catalogue.codes, each, axis=0)
  return Rollouts(items, codes, jnp.where(legal, scores, 0.0), legal)


def log_probability(
  model: nn.Module,
  params: Any,
  requests: Batch,
  codes: Int[Array, "B R N L"],
  catalogue: Catalogue,
  index: PrefixIndex,
) -> Float[Array, "B R"]:
  """Of whole answers, teacher-forced, in nats.

  Without dropout, as the sampler has none: a ratio to it would be noise.

  Args:
    model: generative.
    params: of the policy.
    requests: with T = 1.
    codes: of the answers.
    catalogue: the items.
    index: over the catalogue.
  """
  B, R, N, L = codes.shape
  if N == 1:
    found = policy.group_log_probabilities(
      model, params, requests, catalogue, codes[:, :, 0], index
    )
    return jnp.sum(found, axis=-1)
  rows, known = policy.with_codes(
    requests, catalogue, codes.reshape(B, R * N, L)
  )
  found = policy.log_probabilities(model, params, rows, known, index)
  return jnp.sum(found.reshape(B, R, N * L), axis=-1)
