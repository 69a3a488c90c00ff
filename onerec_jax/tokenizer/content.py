"""Item texts → TF-IDF → content vectors."""

import collections
import dataclasses
import itertools
import re

import numpy as np
import pyarrow as pa
import scipy.sparse as sp
from jaxtyping import Float

from onerec_jax.tokenizer import spectral

MIN_DOCUMENTS = 2
"""A term in one item alone says nothing about likeness."""
TEXT_COLUMNS = ("title", "text", "category", "author_id")
_WORD = re.compile(r"\w+")


def item_texts(items: pa.Table) -> list[str]:
  """Title, text, category and author of each item, as far as given.

  Short videos are often known by nothing but their length: an item without any
  of these is described by a word for the power of two of its seconds.

  Args:
    items: the prepared item table; row i is dense item i + 1.
  """
  columns = [
    items[name].to_pylist()
    for name in TEXT_COLUMNS
    if name in items.schema.names
  ]

  def words(value: object) -> str:
    if isinstance(value, list):
      return " ".join(map(str, value))
    return "" if value is None else str(value)

  lengths = [""] * items.num_rows
  if "duration_ms" in items.schema.names:
    lengths = list(map(_length, items["duration_ms"].to_pylist()))
  if not columns:
    return lengths
  texts = (" ".join(map(words, row)) for row in zip(*columns))
  return [text if text.strip() else word for text, word in zip(texts, lengths)]


def _length(milliseconds: int | None) -> str:
  """A word for a duration; none where it is unknown or 0."""
  if not milliseconds:
    return ""
  return f"length{int(milliseconds / 1000).bit_length()}"


@dataclasses.dataclass(frozen=True)
class Content:
  """What makes content vectors of any item, fitted on the known ones.

  Attributes:
    terms: in the order of their first use.
    idf: float64, one a term.
    projection: float32 [terms, D], TF-IDF → vectors before scaling.
  """

  terms: tuple[str, ...]
  idf: Float[np.ndarray, "C"]
  projection: Float[np.ndarray, "C D"]

  def vectors(self, texts: list[str]) -> Float[np.ndarray, "I D"]:
    """Rows of length 1; zero where no term is known."""
    return spectral.unit(tf_idf(texts, self.terms, self.idf) @ self.projection)


def fit(
  texts: list[str], size: int
) -> tuple[Float[np.ndarray, "I D"], Content]:
  """TF-IDF and truncated SVD.

  With X = U S Vᵀ the vectors are U S, rows of length 1. The projection is
  XᵀU S⁻¹, which is V but for the solver's error: new items are then placed
  from the same U as the known ones, which come out the same to rounding.

  Args:
    texts: one an item.
    size: width; fewer where the texts span less.

  Returns:
    float32 [I, D], zero where no term is known, and what makes them.
  """
  terms, idf = fit_terms(texts)
  matrix = tf_idf(texts, terms, idf)
  if matrix.nnz == 0:
    return np.zeros((len(texts), 1), np.float32), Content(
      terms, idf, np.zeros((len(terms), 1), np.float32)
    )
  left, values = spectral.truncated_svd(matrix, size)
  # The solver leaves noise where an item has no known term; scaled to length
  # 1 it would look like content.
  left = np.where((np.diff(matrix.indptr) > 0)[:, None], left, 0.0)
  # Float64 throughout, rounded once.
  projection = matrix.T @ (left.astype(np.float64) / values[None])
  return (
    spectral.unit(left * values[None]),
    Content(terms, idf, projection.astype(np.float32)),
  )


def _words(text: str) -> list[str]:
  return _WORD.findall(text.lower())


def fit_terms(
  texts: list[str],
) -> tuple[tuple[str, ...], Float[np.ndarray, "C"]]:
  """The terms of at least two items, and ln((1 + I) / (1 + df)) + 1 of each.

  Args:
    texts: one an item.
  """
  documents: collections.Counter[str] = collections.Counter()
  for text in texts:
    # Not a set: terms come in the order of their first use, on every run.
    documents.update(dict.fromkeys(_words(text)).keys())
  kept = {term: df for term, df in documents.items() if df >= MIN_DOCUMENTS}
  frequency = np.array(list(kept.values()), np.int64)
  return tuple(kept), np.log((1 + len(texts)) / (1 + frequency)) + 1


def tf_idf(
  texts: list[str], terms: tuple[str, ...], idf: Float[np.ndarray, "C"]
) -> sp.csr_matrix:
  """TF-IDF over lower-cased words; words that are no term do not count.

  weight = (1 + ln tf) · idf, rows of length 1. INFERRED: the papers take
  vectors of a multimodal model; this needs none. Pairs of words as further
  terms did not help (docs/tokenizer.md).

  Args:
    texts: one an item.
    terms: the vocabulary.
    idf: of each term.

  Returns:
    float64 [I, terms].
  """
  columns = {term: column for column, term in enumerate(terms)}
  found = [[columns[w] for w in _words(t) if w in columns] for t in texts]
  rows = np.repeat(np.arange(len(texts)), [len(row) for row in found])
  places = np.array(list(itertools.chain.from_iterable(found)), np.int64)
  counts = sp.csr_matrix(
    (np.ones(len(rows)), (rows, places)), shape=(len(texts), len(terms))
  )
  counts.data = 1 + np.log(counts.data)
  return _unit_sparse(counts @ sp.diags(idf))


def _unit_sparse(matrix: sp.csr_matrix) -> sp.csr_matrix:
  norms = np.sqrt(matrix.multiply(matrix).sum(axis=1)).A1
  return (sp.diags(1 / np.where(norms > 0, norms, 1)) @ matrix).tocsr()
