"""A frozen vectorizer: what it makes of known items, and its file."""

import json

import numpy as np
import pyarrow as pa
import pytest

from onerec_jax import config as config_lib
from onerec_jax import semantic_ids
from onerec_jax.tokenizer import content, item_vectors, vectorizer

EVENTLESS = 5


def catalogue(num_items: int, num_words: int):
  """Titles of random words; the last items have no events."""
  rng = np.random.default_rng(0)
  titles = [
    " ".join(f"w{w}" for w in rng.integers(0, num_words, 6))
    for _ in range(num_items)
  ]
  lengths = rng.integers(2, 9, num_items)
  offsets = np.cumsum([0, *lengths])
  events = rng.integers(1, num_items + 1 - EVENTLESS, offsets[-1])
  categories = ["c1", "c2"] * (num_items // 2)
  items = pa.table({"title": titles, "category": categories})
  return items, offsets, events.astype(np.int32)


def fit(kind, items, offsets, events):
  config = config_lib.TokenizerConfig(vectors=kind, vector_size=16)
  return item_vectors.fit(config, items, offsets, events)[:2]


# A shorter side above 256 takes the iterative solvers; either side may be.
@pytest.mark.parametrize(
  ("num_items", "num_words"), [(60, 20), (400, 280), (300, 500)]
)
@pytest.mark.parametrize("kind", ["content", "collaborative", "fused"])
def test_fitted_items_without_events_come_out_the_same(
  kind, num_items, num_words
):
  data = catalogue(num_items, num_words)
  vectors, frozen = fit(kind, *data)
  again = item_vectors.transform(frozen, data[0])
  assert again.dtype == np.float32
  assert again.shape == (num_items, frozen.width)
  np.testing.assert_allclose(
    again[-EVENTLESS:], vectors[-EVENTLESS:], atol=1e-5
  )
  by_content = {"content": frozen.width, "collaborative": 0, "fused": 16}[kind]
  np.testing.assert_allclose(
    again[:, :by_content], vectors[:, :by_content], atol=1e-5
  )
  if kind != "content":
    # The collaborative part of the others came from events, not from text.
    rest = slice(by_content, None)
    assert np.abs(again[:-EVENTLESS, rest] - vectors[:-EVENTLESS, rest]).max()


def test_new_items_are_weighted_as_the_known_were():
  items, offsets, events = catalogue(60, 20)
  _, frozen = fit("content", items, offsets, events)
  known = items["title"][7].as_py()
  # Other columns, another order, words nobody had: no difference.
  new = pa.table(
    {"text": [None, None, None], "title": ["zzz", known.upper(), "zzz"]}
  )
  found = item_vectors.transform(frozen, new)
  words = frozen.content.terms
  weight = {w: frozen.content.idf[words.index(w)] for w in known.split()}
  weight = {
    w: x * (1 + np.log(known.split().count(w))) for w, x in weight.items()
  }
  row = sum(
    x * frozen.content.projection[words.index(w)] for w, x in weight.items()
  )
  np.testing.assert_allclose(found[1], row / np.linalg.norm(row), atol=1e-5)
  assert not found[[0, 2]].any()


def test_events_alone_cannot_place_new_items():
  items, offsets, events = catalogue(60, 20)
  bare = pa.table({"item_id": np.arange(60)})
  _, frozen = fit("collaborative", bare, offsets, events)
  with pytest.raises(ValueError, match="come from events alone"):
    item_vectors.transform(frozen, items)


def test_given_matrices_need_the_width_of_the_known(tmp_path):
  items = pa.table({"embedding": [[1.0, 2.0], [3.0, 4.0]]})
  _, frozen = fit("embedding", items, np.array([0]), np.zeros(0, np.int32))
  np.testing.assert_array_equal(
    item_vectors.transform(frozen, items.slice(1)), [[3, 4]]
  )
  path = str(tmp_path / "new.npy")
  np.save(path, np.array([[5.0, 6.0]]))
  one = items.slice(1)
  np.testing.assert_array_equal(
    item_vectors.transform(frozen, one, path), [[5, 6]]
  )
  np.save(path, np.zeros((1, 3)))
  with pytest.raises(ValueError, match=r"new.npy has width 3, .* have 2"):
    item_vectors.transform(frozen, one, path)


def saved(folder, kind="fused"):
  items, offsets, events = catalogue(60, 20)
  items = items.set_column(
    0, "title", pa.array(["Größe 眉毛", "眉毛 größe"] * 30)
  )
  vectors, frozen = fit(kind, items, offsets, events)
  vectorizer.Fitted(frozen, vectors, "abc").save(folder)
  return items, vectors, frozen


@pytest.mark.parametrize("kind", ["content", "collaborative", "fused"])
def test_round_trip(tmp_path, kind):
  items, vectors, frozen = saved(tmp_path, kind)
  loaded = vectorizer.Fitted.load(tmp_path)
  assert loaded.prepared == "abc"
  assert loaded.vectorizer.content.terms == ("größe", "眉毛", "c1", "c2")
  np.testing.assert_array_equal(loaded.vectors, vectors)
  np.testing.assert_array_equal(
    item_vectors.transform(loaded.vectorizer, items),
    item_vectors.transform(frozen, items),
  )


def test_broken_files_are_refused_by_name(tmp_path):
  with pytest.raises(FileNotFoundError, match="launch.tokenize"):
    vectorizer.Fitted.load(tmp_path)
  saved(tmp_path)
  header = tmp_path / "vectorizer.json"
  good = json.loads(header.read_text())

  def refused(message, **changes):
    header.write_text(json.dumps({**good, **changes}))
    with pytest.raises(semantic_ids.FormatError, match=message):
      vectorizer.Fitted.load(tmp_path)

  refused("vectorizer.json has format version 2", format_version=2)
  refused("vectorizer.npz is broken: width", width=3)
  refused("vectorizer.npz is broken: its checksum", sha256={})
  np.savez(tmp_path / "vectorizer.npz", terms=np.array(["a"], object))
  sums = dict(good["sha256"])
  sums["vectorizer.npz"] = semantic_ids.files.sha256(
    tmp_path / "vectorizer.npz"
  )
  refused("vectorizer.npz is broken: .*allow_pickle", sha256=sums)
  (tmp_path / "vectors.npy").unlink()
  refused("vectors.npy is broken: the file is missing", sha256=sums)


def test_terms_come_in_the_order_of_their_use():
  terms, idf = content.fit_terms(["b a c", "a b", "a"])
  assert terms == ("b", "a")
  np.testing.assert_allclose(idf, np.log(4 / np.array([3.0, 4.0])) + 1)
