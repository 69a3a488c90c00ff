"""One retrieval function for every kind of model.

A generative model answers by beam search (of items or of whole sessions), an
item-scoring model by the best of its scores; recommender and evaluation do not
see the difference.
"""

from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.inference import beam_search, prefix_index, session_search
from onerec_jax.inference.prefix_index import PrefixIndex

Params = Any
Retrieve = Callable[..., tuple[Array, Array]]
"""(params, batch, catalogue, allowed=None) → (items, scores), see below."""


def make_retrieve(model: nn.Module, index: Any, width: int) -> Retrieve:
  """The candidates of each row by a model: `retrieve` below, jitted.

  `retrieve(params, batch, catalogue, allowed=None)` returns (items [B, W'],
  scores [B, W']), best first, W' ≤ width; where fewer items are allowed,
  item 0 with score -inf. `batch` has T = 1. `allowed` is Bool[I + 1], or
  Bool[B, I + 1] with a set for each request; another set of the same shape
  does not compile again. Semantic IDs that several items share answer with
  their most popular allowed item. A session model gives the items of its best
  sessions, as they first appear (session_search.item_list).

  Args:
    model: item-scoring (has `item_scores`) or generative.
    index: a PrefixIndex over the catalogue; item-scoring models read none.
    width: the beam width, or how many of the best items.

  Raises:
    ValueError: a generative model without an index.
  """
  if hasattr(model, "item_scores"):
    score = jax.jit(
      lambda params, batch, catalogue, allowed: best_items(
        model, params, batch, catalogue, width, allowed
      )
    )
    return lambda params, batch, catalogue, allowed=None: score(
      params, batch, catalogue, allowed
    )
  if index is None:
    raise ValueError(
      f"{type(model).__name__} generates semantic IDs and needs a prefix "
      "index; make one with prefix_index.build"
    )

  @jax.jit
  def generate(
    params: Params,
    batch: Batch,
    catalogue: Catalogue,
    # An argument: as a constant it would be copied into the program.
    index: PrefixIndex,
    allowed: Array | None,
  ) -> tuple[Array, Array]:
    if allowed is not None:
      index = prefix_index.restrict(index, allowed)
    arguments = model, params, batch, catalogue, index, width
    if hasattr(model, "session_items"):
      return session_search.item_list(*arguments)
    items, _, scores = beam_search.beam_search(*arguments)
    return items, scores

  return lambda params, batch, catalogue, allowed=None: generate(
    params, batch, catalogue, index, allowed
  )


def best_items(
  model: nn.Module,
  params: Params,
  batch: Batch,
  catalogue: Catalogue,
  width: int,
  allowed: Bool[Array, "items"] | Bool[Array, "B items"] | None = None,
) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
  """The best items of an item-scoring model; pure, jit-able.

  Arguments and results as in `make_retrieve`.
  """
  scores = model.apply(
    {"params": params}, batch, catalogue, method="item_scores"
  )[:, 0].astype(jnp.float32)
  keep = (jnp.arange(scores.shape[1]) > 0)[None, :]
  if allowed is not None:
    keep = keep & jnp.atleast_2d(allowed)
  scores = jnp.where(keep, scores, -jnp.inf)
  scores, items = beam_search.top_k(scores, min(width, scores.shape[1] - 1))
  return jnp.where(scores > -jnp.inf, items, 0), scores


def finish(
  items: Int[np.ndarray, "B W"],
  scores: Float32[np.ndarray, "B W"],
  seen: Sequence[np.ndarray],
  k: int,
  filter_seen: bool,
) -> tuple[Int[np.ndarray, "B k"], Float32[np.ndarray, "B k"]]:
  """The first k of each row's candidates, on the host.

  Args:
    items: candidates, best first; 0 is none.
    scores: their scores.
    seen: for each row the dense ids of its history; only for filtering.
    k: how many.
    filter_seen: drop the items in `seen`.

  Returns:
    (items, scores); a row with fewer than k left ends with item 0 and score
    -inf.
  """
  keep = items > 0
  if filter_seen:
    # Row and item in one number, so that one look-up serves all rows.
    stride = 1 + max([int(items.max(initial=0)), *map(_largest, seen)])
    rows = np.arange(len(items), dtype=np.int64)
    owner = np.repeat(rows, [len(s) for s in seen])
    known = owner * stride + np.concatenate([*seen, np.zeros(0, np.int64)])
    keep &= ~np.isin(rows[:, None] * stride + items, known)
  first = np.argsort(~keep, axis=1, kind="stable")[:, :k]
  keep = np.take_along_axis(keep, first, axis=1)
  chosen = np.where(keep, np.take_along_axis(items, first, axis=1), 0)
  value = np.where(keep, np.take_along_axis(scores, first, axis=1), -np.inf)
  missing = ((0, 0), (0, k - first.shape[1]))
  return (
    np.pad(chosen, missing),
    np.pad(value, missing, constant_values=-np.inf).astype(np.float32),
  )


def _largest(ids: np.ndarray) -> int:
  return int(ids.max(initial=0))
