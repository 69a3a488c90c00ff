"""Beam search against brute force and against a beam of Python lists.

The oracles read one table: the teacher-forced logits of every item. They use
neither the decoding step nor the prefix index.
"""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from onerec_jax.data.batch import Batch, Catalogue, visible
from onerec_jax.inference import beam_search, prefix_index


class Toy(nn.Module):
  """A small generative model; earlier codes reach it by the cache alone."""

  codebook_sizes: tuple[int, ...]
  num_items: int
  constrained_softmax: bool = True
  d_model: int = 8

  def setup(self):
    self.item = nn.Embed(self.num_items + 1, self.d_model)
    self.code = [nn.Embed(k, self.d_model) for k in self.codebook_sizes]
    self.mix = [nn.Dense(self.d_model) for _ in self.codebook_sizes]
    self.head = [nn.Dense(k) for k in self.codebook_sizes]

  def _logits(self, level, history, codes):
    # codes: [B, W, L, D], zeros from this level on.
    weight = 2.0 ** jnp.arange(codes.shape[2])[None, None, :, None]
    x = history + (codes * weight).sum(axis=2)
    return 3 * self.head[level](jnp.tanh(3 * self.mix[level](x)))

  def _history(self, events, mask):
    seen = mask.astype(jnp.float32)
    total = jnp.einsum("BTS,BSD->BTD", seen, events)
    return total / jnp.maximum(seen.sum(-1, keepdims=True), 1.0)

  def encode(self, batch, catalogue):
    return self._history(self.item(batch.items), visible(batch))

  def decode_step(self, level, previous, cache, context):
    if level == 0:
      levels = len(self.codebook_sizes)
      cache = jnp.zeros((1, context.shape[0], 1, levels, self.d_model))
    else:
      new = self.code[level - 1](previous)
      cache = cache.at[0, :, :, level - 1].set(new)
    return self._logits(level, context, cache[0]), cache

  def __call__(self, batch, catalogue):
    history = self.encode(batch, catalogue)
    codes = catalogue.codes[batch.targets]
    given = jnp.stack(
      [e(codes[..., i]) for i, e in enumerate(self.code)], axis=2
    )
    levels = jnp.arange(len(self.codebook_sizes))
    return tuple(
      self._logits(
        level, history, given * (levels < level)[None, None, :, None]
      )
      for level in range(len(self.codebook_sizes))
    )


def rows(num_items, num_rows=3, length=6, seed=0):
  """Batches of one history a row; the last one is empty."""
  rng = np.random.default_rng(seed)
  items = rng.integers(1, num_items + 1, (num_rows, length))
  items[:, 0] = 0
  items[-1, 1:] = 0
  segment = (np.arange(length)[None] < [[length]] * num_rows).astype(np.int32)
  segment[-1, 1:] = 0
  until = segment.sum(axis=1, keepdims=True)
  return Batch(
    items=jnp.asarray(items, jnp.int32),
    segment=jnp.asarray(segment),
    features={},
    targets=jnp.zeros((num_rows, 1), jnp.int32),
    visible_from=jnp.zeros((num_rows, 1), jnp.int32),
    visible_until=jnp.asarray(until, jnp.int32),
  )


