"""Retrieval by either kind of model, and what is left of its candidates."""

import flax.linen as nn
import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.inference import beam_search, prefix_index, retrieval

ITEMS, ROWS = 12, 3


class Scorer(nn.Module):
  """Scores items by their history's embedding."""

  def setup(self):
    self.table = nn.Embed(ITEMS + 1, 8)

  def item_scores(self, batch, catalogue):
    x = self.table(batch.items).sum(axis=1, keepdims=True)
    return self.table.attend(x)


class Generator(nn.Module):
  """Draws codes from the history alone."""

  codebook_sizes: tuple[int, ...] = (4, 3)
  constrained_softmax: bool = True

  def setup(self):
    self.table = nn.Embed(ITEMS + 1, 8)
    self.heads = [nn.Dense(k) for k in self.codebook_sizes]

  def encode(self, batch, catalogue):
    return self.table(batch.items).sum(axis=1, keepdims=True)

  def decode_step(self, level, previous, cache, context):
    logits = self.heads[level](context)
    if previous is not None:
      shape = (*previous.shape, logits.shape[-1])
      logits = jnp.broadcast_to(logits, shape)
    return logits, {}

  def start(self, batch, catalogue):
    context = self.encode(batch, catalogue)
    return [head(context) for head in self.heads]


def ask(model, method):
  items = np.random.default_rng(0).integers(1, ITEMS + 1, (ROWS, 5))
  column = jnp.zeros((ROWS, 1), jnp.int32)
  batch = Batch(
    items=jnp.asarray(items, jnp.int32).at[:, 0].set(0),
    segment=jnp.ones((ROWS, 5), jnp.int32),
    features={},
    targets=column,
    visible_from=column,
    visible_until=column + 5,
  )
  codes = np.random.default_rng(1).integers(0, (4, 3), (ITEMS + 1, 2))
  catalogue = Catalogue(codes=jnp.asarray(codes, jnp.int32), features={})
  init = jax.jit(lambda: model.init(jax.random.key(0), batch, catalogue,
                                    method=method))  # fmt: skip
  return init()["params"], batch, catalogue, codes.astype(np.int32)


def test_item_scores_are_ranked_and_padding_and_forbidden_items_left_out():
  model = Scorer()
  params, batch, catalogue, _ = ask(model, "item_scores")
  scores = model.apply(
    {"params": params}, batch, catalogue, method="item_scores"
  )
  scores = np.asarray(scores)[:, 0].astype(np.float32)
  retrieve = retrieval.make_retrieve(model, None, width=50)
  allowed = np.zeros((ROWS, ITEMS + 1), bool)
  allowed[:, 0] = True  # must not matter
  allowed[0, [1, 5, 9]] = allowed[1, 4] = True
  # None: everything; one set for all; a set for each request.
  for given in (None, allowed[0], allowed):
    items, found = retrieve(
      params, batch, catalogue, None if given is None else jnp.asarray(given)
    )
    assert items.shape == (ROWS, ITEMS)
    kept = np.broadcast_to(True if given is None else given, scores.shape)
    for row in range(ROWS):
      want = [i for i in np.argsort(-scores[row]) if i and kept[row, i]]
      rest = [0] * (ITEMS - len(want))
      assert np.asarray(items[row]).tolist() == want + rest
      np.testing.assert_allclose(
        found[row, : len(want)], scores[row, want], rtol=1e-5
      )
      assert (np.asarray(found[row, len(want) :]) == -np.inf).all()


def test_generated_candidates_are_the_search_of_the_restricted_index():
  model = Generator()
  params, batch, catalogue, codes = ask(model, "start")
  index = prefix_index.build(codes, model.codebook_sizes)
  retrieve = retrieval.make_retrieve(model, index, width=20)
  allowed = np.random.default_rng(2).random((ROWS, ITEMS + 1)) < 0.4
  search = jax.jit(
    lambda index: beam_search.beam_search(
      model, params, batch, catalogue, index, 20
    )
  )
  for given in (None, allowed):
    if given is None:
      items, scores = retrieve(params, batch, catalogue)
      want, _, best = search(index)
    else:
      given = jnp.asarray(given)
      items, scores = retrieve(params, batch, catalogue, given)
      want, _, best = search(prefix_index.restrict(index, given))
      for row in range(ROWS):
        found = np.asarray(items[row])
        assert allowed[row][found[found > 0]].all()
    np.testing.assert_array_equal(items, want)
    np.testing.assert_allclose(scores, best, rtol=1e-6)


def test_a_generative_model_needs_an_index():
  with pytest.raises(ValueError, match="Generator .* needs a prefix index"):
    retrieval.make_retrieve(Generator(), None, 5)


@hypothesis.given(
  seed=st.integers(0, 2**31),
  rows=st.integers(1, 5),
  width=st.integers(1, 12),
  k=st.integers(1, 15),
  filter_seen=st.booleans(),
)
def test_finish_is_a_loop_over_rows(seed, rows, width, k, filter_seen):
  rng = np.random.default_rng(seed)
  items = np.stack([rng.permutation(20)[:width] for _ in range(rows)])
  items = np.where(rng.random(items.shape) < 0.2, 0, items).astype(np.int32)
  scores = -np.sort(rng.random(items.shape), axis=1).astype(np.float32)
  seen = [
    rng.integers(1, 30, rng.integers(0, 9)).astype(np.int32)
    for _ in range(rows)
  ]
  got, value = retrieval.finish(items, scores, seen, k, filter_seen)
  assert got.shape == value.shape == (rows, k)
  for row in range(rows):
    want = [
      (i, s)
      for i, s in zip(items[row], scores[row])
      if i != 0 and not (filter_seen and i in seen[row])
    ][:k]
    want += [(0, -np.inf)] * (k - len(want))
    assert list(zip(got[row], value[row])) == want
