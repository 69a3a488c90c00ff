"""The prefix index: a trie over the semantic IDs that lead to an item.

An *edge* of level l is a distinct prefix of l + 1 codes; edges of a level are
numbered in lexicographic order, so the children of a node are consecutive. A
*node* of level l is what a prefix of l codes leads to: the root (node 0) for
l = 0, else an edge of level l - 1. An edge of the last level is a *leaf*: one
semantic ID, which several items may share.

A level is stored in one of two ways. Dense: a child for each of the K codes.
Sparse: compressed rows, O(edges) memory, as wide as the largest fan-out. The
index is a pytree whose shapes do not depend on which items are allowed, so a
jitted search takes a restricted index without compiling again.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Int

# Fields hold arrays of the shapes below, but also shapes and shardings inside
# tree maps, so the fields themselves are not checked; functions are.
Leaf = Any

DENSE_LIMIT = 2**22
"""Entries above which a level is never stored densely (16 MiB of int32)."""

DENSE_WASTE = 4
"""A level is dense if K is at most so many times its largest fan-out: a search
looks at K candidates a beam when dense, at the largest fan-out when sparse,
where it pays a gather for them instead."""


@struct.dataclass
class DenseLevel:
  """child: [nodes, K] edge by node and code; -1 where there is none."""

  child: Leaf


@struct.dataclass
class SparseLevel:
  """Compressed rows; the edge is the position in `codes`.

  Attributes:
    offsets: [nodes + 1] first edge of each node.
    codes: [edges] code of each edge, ascending within a node.
    fanout: the most children of any node of the level.
  """

  offsets: Leaf
  codes: Leaf
  fanout: int = struct.field(pytree_node=False)


@struct.dataclass
class PrefixIndex:
  """The trie on device.

  `restrict` changes `alive`, `leaf_item` and `leaf_size`, which then may have
  a leading B axis (another item set for each request), and nothing else.

  Attributes:
    levels: L times a DenseLevel or a SparseLevel.
    parents: L - 1 times [edges of level l + 1], their parent edge.
    items: [I] dense item ids by leaf, the most popular of a leaf first.
    item_leaf: [I] the leaf of each of `items`, ascending.
    alive: L times [edges] whether an allowed item lies below the edge.
    leaf_item: [leaves] the most popular allowed item; 0 if none is allowed.
    leaf_size: [leaves] how many allowed items share the semantic ID.
    codebook_sizes: K of each level.
  """

  levels: tuple[DenseLevel | SparseLevel, ...]
  parents: tuple[Leaf, ...]
  items: Leaf
  item_leaf: Leaf
  alive: tuple[Leaf, ...]
  leaf_item: Leaf
  leaf_size: Leaf
  codebook_sizes: tuple[int, ...] = struct.field(pytree_node=False)

  @property
  def num_levels(self) -> int:
    """L."""
    return len(self.levels)

  @property
  def num_leaves(self) -> int:
    """How many semantic IDs lead to an item, allowed or not."""
    return self.leaf_item.shape[-1]


def build(
  codes: Int[np.ndarray, "rows L"],
  codebook_sizes: Sequence[int],
  popularity: np.ndarray | None = None,
) -> PrefixIndex:
  """Builds the index of a catalogue; sorts once, O(I) memory.

  Args:
    codes: [I + 1, L] semantic IDs by dense item id; row 0 is padding.
    codebook_sizes: K of each level.
    popularity: [I + 1] orders the items that share a semantic ID, the largest
      first; ties and the default go to the lower id.

  Raises:
    ValueError: no items, another number of levels, or a code out of range,
      with its item and level.
  """
  sizes = tuple(int(size) for size in codebook_sizes)
  _check(codes, sizes, popularity)
  # Radix sort on 16-bit columns makes this seconds for 1e7 items.
  keys = [
    codes[1:, level].astype(np.uint16 if size <= 2**16 else np.uint32)
    for level, size in enumerate(sizes)
  ]
  if popularity is not None:
    keys.append(-np.asarray(popularity[1:], np.float64))
  # np.lexsort takes the primary key last.
  primary = keys[: len(sizes)][::-1]
  order = np.lexsort(keys[len(sizes) :] + primary)
  new = np.zeros(len(order), bool)
  new[0] = True
  below = np.zeros(len(order), np.int32)  # node of each item, root first
  levels, parents, alive = [], [], []
  num_nodes = 1
  for level, size in enumerate(sizes):
    column = keys[level][order]
    new[1:] |= column[1:] != column[:-1]
    edge_code, edge_node = column[new].astype(np.int32), below[new]
    levels.append(_level(edge_node, edge_code, num_nodes, size))
    parents.append(edge_node)
    num_nodes = len(edge_code)
    alive.append(np.ones(num_nodes, bool))
    below = np.cumsum(new, dtype=np.int32) - 1
  items = (order + 1).astype(np.int32)
  return jax.tree.map(
    jnp.asarray,
    PrefixIndex(
      levels=tuple(levels),
      parents=tuple(parents[1:]),
      items=items,
      item_leaf=below,
      alive=tuple(alive),
      leaf_item=items[new],
      leaf_size=np.bincount(below).astype(np.int32),
      codebook_sizes=sizes,
    ),
  )


def _check(
  codes: np.ndarray, sizes: tuple[int, ...], popularity: np.ndarray | None
) -> None:
  """Refuses what `build` cannot index."""
  if len(codes) < 2:
    raise ValueError("a prefix index needs an item; codes has no row 1")
  if codes.shape[1] != len(sizes):
    raise ValueError(
      f"codes have {codes.shape[1]} levels, codebook_sizes {len(sizes)}"
    )
  if popularity is not None and len(popularity) != len(codes):
    raise ValueError(
      f"popularity has {len(popularity)} rows, codes {len(codes)}; both have "
      "one for padding and one for each item"
    )
  wrong = (codes[1:] < 0) | (codes[1:] >= np.asarray(sizes)[None, :])
  if wrong.any():
    row, level = np.argwhere(wrong)[0]
    raise ValueError(
      f"item {row + 1} has code {codes[row + 1, level]} at level {level}, "
      f"outside 0..{sizes[level] - 1}; tokenize again or pass the codebook "
      "sizes the codes were made with"
    )


def _level(
  node: np.ndarray, code: np.ndarray, num_nodes: int, size: int
) -> DenseLevel | SparseLevel:
  """One level from its edges, sorted by (node, code)."""
  counts = np.bincount(node, minlength=num_nodes)
  fanout = int(counts.max())
  if num_nodes * size <= DENSE_LIMIT and size <= DENSE_WASTE * fanout:
    child = np.full((num_nodes, size), -1, np.int32)
    child[node, code] = np.arange(len(code), dtype=np.int32)
    return DenseLevel(child)
  offsets = np.zeros(num_nodes + 1, np.int32)
  np.cumsum(counts, out=offsets[1:])
  return SparseLevel(offsets, code, fanout)


def children(
  index: PrefixIndex, level: int, node: Int[Array, "*batch"]
) -> tuple[Int[Array, "*batch fanout"], Int[Array, "*batch fanout"]]:
  """The codes that continue a prefix, allowed or not, and their edges.

  The last axis is K of the level if it is dense (then the codes are 0..K-1),
  else its largest fan-out.

  Args:
    index: the trie.
    level: of the code to come.
    node: where the prefix of `level` codes leads; -1 is no node.

  Returns:
    (codes, child): child is -1 where there is no such continuation, and the
    code there has no meaning, but is one.
  """
  table = index.levels[level]
  here = jnp.maximum(node, 0)
  if isinstance(table, DenseLevel):
    child = jnp.where((node >= 0)[..., None], table.child[here], -1)
    codes = jnp.arange(table.child.shape[1], dtype=jnp.int32)
    return jnp.broadcast_to(codes, child.shape), child
  slots = jnp.arange(table.fanout, dtype=jnp.int32)
  slots = slots.reshape((1,) * node.ndim + (-1,))
  edge = table.offsets[here][..., None] + slots
  exists = edge < table.offsets[here + 1][..., None]
  exists &= (node >= 0)[..., None]
  codes = table.codes[jnp.minimum(edge, table.codes.shape[0] - 1)]
  return codes, jnp.where(exists, edge, -1)


def is_alive(
  index: PrefixIndex, level: int, edge: Int[Array, "*batch"]
) -> Bool[Array, "*batch"]:
  """Whether an allowed item lies below an edge; False for edge -1.

  Args:
    index: the trie; if restricted for each request, `edge` has axis B first.
    level: of the edge.
    edge: edges as `children` gives them.
  """
  flags, here = index.alive[level], jnp.maximum(edge, 0)
  return (edge >= 0) & lookup(flags, here)


def leaf_items(
  index: PrefixIndex, leaf: Int[Array, "*batch"]
) -> Int[Array, "*batch"]:
  """The most popular allowed item of each leaf; 0 for leaf -1."""
  return jnp.where(leaf >= 0, lookup(index.leaf_item, jnp.maximum(leaf, 0)), 0)


def lookup(table: Array, position: Array) -> Array:
  """table[position]; a table with axis B is looked up row by row."""
  if table.ndim == 1:
    return table[position]
  rows = position.reshape(position.shape[0], -1)
  return jnp.take_along_axis(table, rows, axis=1).reshape(position.shape)


def restrict(
  index: PrefixIndex, allowed: Bool[Array, "items"] | Bool[Array, "B items"]
) -> PrefixIndex:
  """Leaves only allowed items reachable; pure, jit-able, same shapes.

  Restricting starts from the whole catalogue: it replaces an earlier
  restriction of `index`.

  Args:
    index: the trie.
    allowed: [I + 1] by dense item id, or one row for each request; then the
      result fits searches of that B only.
  """
  if allowed.ndim == 2:
    alive, item, size = jax.vmap(lambda a: _restricted(index, a))(allowed)
  else:
    alive, item, size = _restricted(index, allowed)
  return index.replace(alive=alive, leaf_item=item, leaf_size=size)


def _restricted(
  index: PrefixIndex, allowed: Bool[Array, "items"]
) -> tuple[tuple[Array, ...], Array, Array]:
  """(alive, leaf_item, leaf_size) for one set of allowed items."""
  kept = allowed[index.items]
  num_items, num_leaves = index.items.shape[0], index.num_leaves
  segments = dict(num_segments=num_leaves, indices_are_sorted=True)
  size = jax.ops.segment_sum(
    kept.astype(jnp.int32), index.item_leaf, **segments
  )
  # Items of a leaf lie in order of popularity: the first kept one is it.
  position = jnp.where(kept, jnp.arange(num_items, dtype=jnp.int32), num_items)
  first = jax.ops.segment_min(position, index.item_leaf, **segments)
  best = index.items[jnp.minimum(first, num_items - 1)]
  alive = [size > 0]
  for level in range(index.num_levels - 1, 0, -1):
    above = index.alive[level - 1].shape[-1]
    alive.append(
      jax.ops.segment_max(
        alive[-1],
        index.parents[level - 1],
        num_segments=above,
        indices_are_sorted=True,
      )
    )
  return tuple(alive[::-1]), jnp.where(size > 0, best, 0), size


def valid_mask(
  index: PrefixIndex, level: int, prefix: Int[Array, "*batch level"]
) -> Bool[Array, "*batch K"]:
  """Which codes continue a prefix to an item, allowed or not.

  For the constrained softmax of teacher-forced prefixes. A prefix that is
  not in the trie has no continuation: its row is all False.

  Args:
    index: the trie.
    level: of the code to come; prefixes have so many codes.
    prefix: the codes before it.
  """
  node = jnp.zeros(prefix.shape[:-1], jnp.int32)
  for above in range(level):
    node = follow(index, above, node, prefix[..., above])
  codes, child = children(index, level, node)
  if isinstance(index.levels[level], DenseLevel):
    return child >= 0
  size = index.codebook_sizes[level]

  def row(codes: Array) -> Array:
    return jnp.zeros(size, bool).at[codes].set(True, mode="drop")

  # vmap keeps the leading axes batch axes of the scatter, so that a sharded
  # batch stays where it is; code K falls off the row's end.
  return jnp.vectorize(row, signature="(m)->(k)")(
    jnp.where(child >= 0, codes, size)
  )


def follow(
  index: PrefixIndex,
  level: int,
  node: Int[Array, "*batch"],
  code: Int[Array, "*batch"],
) -> Int[Array, "*batch"]:
  """Where a prefix leads by its next code; -1 if that continues to no item.

  Args:
    index: the trie.
    level: of the code.
    node: where the prefix of `level` codes leads; -1 is no node.
    code: any code, of the codebook or not.
  """
  table = index.levels[level]
  here = jnp.maximum(node, 0)
  if isinstance(table, DenseLevel):
    inside = (code >= 0) & (code < table.child.shape[1])
    edge = table.child[here, jnp.where(inside, code, 0)]
    return jnp.where((node >= 0) & inside, edge, -1)
  low, end = table.offsets[here], table.offsets[here + 1]
  high, last = end, table.codes.shape[0] - 1
  # Binary search for the first code not below the one sought; a node has at
  # most `fanout` children, so the number of halvings is static.
  for _ in range(math.ceil(math.log2(table.fanout + 1))):
    middle = (low + high) // 2
    right = table.codes[jnp.minimum(middle, last)] < code
    low, high = (
      jnp.where(right & (low < high), middle + 1, low),
      jnp.where(right, high, middle),
    )
  found = (low < end) & (table.codes[jnp.minimum(low, last)] == code)
  return jnp.where((node >= 0) & found, low, -1)
