"""Vectors against direct counts and formulas."""

import math
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import scipy.sparse as sp
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax import config as config_lib
from onerec_jax.tokenizer import collaborative as collaborative_lib
from onerec_jax.tokenizer import content as content_lib
from onerec_jax.tokenizer import item_vectors, spectral

TEXTS = ["Red nail polish", "blue NAIL polish polish", "hair oil", "", "oil"]


def flat(histories):
  offsets = np.cumsum([0, *map(len, histories)])
  return offsets, np.array([i for h in histories for i in h], np.int32)


def test_tf_idf_is_the_formula():
  found = content_lib.tf_idf(TEXTS, *content_lib.fit_terms(TEXTS)).toarray()
  words = [Counter(t.lower().split()) for t in TEXTS]
  terms = [w for w in ("nail", "polish", "oil")]
  expected = np.zeros((5, 3))
  for i, counts in enumerate(words):
    for j, term in enumerate(terms):
      if counts[term]:
        df = sum(term in c for c in words)
        idf = math.log(6 / (1 + df)) + 1
        expected[i, j] = (1 + math.log(counts[term])) * idf
  norms = np.linalg.norm(expected, axis=1, keepdims=True)
  expected = expected / np.where(norms > 0, norms, 1)
  # Terms come in the order of their first use.
  np.testing.assert_allclose(found, expected, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(
  st.lists(st.lists(st.integers(1, 6), max_size=9), min_size=1, max_size=6),
  st.integers(1, 4),
)
def test_ppmi_is_the_count(histories, window):
  counts = np.zeros((6, 6))
  for h in histories:
    for a in range(len(h)):
      for b in range(len(h)):
        if a != b and abs(a - b) <= window and h[a] != h[b]:
          counts[h[a] - 1, h[b] - 1] += 1 / abs(a - b)
  expected = np.zeros((6, 6))
  for i, j in zip(*np.nonzero(counts)):
    ratio = counts[i, j] * counts.sum() / counts[i].sum() / counts[:, j].sum()
    expected[i, j] = max(0, math.log(ratio))
  found = collaborative_lib.ppmi(*flat(histories), 6, window).toarray()
  np.testing.assert_allclose(found, expected, atol=1e-9)


@pytest.mark.parametrize("rows", [40, 400])
def test_svd_is_truncated_signed_and_repeatable(rows):
  rng = np.random.default_rng(0)
  dense = rng.normal(size=(rows, 300)) * (rng.random((rows, 300)) < 0.2)
  left, values = spectral.truncated_svd(sp.csr_matrix(dense), 6)
  exact = np.linalg.svd(dense)[1][:6]
  np.testing.assert_allclose(values, exact, rtol=1e-5)
  np.testing.assert_allclose(
    np.linalg.norm(dense.T @ left, axis=0), values, rtol=1e-5
  )
  assert (left.max(0) == np.abs(left).max(0)).all()
  again, _ = spectral.truncated_svd(sp.csr_matrix(dense), 6)
  np.testing.assert_array_equal(left, again)


@pytest.mark.parametrize("rows", [40, 300])
def test_positive_eigen_is_the_nearest_positive_matrix(rows):
  rng = np.random.default_rng(1)
  dense = rng.normal(size=(rows, rows)) * (rng.random((rows, rows)) < 0.2)
  dense = dense + dense.T
  vectors, values = spectral.positive_eigen(sp.csr_matrix(dense), 6)
  expected = np.linalg.eigvalsh(dense)[::-1][:6]
  np.testing.assert_allclose(values, expected, rtol=1e-5)
  np.testing.assert_allclose(dense @ vectors, vectors * values[None], atol=1e-3)


def test_content_vectors_have_length_one_or_zero():
  vectors = content_lib.fit(TEXTS, 8)[0]
  norms = np.linalg.norm(vectors, axis=1)
  np.testing.assert_allclose(norms, [1, 1, 1, 0, 1], atol=1e-6)
  np.testing.assert_allclose(vectors[0] @ vectors[4], 0, atol=1e-6)


def test_collaborative_vectors_bring_neighbours_together():
  histories = [[1, 2, 3]] * 5 + [[4, 5, 6]] * 5
  vectors = collaborative_lib.collaborative_vectors(*flat(histories), 7, 2, 4)
  alike = vectors @ vectors.T
  assert alike[0, 1] > 0.5
  assert abs(alike[0, 4]) < 1e-6
  np.testing.assert_array_equal(vectors[6], 0)


def test_ridge_fills_only_what_is_missing():
  rng = np.random.default_rng(0)
  content = rng.normal(size=(30, 3)).astype(np.float32)
  collaborative = rng.normal(size=(30, 2)).astype(np.float32)
  collaborative[[4, 9]] = 0
  content[9] = 0
  weights = collaborative_lib.ridge(collaborative, content)
  filled = collaborative_lib.fill(collaborative, content, weights)
  known = np.delete(np.arange(30), [4, 9])
  x, y = content[known], collaborative[known]
  guess = content[4] @ np.linalg.inv(x.T @ x + np.eye(3)) @ x.T @ y
  np.testing.assert_allclose(filled[4], guess / np.linalg.norm(guess), 1e-4)
  np.testing.assert_array_equal(filled[known], collaborative[known])
  np.testing.assert_array_equal(filled[9], 0)


def build(kind, items, histories=((1, 2), (2, 3, 1)), **settings):
  config = config_lib.TokenizerConfig(vectors=kind, vector_size=4, **settings)
  return item_vectors.fit(config, items, *flat(histories))


def test_fused_is_content_beside_collaborative():
  items = pa.table({"title": ["a b", "b c", "a c"], "text": [None, "b", ""]})
  fused, _, line = build("fused", items)
  content, _, _ = build("content", items)
  collaborative, _, _ = build("collaborative", items)
  np.testing.assert_array_equal(
    fused, np.concatenate([content, collaborative], 1)
  )
  assert "fused" in line


@pytest.mark.parametrize("kind", ["content", "fused"])
def test_without_text_it_falls_back_and_says_so(kind):
  items = pa.table({"item_id": [1, 2, 3]})
  vectors, _, line = build(kind, items)
  expected, _, _ = build("collaborative", items)
  np.testing.assert_array_equal(vectors, expected)
  assert f"not {kind}" in line


def test_texts_join_the_columns_there_are():
  items = pa.table(
    {
      "title": ["Oil", None],
      "category": [["Hair", "Care"], None],
      "author_id": [7, 8],
    }
  )
  assert content_lib.item_texts(items) == ["Oil Hair Care 7", "  8"]


def test_items_without_words_are_described_by_their_length():
  items = pa.table({
    "title": ["Oil", "", None, ""],
    "duration_ms": pa.array([9_000, 9_000, 130_000, None], pa.int64()),
  })  # fmt: skip
  # 9 s lie in [8, 16), 130 s in [128, 256).
  assert content_lib.item_texts(items) == ["Oil", "length4", "length8", ""]


def test_given_vectors_and_their_errors(tmp_path):
  items = pa.table({"item_id": [1, 2]})
  path = tmp_path / "e.npy"
  np.save(path, np.ones((2, 3), np.float16))
  vectors, _, _ = build("embedding", items, embedding=str(path))
  assert vectors.dtype == np.float32
  np.save(path, np.ones((3, 3)))
  with pytest.raises(ValueError, match=r"shape \(3, 3\); expected \[2, D\]"):
    build("embedding", items, embedding=str(path))
  np.save(path, np.array([[0, 1.0], [np.nan, 0]]))
  with pytest.raises(ValueError, match="row 2, column 1 is nan"):
    build("embedding", items, embedding=str(path))
  with pytest.raises(ValueError, match="no file"):
    build("embedding", items, embedding=str(tmp_path / "none.npy"))
  with pytest.raises(ValueError, match="neither is given"):
    build("embedding", items)
  column = pa.table({"embedding": [[1.0, 2.0], [3.0]]})
  with pytest.raises(ValueError, match="row 2: 1 values; expected 2"):
    build("embedding", column)
  column = pa.table({"embedding": [[1.0, 2.0], [3.0, 4.0]]})
  np.testing.assert_array_equal(build("embedding", column)[0], [[1, 2], [3, 4]])
  with pytest.raises(ValueError, match="known"):
    build("magic", items)


@pytest.mark.parametrize(
  ("content", "told"),
  [(b"", "is no .npy matrix"), (b"1.0,2.0", "is no .npy matrix")],
)
def test_a_file_that_is_no_matrix_is_named(tmp_path, content, told):
  path = tmp_path / "vectors.npy"
  path.write_bytes(content)
  items = pa.table({"item_id": [1, 2]})
  with pytest.raises(ValueError, match=f"{path} {told}"):
    build("embedding", items, embedding=str(path))


def test_several_arrays_are_no_matrix(tmp_path):
  path = tmp_path / "vectors.npz"
  np.savez(path, a=np.ones((2, 3)))
  with pytest.raises(ValueError, match="holds several arrays"):
    build("embedding", pa.table({"item_id": [1, 2]}), embedding=str(path))


@pytest.mark.parametrize("setting", ["vector_size", "window"])
def test_settings_below_one_are_refused(setting):
  items = pa.table({"item_id": [1, 2], "title": ["a b", "b c"]})
  config = config_lib.TokenizerConfig(vectors="fused", **{setting: 0})
  with pytest.raises(ValueError, match=f"{setting} must be at least 1"):
    item_vectors.fit(config, items, *flat([[1, 2]]))
