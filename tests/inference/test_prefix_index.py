"""The prefix index against a trie of Python dicts."""

from unittest import mock

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from onerec_jax.inference import prefix_index, unused_leaves


def catalogue(seed, depth, num_items):
  """Random codes [I + 1, L] with another K at each level, and popularity."""
  rng = np.random.default_rng(seed)
  sizes = rng.integers(1, 7, depth)
  codes = rng.integers(0, sizes, (num_items + 1, depth)).astype(np.int32)
  codes[0] = 0
  return codes, tuple(sizes.tolist()), rng.integers(0, 3, num_items + 1)


def trie(codes):
  """prefix → the codes that continue it, sorted; and sid → items."""
  follow, groups = {}, {}
  for item, sid in enumerate(codes.tolist()[1:], start=1):
    groups.setdefault(tuple(sid), []).append(item)
    for level, code in enumerate(sid):
      follow.setdefault(tuple(sid[:level]), set()).add(code)
  return {p: sorted(c) for p, c in follow.items()}, groups


def built(codes, sizes, popularity=None, dense=True):
  with mock.patch.object(
    prefix_index, "DENSE_LIMIT", prefix_index.DENSE_LIMIT if dense else 0
  ):
    return prefix_index.build(codes, sizes, popularity)


@jax.jit
def expand(index):
  """Everything below the root: (codes, edges) of each level, and items."""
  found, node = [], jnp.zeros(1, jnp.int32)
  for level in range(index.num_levels):
    codes, child = prefix_index.children(index, level, node)
    node = jnp.where(prefix_index.is_alive(index, level, child), child, -1)
    found.append((codes, node))
    node = node.reshape(-1)
  return found, prefix_index.leaf_items(index, node)


def walk(index):
  """{prefix: edge} of each level, and {semantic ID: item}."""
  found, items = jax.tree.map(np.asarray, expand(index))
  levels, prefixes = [], {0: ()}
  for codes, edges in found:
    below, fanout = {}, edges.shape[1]
    for row, slot in np.argwhere(edges >= 0).tolist():
      prefix = (*prefixes[row], int(codes[row, slot]))
      below[row * fanout + slot] = prefix
    assert len(set(below.values())) == len(below)
    flat = edges.reshape(-1)
    levels.append({prefix: flat[place] for place, prefix in below.items()})
    prefixes = below
  return levels, {prefix: items[place] for place, prefix in prefixes.items()}


cases = dict(
  seed=st.integers(0, 2**31),
  depth=st.integers(1, 5),
  num_items=st.integers(1, 40),
  dense=st.booleans(),
)


@jax.jit
def look_up(index, prefixes, allowed):
  """(masks below prefixes, nodes along them, what is left of the index)."""
  node, nodes, masks = jnp.zeros(len(prefixes), jnp.int32), [], []
  for level in range(index.num_levels):
    below = prefixes.reshape(2, 32, -1)[..., :level]
    masks.append(prefix_index.valid_mask(index, level, below))
    node = prefix_index.follow(index, level, node, prefixes[:, level])
    nodes.append(node)
  return (
    masks,
    jnp.stack(nodes, axis=1),
    prefix_index.restrict(index, allowed),
  )


@hypothesis.settings(max_examples=8, deadline=None)
@hypothesis.given(**cases)
def test_it_is_the_trie(seed, depth, num_items, dense):
  """All that is asked of one index, for the price of compiling it once."""
  codes, sizes, popularity = catalogue(seed, depth, num_items)
  follow, groups = trie(codes)
  index = built(codes, sizes, popularity, dense)
  levels, items = walk(index)
  assert_walked(levels, items, index, follow, groups, popularity)

  rng = np.random.default_rng(seed + 1)
  # True prefixes beside random ones, of which most are not in the trie, and
  # codes outside the codebook.
  prefixes = np.concatenate(
    [codes[1:], rng.integers(-1, np.asarray(sizes) + 1, (24, depth))]
  ).astype(np.int32)
  prefixes = np.resize(prefixes, (64, depth))
  allowed = rng.random(num_items + 1) < 0.4
  masks, nodes, smaller = look_up(index, prefixes, allowed)
  prefixes = [tuple(prefix) for prefix in prefixes.tolist()]
  for level, mask in enumerate(map(np.asarray, masks)):
    assert mask.shape == (2, 32, sizes[level])
    for prefix, of_prefix in zip(prefixes, mask.reshape(64, -1)):
      want = follow.get(prefix[:level], [])
      assert np.flatnonzero(of_prefix).tolist() == want
  # To the leaves, and to nowhere by codes that nothing has.
  for prefix, found in zip(prefixes, np.asarray(nodes).tolist()):
    for level, node in enumerate(found):
      assert node == levels[level].get(prefix[: level + 1], -1)
  assert_restricted(smaller, index, allowed, groups, popularity)


def assert_walked(levels, items, index, follow, groups, popularity):
  """All semantic IDs, their most popular items, and how many there are."""
  for level, prefixes in enumerate(levels):
    want = {p + (c,) for p in follow if len(p) == level for c in follow[p]}
    assert set(prefixes) == want
  leaves, sizes = levels[-1], np.asarray(index.leaf_size)
  assert sorted(leaves.values()) == list(range(len(groups)))
  for sid, group in groups.items():
    assert items[sid] == min(group, key=lambda i: (-popularity[i], i))
    assert sizes[leaves[sid]] == len(group)