class World:
  """A catalogue, a toy model over it, and the table of all its logits."""

  def __init__(
    self, sizes=(5, 4, 6), num_items=30, seed=0, constrained=True, num_rows=3
  ):
    rng = np.random.default_rng(seed)
    self.searches = {}
    self.codes = rng.integers(0, sizes, (num_items + 1, len(sizes)))
    self.codes = self.codes.astype(np.int32)
    self.codes[0] = 0
    self.popularity = rng.permutation(num_items + 1)
    self.catalogue = Catalogue(codes=jnp.asarray(self.codes), features={})
    self.index = prefix_index.build(self.codes, sizes, self.popularity)
    self.model = Toy(tuple(sizes), num_items, constrained)
    self.batch = rows(num_items, num_rows, seed=seed)
    self.all_items = np.arange(1, num_items + 1)
    many = np.broadcast_to(self.all_items, (num_rows, num_items))
    wide = self.batch.replace(
      targets=jnp.asarray(many, jnp.int32),
      visible_from=jnp.zeros(many.shape, jnp.int32),
      visible_until=jnp.broadcast_to(self.batch.visible_until, many.shape),
    )
    init = jax.jit(self.model.init)
    variables = init(jax.random.key(seed), wide, self.catalogue)
    self.params = variables["params"]
    logits = jax.jit(self.model.apply)(variables, wide, self.catalogue)
    self.logits = [np.asarray(level, np.float64) for level in logits]

  def step(self, row, prefix, codes):
    """Log-probability of each continuation of a prefix, by numpy."""
    starts = (self.codes[1:, : len(prefix)] == prefix).all(axis=1)
    x = self.logits[len(prefix)][row, np.flatnonzero(starts)[0]]
    kept = x[self.follow(prefix)] if self.model.constrained_softmax else x
    return x[codes] - np.log(np.exp(kept).sum())

  def follow(self, prefix, items=None):
    codes = self.codes[self.all_items if items is None else items]
    starts = (codes[:, : len(prefix)] == prefix).all(axis=1)
    return np.unique(codes[starts, len(prefix)])

  def score(self, row, item):
    sid = self.codes[item]
    return sum(self.step(row, sid[:i], sid[i]) for i in range(len(sid)))

  def ranked(self, row, items=None):
    """Every semantic ID: [(score, most popular item)], best first."""
    best = {}
    for item in self.all_items if items is None else items:
      sid = tuple(self.codes[item])
      old = best.get(sid)
      if old is None or self.popularity[item] > self.popularity[old]:
        best[sid] = item
    return sorted((self.score(row, i), i) for i in best.values())[::-1]

  def beam(self, row, width):
    """A beam of lists."""
    beams = [(0.0, ())]
    for _ in range(self.codes.shape[1]):
      longer = [
        (score + gain, (*prefix, code))
        for score, prefix in beams
        for code, gain in zip(
          self.follow(prefix), self.step(row, prefix, self.follow(prefix))
        )
      ]
      beams = sorted(longer)[::-1][:width]
    return beams

  def search(self, width, index=None):
    if width not in self.searches:
      self.searches[width] = jax.jit(
        functools.partial(beam_search.beam_search, self.model, width=width)
      )
    index = self.index if index is None else index
    return jax.tree.map(
      np.asarray,
      self.searches[width](self.params, self.batch, self.catalogue, index),
    )

  def run(self, function, **options):
    jitted = jax.jit(functools.partial(function, self.model, **options))
    found = jitted(self.params, self.batch, self.catalogue, self.index)
    return jax.tree.map(np.asarray, found)


world_of = functools.cache(World)


def assert_agree(found, want):
  """One row of a search against [(score, item)], padded by nothing."""
  items, leaves, scores = found
  count = len(want)
  np.testing.assert_allclose(scores[:count], [s for s, _ in want], atol=1e-5)
  assert items[:count].tolist() == [i for _, i in want]
  assert (items[count:] == 0).all()
  assert (leaves[count:] == -1).all()
  assert (scores[count:] == -np.inf).all()


@pytest.mark.parametrize("constrained", [True, False])
def test_full_width_is_the_exact_ranking(constrained):
  world = world_of(constrained=constrained)
  found = world.search(width=1000)
  exact = world.run(beam_search.exact_search, width=1000, chunk=7)
  for row in range(3):
    assert_agree([f[row] for f in found], world.ranked(row))
    assert_agree([f[row] for f in exact], world.ranked(row))


@pytest.mark.parametrize("constrained", [True, False])
def test_exact_scores_are_the_log_probabilities_of_items(constrained):
  world = world_of(constrained=constrained)
  items = np.asarray([[3, 0, 30], [1, 1, 2], [9, 8, 7]], np.int32)
  got = world.run(beam_search.exact_scores, items=jnp.asarray(items), chunk=2)
  want = [
    [world.score(r, i) if i else -np.inf for i in row]
    for r, row in enumerate(items)
  ]
  np.testing.assert_allclose(got, want, atol=1e-5)


def test_constrained_probabilities_sum_to_one():
  world = world_of(constrained=True)
  _, _, scores = world.search(width=1000)
  np.testing.assert_allclose(np.exp(scores).sum(axis=1), 1.0, atol=1e-5)


