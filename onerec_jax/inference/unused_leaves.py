"""Leaves of the prefix index that a beam has not used yet.

A session has no semantic ID twice: its search (session_search.py) may take an
edge while an unused leaf lies below it.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

from onerec_jax.inference import prefix_index
from onerec_jax.inference.prefix_index import PrefixIndex


def count_leaves(index: PrefixIndex) -> tuple[Int[Array, "*shape"], ...]:
  """How many allowed leaves lie below each edge, level by level.

  Shaped as `index.alive`, with axis B first where it has one.
  """

  def of(alive: Array) -> tuple[Array, ...]:
    counts = [alive.astype(jnp.int32)]
    for parents, above in zip(index.parents[::-1], index.alive[-2::-1]):
      below, edges = counts[-1], above.shape[-1]
      counts.append(jax.ops.segment_sum(below, parents, edges, True))
    return tuple(counts[::-1])

  leaves = index.alive[-1]
  return jax.vmap(of)(leaves) if leaves.ndim == 2 else of(leaves)


def has_unused(
  index: PrefixIndex,
  counts: tuple[Array, ...],
  used: Int[Array, "B W n"],
  level: int,
  edge: Int[Array, "B W fanout"],
) -> Bool[Array, "B W fanout"]:
  """Whether an allowed leaf below an edge is not among those used.

  Args:
    index: the trie.
    counts: `count_leaves(index)`.
    used: allowed leaves of each beam, all different; -1 is none.
    level: of the edges.
    edge: as `prefix_index.children` gives them; False for edge -1.
  """
  above = jnp.maximum(used, 0)
  for parents in index.parents[level:][::-1]:
    above = parents[above]
  # One after the other: all at once would make fanout × n flags a beam.
  spent = sum(
    (above[:, :, None, i] == edge) & (used[:, :, None, i] >= 0)
    for i in range(used.shape[2])
  )
  return (edge >= 0) & (
    prefix_index.lookup(counts[level], jnp.maximum(edge, 0)) > spent
  )
