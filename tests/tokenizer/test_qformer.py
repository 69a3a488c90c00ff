"""The Q-Former and its losses against formulas; what training brings."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pytest
from flax import traverse_util

from onerec_jax import config as config_lib
from onerec_jax import semantic_ids
from onerec_jax.tokenizer import (
  aligned,
  content,
  item_vectors,
  qformer,
  vectorizer,
)

SMALL = config_lib.QFormerConfig(
  num_queries=2,
  num_layers=2,
  d_model=8,
  num_heads=2,
  d_ff=12,
  num_steps=150,
  batch_size=32,
  learning_rate=1e-2,
)
NUM_ITEMS = 24
GROUPS = 4


def random_params(module, width, seed=0):
  """No ones and no small numbers, so that every parameter tells."""
  shapes = jax.eval_shape(
    lambda: qformer.init(module, width, jax.random.key(0))
  )
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), shapes
  )


def by_loops(params, tokens, heads):
  """One item, its present tokens alone, query by query."""
  p = traverse_util.flatten_dict(params, sep="/")

  def norm(x, scale):
    return x / np.sqrt(np.mean(x**2) + 1e-6) * scale

  tokens = tokens @ p["tokens/kernel"]
  out = []
  for query in p["queries"].astype(np.float64):
    for layer in ("layer_0", "layer_1"):
      w = {
        k.removeprefix(layer + "/"): v
        for k, v in p.items()
        if k.startswith(layer)
      }
      q = norm(query, w["norm/scale"]) @ w["query/kernel"]
      k, v = np.split(tokens @ w["key_value/kernel"], 2, axis=1)
      read = []
      for q_h, k_h, v_h in zip(
        np.split(q, heads), np.split(k, heads, 1), np.split(v, heads, 1)
      ):
        logits = k_h @ q_h / math.sqrt(len(q_h))
        chance = np.exp(logits - logits.max())
        read.append(chance @ v_h / chance.sum())
      query = query + np.concatenate(read) @ w["out/kernel"]
      gate, value = np.split(
        norm(query, w["ffn_norm/scale"]) @ w["ffn/wi/kernel"], 2
      )
      silu = gate / (1 + np.exp(-gate))
      query = query + (silu * value) @ w["ffn/wo/kernel"]
    out.append(query)
  flat = np.concatenate(out)
  return flat / np.linalg.norm(flat)


def test_network_is_the_formula():
  module = qformer.create(SMALL)
  params = random_params(module, 5)
  rng = np.random.default_rng(1)
  tokens = rng.normal(size=(3, 4, 5)).astype(np.float32)
  present = np.array([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
  found = jax.jit(module.apply)({"params": params}, tokens, present)
  assert found.shape == (3, 16)
  for row in (0, 1):
    expected = by_loops(params, tokens[row][present[row]], SMALL.num_heads)
    np.testing.assert_allclose(found[row], expected, atol=1e-5)
  np.testing.assert_array_equal(found[2], 0)


def test_items_without_words_give_finite_gradients():
  module = qformer.create(SMALL)
  params = random_params(module, 5)

  def loss(params):
    tokens, present = jnp.zeros((2, 3, 5)), jnp.zeros((2, 3), bool)
    return module.apply({"params": params}, tokens, present).sum()

  grads = jax.tree.leaves(jax.jit(jax.grad(loss))(params))
  assert all(np.isfinite(g).all() for g in grads)


def test_words_are_the_largest_weights(monkeypatch):
  monkeypatch.setattr(qformer, "NUM_TOKENS", 2)
  texts = ["a b c", "a b", "a c c", "zzz", "a"]
  recipe = content.fit(texts, 4)[1]
  found = qformer.words(texts, recipe)
  # `a` is in most items and weighs least.
  names = [["", *recipe.terms][t] for t in found.terms.reshape(-1)]
  assert names == ["b", "c", "b", "a", "c", "a", "", "", "a", ""]
  dense = content.tf_idf(texts, recipe.terms, recipe.idf).toarray()
  np.testing.assert_allclose(found.weights[2], np.sort(dense[2])[::-1][:2])
  assert not found.weights[3].any()


def test_terms_are_told_apart_by_direction_alone():
  recipe = content.Content(
    ("a", "b", "c"),
    np.ones(3),
    np.array([[3.0, 4.0], [0.03, 0.04], [0.0, -2.0]], np.float32),
  )
  table = qformer.term_table(recipe)
  rows = np.array([[0, 0], [0.6, 0.8], [0.6, 0.8], [0, -1]]) * math.sqrt(2)
  np.testing.assert_allclose(table, rows, atol=1e-6)


def test_contrastive_loss_is_the_formula():
  rng = np.random.default_rng(0)
  first, second = rng.normal(size=(2, 5, 4))
  first /= np.linalg.norm(first, axis=1, keepdims=True)
  second /= np.linalg.norm(second, axis=1, keepdims=True)
  # 7 is a second item twice; row 3's first item is row 0's second.
  pairs = np.array([[1, 7], [2, 8], [3, 7], [7, 9], [4, 6]], np.int32)
  losses = []
  for row, (i, j) in enumerate(pairs):
    terms = [
      math.exp(first[row] @ second[other] / 0.1)
      for other, (_, k) in enumerate(pairs)
      if other == row or k not in (i, j)
    ]
    assert len(terms) == {0: 4, 1: 5, 2: 4, 3: 3, 4: 5}[row]
    own = math.exp(first[row] @ second[row] / 0.1)
    losses.append(-math.log(own / sum(terms)))
  loss = jax.jit(lambda *args: aligned.contrastive_loss(*args, 0.1))
  found = loss(first.astype(np.float32), second.astype(np.float32), pairs)
  np.testing.assert_allclose(found, np.mean(losses), rtol=1e-5)


def test_reconstruction_loss_is_the_mean_over_words_then_items():
  logits = np.random.default_rng(0).normal(size=(3, 4)).astype(np.float32)
  labels = np.array([[2, 0, 3], [1, -1, -1], [-1, -1, -1]], np.int32)
  chance = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
  item = [-np.log(chance[0, [2, 0, 3]]).mean(), -math.log(chance[1, 1]), 0]
  found = jax.jit(aligned.reconstruction_loss)(logits, labels)
  np.testing.assert_allclose(found, np.mean(item), rtol=1e-5)


def test_the_terms_of_most_items_are_predicted(monkeypatch):
  monkeypatch.setattr(aligned, "PREDICTED_TERMS", 2)
  recipe = content.Content(
    ("a", "b", "c"), np.array([2.0, 1.0, 1.5]), np.zeros((3, 2), np.float32)
  )
  labels, count = aligned.predicted(recipe)
  assert count == 2
  assert labels.tolist() == [-1, -1, 0, 1]


def test_an_epoch_has_every_pair_once():
  pairs = np.arange(14, dtype=np.int32).reshape(7, 2)
  order = aligned.batches(pairs, 3, 0)
  epochs = [
    np.concatenate([next(order), next(order)])[:, 0].tolist() for _ in range(9)
  ]
  assert all(len({*epoch}) == 6 for epoch in epochs)
  assert {i for epoch in epochs for i in epoch} == {*range(0, 14, 2)}
  assert epochs[0] != epochs[1]
  again = aligned.batches(pairs, 3, 0)
  np.testing.assert_array_equal(next(again)[:, 0], epochs[0][:3])
  assert len(next(aligned.batches(pairs, 99, 0))) == 7


def catalogue():
  """Items of a group follow each other; their texts share no word.

  Item g + 4 k is in group g; its words are those of item g + 4 k + 1 …, so
  content likens other items than behaviour does. The last four items have no
  events.
  """
  titles = [f"word{i} about{i // GROUPS} more{i}" for i in range(NUM_ITEMS)] * 2
  rng = np.random.default_rng(0)
  histories = [
    rng.permutation(np.arange(user % GROUPS, NUM_ITEMS - 4, GROUPS)) + 1
    for user in range(40)
  ]
  offsets = np.cumsum([0, *map(len, histories)])
  items = pa.table({"title": titles})
  return items, offsets, np.concatenate(histories).astype(np.int32)


def config(**changes):
  return config_lib.TokenizerConfig(
    vectors="aligned",
    vector_size=16,
    qformer=dataclasses.replace(SMALL, **changes),
  )


@pytest.fixture(scope="module")
def fitted():
  steps = []
  vectors, frozen, line = item_vectors.fit(
    config(), *catalogue(), lambda *step: steps.append(step)
  )
  return vectors, frozen, line, steps


def agreement(vectors):
  """How much closer items of a group lie than others."""
  known = vectors[: NUM_ITEMS - 4]
  group = np.arange(len(known)) % GROUPS
  same = group[:, None] == group[None]
  alike = known @ known.T
  off = ~np.eye(len(known), dtype=bool)
  return alike[same & off].mean() - alike[~same].mean()


def test_training_brings_what_behaves_alike_together(fitted):
  vectors, frozen, line, steps = fitted
  assert vectors.shape == (2 * NUM_ITEMS, 16)
  assert vectors.dtype == np.float32
  np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
  plain = frozen.content.vectors(content.item_texts(catalogue()[0]))
  assert agreement(plain) < 0.1
  assert agreement(vectors) > 0.5
  assert [step[:2] for step in steps] == [(50, 150), (100, 150), (150, 150)]
  assert "Q-Former" in line


def test_the_seed_decides(fitted):
  again = item_vectors.fit(config(), *catalogue())[0]
  np.testing.assert_array_equal(again, fitted[0])
  other = dataclasses.replace(config(), seed=1)
  assert np.abs(item_vectors.fit(other, *catalogue())[0] - again).max() > 0.1


def test_reconstruction_keeps_the_words(fitted):
  """Of items of one group, those with words of their own lie further apart."""
  without = item_vectors.fit(config(reconstruction=0.0), *catalogue())[0]

  def spread(vectors):
    known = vectors[: NUM_ITEMS - 4].reshape(-1, GROUPS, vectors.shape[1])
    return np.var(known, axis=0).sum(axis=1).mean()

  assert spread(fitted[0]) > 1.2 * spread(without)


def test_vectors_are_of_text_alone(fitted):
  vectors, frozen = fitted[:2]
  items = catalogue()[0]
  new = pa.table(
    {"title": [items["title"][5].as_py().upper(), "nobody knows", None]}
  )
  found = item_vectors.transform(frozen, new)
  np.testing.assert_allclose(found[0], vectors[5], atol=1e-6)
  np.testing.assert_array_equal(found[1:], 0)
  everything = item_vectors.transform(frozen, items)
  np.testing.assert_array_equal(everything, vectors)


def test_items_of_more_than_one_block(fitted, monkeypatch):
  monkeypatch.setattr(qformer, "_ROWS", 32)
  found = item_vectors.transform(fitted[1], catalogue()[0])
  np.testing.assert_allclose(found, fitted[0], atol=1e-6)


def test_round_trip_and_broken_arrays(fitted, tmp_path):
  vectors, frozen = fitted[:2]
  vectorizer.Fitted(frozen, vectors, "abc").save(tmp_path)
  loaded = vectorizer.Fitted.load(tmp_path)
  assert loaded.vectorizer.kind == "aligned"
  items = catalogue()[0]
  np.testing.assert_array_equal(
    item_vectors.transform(loaded.vectorizer, items), vectors
  )
  header = tmp_path / "vectorizer.json"
  with np.load(tmp_path / "vectorizer.npz") as file:
    arrays = dict(file)

  def refused(message, **changes):
    kept = {k: v for k, v in (arrays | changes).items() if v is not None}
    np.savez(tmp_path / "vectorizer.npz", **kept)
    values = json.loads(header.read_text())
    values["sha256"]["vectorizer.npz"] = semantic_ids.files.sha256(
      tmp_path / "vectorizer.npz"
    )
    header.write_text(json.dumps(values))
    with pytest.raises(semantic_ids.FormatError, match=message):
      vectorizer.Fitted.load(tmp_path)

  out = "qformer/layer_1/out/kernel"
  refused("layer_1/out/kernel", **{out: None})
  refused(r"has shape \(8, 7\), not \(8, 8\)", **{out: arrays[out][:, :7]})
  refused("read as if 16 wide", projection=arrays["projection"][:, :9])


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"num_layers": 0}, "num_layers is 0"),
    ({"num_heads": 3}, "d_model is 8; want a multiple of .*num_heads, 3"),
    ({"batch_size": 1}, "batch_size is 1"),
    ({"num_steps": 0}, "num_steps is 0"),
    ({"temperature": 0.0}, "temperature is 0.0"),
    ({"learning_rate": 0.0}, "learning_rate is 0.0"),
  ],
)
def test_bad_settings_are_named(changes, message):
  with pytest.raises(ValueError, match=message):
    item_vectors.fit(config(**changes), *catalogue())


def test_without_pairs_or_words_it_says_so():
  items = catalogue()[0]
  lone = np.arange(6), np.arange(1, 6, dtype=np.int32)
  with pytest.raises(ValueError, match="two pairs .* events give 0"):
    item_vectors.fit(config(), items, *lone)
  bare = pa.table({"item_id": np.arange(2 * NUM_ITEMS)})
  _, frozen, line = item_vectors.fit(config(), bare, *catalogue()[1:])
  assert frozen.kind == "collaborative"
  assert "not aligned" in line