def test_narrow_beam_is_the_beam_of_lists():
  world = World(sizes=(6, 5, 4, 3), num_items=60, seed=2)
  misses = 0
  for width in (1, 3):
    items, leaves, scores = world.search(width)
    for row in range(3):
      want = world.beam(row, width)
      np.testing.assert_allclose(scores[row], [s for s, _ in want], atol=1e-5)
      found = [tuple(sid) for sid in world.codes[items[row]].tolist()]
      assert found == [sid for _, sid in want]
      exact = [i for _, i in world.ranked(row)[:width]]
      misses += items[row].tolist() != exact
    np.testing.assert_array_equal(world.index.leaf_item[leaves], items)
  # A world in which the search is no exact one.
  assert misses > 0


def test_a_restricted_search_is_the_search_of_the_subset():
  world = world_of(constrained=True)
  allowed = np.zeros((3, 31), bool)
  allowed[0, [2, 3, 5, 7, 11, 13]] = True
  allowed[1, 30] = True
  for row in range(2):
    index = prefix_index.restrict(world.index, jnp.asarray(allowed[row]))
    found = world.search(width=1000, index=index)
    for r in range(3):
      want = world.ranked(r, np.flatnonzero(allowed[row]))
      assert_agree([f[r] for f in found], want)
  # Another set for each request; the third may have nothing.
  index = prefix_index.restrict(world.index, jnp.asarray(allowed))
  found = world.search(width=1000, index=index)
  for row in range(3):
    want = world.ranked(row, np.flatnonzero(allowed[row]))
    assert_agree([f[row] for f in found], want)


def test_a_narrow_restricted_beam_wastes_no_beam_on_dead_ends():
  world = world_of(constrained=True)
  want = np.asarray([1, 17, 30])
  allowed = want[:, None] == np.arange(31)[None]
  index = prefix_index.restrict(world.index, jnp.asarray(allowed))
  items, _, scores = world.search(width=1, index=index)
  assert items[:, 0].tolist() == want.tolist()
  assert np.isfinite(scores).all()


def test_other_items_and_weights_compile_nothing_again():
  world = world_of(constrained=True)

  @jax.jit
  def search(params, index):
    return beam_search.beam_search(
      world.model, params, world.batch, world.catalogue, index, 4
    )

  search(world.params, world.index)
  for seed in range(3):
    allowed = np.random.default_rng(seed).random(31) < 0.5
    index = prefix_index.restrict(world.index, jnp.asarray(allowed))
    items, _, _ = search(jax.tree.map(lambda p: p + 0.1, world.params), index)
    items = np.asarray(items)
    assert allowed[items[items > 0]].all()
  assert search._cache_size() == 1


def test_fewer_items_than_beams():
  world = World(sizes=(3, 3), num_items=2)
  found = world.search(width=5)
  assert found[0].shape == (3, 5)
  for row in range(3):
    assert_agree([f[row] for f in found], world.ranked(row))


def test_one_item():
  world = World(sizes=(1, 4, 2), num_items=1)
  items, leaves, scores = world.search(width=3)
  assert items[:, 0].tolist() == [1, 1, 1]
  assert leaves[:, 0].tolist() == [0, 0, 0]
  np.testing.assert_allclose(scores[:, 0], 0.0, atol=1e-6)
  assert (items[:, 1:] == 0).all()


def test_rows_on_eight_devices_need_no_communication():
  world = World(num_rows=8)
  # In exactly the way training spreads a batch.
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  spread = NamedSharding(mesh, PartitionSpec("data"))
  copied = NamedSharding(mesh, PartitionSpec())
  search = jax.jit(
    lambda params, batch, catalogue, index: beam_search.beam_search(
      world.model, params, batch, catalogue, index, 4
    ),
    in_shardings=(copied, spread, copied, copied),
    out_shardings=spread,
  )
  arguments = world.params, world.batch, world.catalogue, world.index
  program = search.lower(*arguments).compile().as_text()
  for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
    assert word not in program
  for got, want in zip(search(*arguments), world.search(4)):
    np.testing.assert_allclose(got, want, atol=1e-6)
