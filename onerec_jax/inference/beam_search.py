"""Constrained beam search over semantic IDs, and the exact search beside it.

OneRec-V2 (arXiv 2508.20900, §3.7) generates with beam 512 and no more than
sums of log-probabilities; how illegal IDs are kept out is not described.
INFERRED: the search walks a prefix index, so that every answer is an item;
no length penalty, as all IDs have L codes.

A score is the model's log-probability of the semantic ID. Restricting the
allowed items hides candidates and does not change the scores of the others.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.custom_partitioning import custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.inference import prefix_index
from onerec_jax.inference.prefix_index import PrefixIndex

Params = Any
Cache = Any


def top_k(
  scores: Float[Array, "B N"], k: int
) -> tuple[Float[Array, "B k"], Int[Array, "B k"]]:
  """`lax.top_k` of each row, on the devices where the rows lie.

  Outside TPUs the compiler's own rule gathers all rows on every device; the
  TPU compiler does not, and has no custom partitioning.
  """
  return jax.lax.platform_dependent(
    scores,
    tpu=lambda x: tuple(jax.lax.top_k(x, k)),
    default=lambda x: _local_top_k(x, k),
  )


@functools.partial(custom_partitioning, static_argnums=(1,))
def _local_top_k(scores, k):
  return tuple(jax.lax.top_k(scores, k))


def _partition_top_k(k, mesh, arguments, results):
  del results
  spec = arguments[0].sharding.spec
  rows = spec[0] if len(spec) else None
  of_rows = NamedSharding(mesh, PartitionSpec(rows, None))
  local = lambda x: tuple(jax.lax.top_k(x, k))
  return mesh, local, (of_rows, of_rows), (of_rows,)


_local_top_k.def_partition(
  partition=_partition_top_k,
  sharding_rule="b n -> b k, b k",
  need_replication_factors=("n", "k"),
)


def beam_search(
  model: nn.Module,
  params: Params,
  batch: Batch,
  catalogue: Catalogue,
  index: PrefixIndex,
  width: int,
) -> tuple[Int[Array, "B W"], Int[Array, "B W"], Float[Array, "B W"]]:
  """The `width` best semantic IDs of each row found by beam search.

  Pure and with static shapes: jit it over params, batch, catalogue and index.
  The beams of a row share its context; only the cache of the L generated
  positions has a beam axis.

  Args:
    model: generative, with `encode`, `decode_step`, `constrained_softmax`.
    params: its parameters.
    batch: rows with T = 1.
    catalogue: what `encode` needs of the items.
    index: over the catalogue; may be restricted (`prefix_index.restrict`).
    width: W; the answer has min(W, what the trie's shape allows) columns.

  Returns:
    (items, leaves, scores), best first; scores are log-probabilities in
    float32. Where fewer semantic IDs are allowed than there are columns, the
    rest has item 0, leaf -1 and score -inf.
  """
  variables = {"params": params}
  context = model.apply(variables, batch, catalogue, method="encode")
  rows = batch.items.shape[0]
  scores = jnp.zeros((rows, 1), jnp.float32)
  node = jnp.zeros((rows, 1), jnp.int32)
  previous = cache = None
  for level in range(index.num_levels):
    logits, cache = model.apply(
      variables, level, previous, cache, context, method="decode_step"
    )
    scores, node, previous, parent = expand(
      index,
      level,
      logits,
      scores,
      node,
      width,
      model.constrained_softmax,
      functools.partial(prefix_index.is_alive, index, level),
    )
    if level + 1 < index.num_levels:
      cache = reorder(cache, parent)
  return prefix_index.leaf_items(index, node), node, scores


def expand(
  index: PrefixIndex,
  level: int,
  logits: Float[Array, "B W K"],
  scores: Float[Array, "B W"],
  node: Int[Array, "B W"],
  width: int,
  constrained: bool,
  alive: Callable[[Int[Array, "B W fanout"]], Bool[Array, "B W fanout"]],
) -> tuple[
  Float[Array, "B V"], Int[Array, "B V"], Int[Array, "B V"], Int[Array, "B V"]
]:
  """One level of the search: the best continuations of all beams.

  Args:
    index: the trie.
    level: of the code to come.
    logits: of each beam for that code.
    scores: of each beam; -inf is a dead one.
    node: where each beam is in the trie; -1 is nowhere.
    width: the most beams to keep.
    constrained: softmax over the codes that continue to an item.
    alive: which edges of the level a beam may take.

  Returns:
    (scores, node, code, parent) of V ≤ width beams, best first. Dead ones
    have score -inf and node -1.
  """
  codes, child, gain = continuations(index, level, node, logits, constrained)
  total = jnp.where(alive(child), scores[:, :, None] + gain, -jnp.inf)
  rows, beams, fanout = total.shape
  scores, chosen = top_k(total.reshape(rows, -1), min(width, beams * fanout))
  node = jnp.where(scores > -jnp.inf, _pick(child, chosen), -1)
  return scores, node, _pick(codes, chosen), chosen // fanout


def continuations(
  index: PrefixIndex,
  level: int,
  node: Int[Array, "B W"],
  logits: Float[Array, "B W K"],
  constrained: bool,
) -> tuple[
  Int[Array, "B W fanout"], Int[Array, "B W fanout"], Float[Array, "B W fanout"]
]:
  """What may follow each prefix, allowed or not, and how likely it is.

  Args:
    index: the trie.
    level: of the code to come.
    node: where each prefix leads; -1 is nowhere.
    logits: for that code.
    constrained: softmax over the codes that continue to an item.

  Returns:
    (codes, child) as of `prefix_index.children`, and log-probabilities in
    float32, -inf where child is -1.
  """
  codes, child = prefix_index.children(index, level, node)
  # Codes of a dense level are 0..K-1: nothing to gather.
  asked = None if _is_dense(index, level) else codes
  return codes, child, _log_probability(logits, asked, child >= 0, constrained)


def _is_dense(index: PrefixIndex, level: int) -> bool:
  return isinstance(index.levels[level], prefix_index.DenseLevel)


def _pick(
  values: Int[Array, "B W fanout"], chosen: Int[Array, "B V"]
) -> Int[Array, "B V"]:
  """The chosen ones of all beams' continuations."""
  flat = values.reshape(values.shape[0], -1)
  return jnp.take_along_axis(flat, chosen, axis=1)


def reorder(cache: Cache, parent: Int[Array, "B V"]) -> Cache:
  """Gives each new beam its parent's cache; leaves are [layers, B, W, ...]."""
  # vmap over B keeps B a batch axis of the gather: no communication when
  # rows are spread over devices.
  take = jax.vmap(
    lambda values, p: jnp.take(values, p, axis=1), in_axes=(1, 0), out_axes=1
  )
  return jax.tree.map(lambda values: take(values, parent), cache)


def _log_probability(
  logits: Float[Array, "*batch K"],
  codes: Int[Array, "*batch fanout"] | None,
  valid: Bool[Array, "*batch fanout"],
  constrained: bool,
) -> Float[Array, "*batch fanout"]:
  """Log-probabilities of continuations; -inf where not valid.

  Args:
    logits: of one level.
    codes: which of the K are asked for; None: all.
    valid: whether such a continuation exists.
    constrained: normalise over the valid continuations, not over all K.
  """
  # float32: a bfloat16 score has 8 bits of mantissa, so beams whose
  # log-probabilities differ by less than 1% would tie, and sums would drift.
  logits = logits.astype(jnp.float32)
  asked = (
    logits if codes is None else jnp.take_along_axis(logits, codes, axis=-1)
  )
  if constrained:
    # The least float, not -inf: a dead beam has no valid continuation at all,
    # and its sum must not be NaN.
    kept = jnp.where(valid, asked, jnp.finfo(jnp.float32).min)
  else:
    kept = logits
  total = jax.nn.logsumexp(kept, axis=-1, keepdims=True)
  return jnp.where(valid, asked - total, -jnp.inf)


def check_softmax(model: nn.Module) -> None:
  """Raises ValueError where IDs that are no items have no probability."""
  if model.constrained_softmax:
    raise ValueError(
      "IDs that may be no items need a model with a softmax over all codes: "
      "train it with model.constrained_softmax=False"
    )


def exact_scores(
  model: nn.Module,
  params: Params,
  batch: Batch,
  catalogue: Catalogue,
  index: PrefixIndex,
  items: Int[Array, "B N"],
  chunk: int = 1024,
) -> Float[Array, "B N"]:
  """The model's log-probability of given items, one by one.

  Teacher-forced through the model's `__call__`: what training sees, and an
  oracle for the search. Costs N / T of a training step's decoder work.

  Args:
    model: generative.
    params: its parameters.
    batch: rows with T = 1; their targets are not looked at.
    catalogue: the items' codes.
    index: for the constrained softmax.
    items: dense ids; 0 scores -inf.
    chunk: items of a row scored at once; memory is B · chunk · K.
  """
  rows, count = items.shape
  chunk = min(chunk, count)
  padded = jnp.pad(items, ((0, 0), (0, -count % chunk)))
  pieces = jnp.swapaxes(padded.reshape(rows, -1, chunk), 0, 1)

  def score(piece: Int[Array, "B T"]) -> Float[Array, "B T"]:
    logits = model.apply(
      {"params": params},
      batch.replace(
        targets=piece,
        visible_from=jnp.broadcast_to(batch.visible_from, piece.shape),
        visible_until=jnp.broadcast_to(batch.visible_until, piece.shape),
      ),
      catalogue,
    )
    codes = catalogue.codes[piece]
    total = jnp.zeros(piece.shape, jnp.float32)
    for level, of_level in enumerate(logits):
      valid = prefix_index.valid_mask(index, level, codes[..., :level])
      gain = _log_probability(of_level, None, valid, model.constrained_softmax)
      asked = codes[..., level : level + 1]
      total += jnp.take_along_axis(gain, asked, axis=-1)[..., 0]
    return jnp.where(piece > 0, total, -jnp.inf)

  scores = jnp.swapaxes(jax.lax.map(score, pieces), 0, 1)
  return scores.reshape(rows, -1)[:, :count]


def exact_search(
  model: nn.Module,
  params: Params,
  batch: Batch,
  catalogue: Catalogue,
  index: PrefixIndex,
  width: int,
  chunk: int = 1024,
) -> tuple[Int[Array, "B W"], Int[Array, "B W"], Float[Array, "B W"]]:
  """What `beam_search` approximates: scores every allowed semantic ID.

  Arguments and results as there; `chunk` as in `exact_scores`.
  """
  rows = batch.items.shape[0]
  items = jnp.broadcast_to(
    jnp.atleast_2d(index.leaf_item), (rows, index.num_leaves)
  )
  scores = exact_scores(model, params, batch, catalogue, index, items, chunk)
  best, leaf = top_k(scores, min(width, index.num_leaves))
  leaf = jnp.where(best > -jnp.inf, leaf, -1)
  return prefix_index.leaf_items(index, leaf), leaf, best
