"""Beam search of whole sessions (OneRec, arXiv 2502.18965 §1.5-1.6).

OneRec generates its m items by beam search (width 128) over their m · L codes.
A score is the model's log-probability of the session, the sum of all its
codes'. INFERRED: the search walks the prefix index m times, so that every
answer is m items, and no semantic ID comes twice in a session. As in
beam_search.py this hides candidates and does not change others' scores.
"""

import functools
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.inference import beam_search, prefix_index, unused_leaves
from onerec_jax.inference.prefix_index import PrefixIndex

Params = Any


def session_search(
  model: nn.Module,
  params: Params,
  batch: Batch,
  catalogue: Catalogue,
  index: PrefixIndex,
  width: int,
) -> tuple[Int[Array, "B W m"], Float[Array, "B W"]]:
  """The `width` best sessions of each row found by beam search.

  Pure and with static shapes: jit it over params, batch, catalogue and index.
  The beams of a row share its context; only the cache of the m(L + 1)
  generated positions has a beam axis.

  Args:
    model: generative, with `session_items`, `encode`, `constrained_softmax`
      and a `decode_step` over m · L steps.
    params: its parameters.
    batch: rows with T = 1.
    catalogue: what `encode` needs of the items.
    index: over the catalogue; may be restricted (`prefix_index.restrict`).
    width: W; the answer has at most so many sessions.

  Returns:
    (items, scores), best first; scores are log-probabilities in float32.
    Where fewer than m semantic IDs are allowed, sessions hold all of them and
    end with item 0. Where fewer sessions are possible than there are columns,
    the rest has no items and score -inf.
  """
  items, scores, _ = _search(model, params, batch, catalogue, index, width)
  return items, scores


def _search(
  model, params, batch, catalogue, index, width
) -> tuple[Array, Array, tuple[Array, Array]]:
  """`session_search`, and the beam of its first items and their scores."""
  variables = {"params": params}
  context = model.apply(variables, batch, catalogue, method="encode")
  counts = unused_leaves.count_leaves(index)
  rows, levels = batch.items.shape[0], index.num_levels
  scores = jnp.zeros((rows, 1), jnp.float32)
  used = jnp.zeros((rows, 1, 0), jnp.int32)
  previous = cache = None
  for place in range(model.session_items):
    before = scores, used
    node = jnp.zeros(scores.shape, jnp.int32)
    for level in range(levels):
      step = place * levels + level
      logits, cache = model.apply(
        variables, step, previous, cache, context, method="decode_step"
      )
      scores, node, previous, parent = beam_search.expand(
        index, level, logits, scores, node, width, model.constrained_softmax,
        functools.partial(unused_leaves.has_unused, index, counts, used, level),
      )  # fmt: skip
      used = _of_parents(used, parent)
      if step + 1 < model.session_items * levels:
        cache = beam_search.reorder(cache, parent)
    used = jnp.concatenate([used, node[:, :, None]], axis=2)
    if place:
      scores, used = _unless_exhausted(scores, used, *before)
    else:
      first = prefix_index.leaf_items(index, node), scores
  leaves = jnp.where((scores > -jnp.inf)[:, :, None], used, -1)
  items = prefix_index.leaf_items(index, leaves.reshape(rows, -1))
  return items.reshape(used.shape), scores, first


def _of_parents(
  used: Int[Array, "B W n"], parent: Int[Array, "B V"]
) -> Int[Array, "B V n"]:
  """The leaves that each new beam's parent has used."""
  return jnp.take_along_axis(used, parent[:, :, None], axis=1)


def _unless_exhausted(
  scores: Float[Array, "B W"],
  used: Int[Array, "B W n"],
  old_scores: Float[Array, "B V"],
  old_used: Int[Array, "B V m"],
) -> tuple[Float[Array, "B W"], Int[Array, "B W n"]]:
  """Rows that had no further item for any beam keep the sessions they had.

  All beams of a row have used equally many of the same allowed leaves, so
  they come to their end together.
  """
  more = ((0, 0), (0, scores.shape[1] - old_scores.shape[1]))
  old_scores = jnp.pad(old_scores, more, constant_values=-jnp.inf)
  old_used = jnp.pad(old_used, (*more, (0, 1)), constant_values=-1)
  lives = jnp.any(scores > -jnp.inf, axis=1, keepdims=True)
  return (
    jnp.where(lives, scores, old_scores),
    jnp.where(lives[:, :, None], used, old_used),
  )


def item_list(
  model: nn.Module,
  params: Params,
  batch: Batch,
  catalogue: Catalogue,
  index: PrefixIndex,
  width: int,
) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
  """The items of the best sessions, so that a session model ranks items too.

  The items of the best session in its order, then those of the next ones as
  they first appear, each with the score of the session that brought it. The
  first m are therefore the best session. The best sessions are much of the
  same items in other orders; INFERRED: after them come the items that sessions
  might have begun with, best first, each with its own log-probability added
  to the score of the worst session, so that a list is as long as it can be.

  Arguments as in `session_search`.

  Returns:
    (items, scores), at most `width` of them; the rest has item 0 and score
    -inf.
  """
  sessions, scores, (begun, of_first) = _search(
    model, params, batch, catalogue, index, width
  )
  found = scores > -jnp.inf
  worst = jnp.min(jnp.where(found, scores, 0.0), axis=1, keepdims=True)
  items = sessions.reshape(sessions.shape[0], -1)
  scores = jnp.repeat(scores, sessions.shape[2], axis=1)
  items = jnp.concatenate([items, begun], axis=1)
  scores = jnp.concatenate([scores, worst + of_first], axis=1)
  keep = _is_first(items) & (items > 0) & (scores > -jnp.inf)
  first = jnp.argsort(~keep, axis=1, stable=True)[:, :width]
  keep, items, scores = (
    jnp.take_along_axis(x, first, axis=1) for x in (keep, items, scores)
  )
  return jnp.where(keep, items, 0), jnp.where(keep, scores, -jnp.inf)


def _is_first(items: Int[Array, "B N"]) -> Array:
  """Whether each item stands in no place of its row before."""
  order = jnp.argsort(items, axis=1, stable=True)
  ordered = jnp.take_along_axis(items, order, axis=1)
  new = jnp.diff(ordered, axis=1, prepend=-1) != 0
  back = jnp.argsort(order, axis=1)
  return jnp.take_along_axis(new, back, axis=1)