def assert_restricted(smaller, index, allowed, groups, popularity):
  """Its walk is that of the allowed items, in arrays of the same shapes."""
  kept = np.flatnonzero(allowed[1:]) + 1
  groups = {s: [i for i in g if i in kept] for s, g in groups.items()}
  groups = {s: g for s, g in groups.items() if g}
  _, items = walk(smaller)
  assert items == {
    sid: min(group, key=lambda i: (-popularity[i], i))
    for sid, group in groups.items()
  }
  assert np.asarray(smaller.leaf_size).sum() == len(kept)
  assert jax.tree.structure(smaller) == jax.tree.structure(index)
  for new, old in zip(jax.tree.leaves(smaller), jax.tree.leaves(index)):
    assert (new.shape, new.dtype) == (old.shape, old.dtype)


def test_a_set_for_each_request_equals_each_set_alone():
  codes, sizes, popularity = catalogue(3, 3, 40)
  index = built(codes, sizes, popularity)
  allowed = jnp.asarray(np.random.default_rng(0).random((4, 41)) < 0.3)
  edge = jnp.asarray([[0, 1, -1], [5, 2, 0], [3, 3, 4], [-1, 1, 2]])

  @jax.jit
  def look(allowed, edge):
    restricted = prefix_index.restrict(index, allowed)
    alive = [prefix_index.is_alive(restricted, i, edge) for i in range(3)]
    return jnp.stack(alive), prefix_index.leaf_items(restricted, edge)

  alive, items = look(allowed, edge)
  assert 0 < np.asarray(alive).sum() < alive.size
  for row in range(4):
    alone, item = look(allowed[row], edge[row])
    np.testing.assert_array_equal(alive[:, row], alone)
    np.testing.assert_array_equal(items[row], item)


def test_no_node_has_no_children():
  codes, sizes, _ = catalogue(1, 3, 30)

  @jax.jit
  def below(index):
    edges = jnp.asarray([-1, 0])
    return [prefix_index.children(index, level, edges)[1] for level in range(3)]

  for dense in (True, False):
    for child in below(built(codes, sizes, dense=dense)):
      assert (np.asarray(child[0]) == -1).all()
      assert (np.asarray(child[1]) >= 0).any()


def test_large_codebooks_stay_sparse():
  rng = np.random.default_rng(0)
  codes = rng.integers(0, 8192, (20_001, 3)).astype(np.int32)
  index = prefix_index.build(codes, (8192,) * 3)
  assert isinstance(index.levels[0], prefix_index.DenseLevel)
  size = sum(x.size for x in jax.tree.leaves(index))
  # Root's table, and per item: offsets, codes, parents, alive, leaves.
  assert size < 8192 + 20_000 * 14
  some = jnp.asarray(codes[1:51])
  masks = jax.jit(
    lambda index, codes: [
      prefix_index.valid_mask(index, level, codes[:, :level])
      for level in (1, 2)
    ]
  )(index, some)
  for level, mask in zip((1, 2), masks):
    want = np.unique(codes[1:, : level + 1], axis=0)
    for row in range(50):
      same = (want[:, :level] == codes[row + 1, :level]).all(axis=1)
      found = np.flatnonzero(np.asarray(mask[row]))
      np.testing.assert_array_equal(found, want[same, level])


@pytest.mark.parametrize(
  ("codes", "sizes", "popularity", "message"),
  [
    ([[0, 0]], (4, 4), None, "needs an item"),
    ([[0, 0], [1, 2]], (4,), None, "2 levels, codebook_sizes 1"),
    ([[0, 0], [1, 2], [3, 4]], (4, 4), None, "item 2 has code 4 at level 1"),
    ([[0, 0], [-1, 2]], (4, 4), None, "item 1 has code -1 at level 0"),
    ([[0, 0], [1, 2]], (4, 4), [1.0], "popularity has 1 rows"),
  ],
)
def test_build_says_what_is_wrong(codes, sizes, popularity, message):
  with pytest.raises(ValueError, match=message):
    prefix_index.build(
      np.asarray(codes, np.int32),
      sizes,
      None if popularity is None else np.asarray(popularity),
    )


@hypothesis.settings(max_examples=3, deadline=None)
@hypothesis.given(**cases)
def test_leaves_that_are_not_used_yet(seed, depth, num_items, dense):
  """Counts of allowed leaves, and edges with one left, against prefixes."""
  codes, sizes, _ = catalogue(seed, depth, num_items)
  rng = np.random.default_rng(seed)
  allowed = rng.random((2, num_items + 1)) < 0.6
  index = built(codes, sizes, dense=dense)
  levels, _ = walk(index)
  sids = [
    {tuple(codes[i]) for i in range(1, num_items + 1) if row[i]}
    for row in allowed
  ]
  # Two beams a request: one has used nothing, one some of what is allowed.
  leaf = levels[-1]
  used = np.full((2, 2, 3), -1, np.int32)
  spent = [[set(), set(sorted(s)[:3])] for s in sids]
  for row in range(2):
    for place, sid in enumerate(sorted(spent[row][1])):
      used[row, 1, place] = leaf[sid]
  edges = [np.asarray([*of.values(), -1], np.int32) for of in levels]

  @jax.jit
  def ask(index, allowed, used):
    restricted = prefix_index.restrict(index, allowed)
    counts = unused_leaves.count_leaves(restricted)
    return counts, [
      unused_leaves.has_unused(
        restricted,
        counts,
        used,
        level,
        jnp.broadcast_to(edge, (2, 2, len(edge))),
      )
      for level, edge in enumerate(edges)
    ]

  counts, unused = ask(index, allowed, used)
  for level, found in enumerate(unused):
    prefixes = list(levels[level])
    for row, beam in np.ndindex(2, 2):
      left = sids[row] - spent[row][beam]
      below = lambda p, sids: sum(s[: len(p)] == p for s in sids)
      want = [below(p, left) > 0 for p in prefixes] + [False]
      assert np.asarray(found[row, beam]).tolist() == want
      got = np.asarray(counts[level])[row, edges[level][:-1]].tolist()
      assert got == [below(p, sids[row]) for p in prefixes]
