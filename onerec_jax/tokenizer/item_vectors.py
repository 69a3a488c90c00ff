"""Item vectors: content, a given matrix, collaborative, fused, or aligned.

Everything is fitted on item tables and training events; validation and test
events never reach this file (`tokenize` cuts them off). What is fitted is
frozen in a `Vectorizer`, which makes vectors of items that come later.
"""

import pathlib

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Int

from onerec_jax import config as config_lib
from onerec_jax.tokenizer import aligned as aligned_lib
from onerec_jax.tokenizer import collaborative as collaborative_lib
from onerec_jax.tokenizer import content as content_lib
from onerec_jax.tokenizer import pairs as pairs_lib
from onerec_jax.tokenizer.vectorizer import Vectorizer


def given_vectors(
  path: str, items: pa.Table
) -> tuple[Float[np.ndarray, "I D"], str]:
  """The matrix at `path`, or the item table's `embedding` column.

  Args:
    path: .npy [I, D] in the order of `items`; empty: the column.
    items: the item table.

  Returns:
    float32 [I, D] and where it came from.

  Raises:
    ValueError: missing, of a wrong shape, or with values that are no
      finite numbers; says where.
  """
  if path:
    source = path
    check_file(path)
    vectors = _read(path)
  else:
    source = "the item table's `embedding` column"
    vectors = _embedding_column(items)
  if vectors.ndim != 2 or vectors.shape[0] != items.num_rows:
    raise ValueError(
      f"{source} has shape {vectors.shape}; expected [{items.num_rows}, D], "
      "one row an item, in the order of the item table"
    )
  if not np.issubdtype(vectors.dtype, np.floating):
    raise ValueError(f"{source} has dtype {vectors.dtype}; expected floats")
  finite = np.isfinite(vectors)
  if not finite.all():
    row, column = np.argwhere(~finite)[0]
    raise ValueError(
      f"{source}: row {row + 1}, column {column + 1} is "
      f"{vectors[row, column]}; every value must be a finite number"
    )
  return vectors.astype(np.float32), source


def check_file(path: str) -> None:
  """Refuses a path that is no file."""
  if not pathlib.Path(path).is_file():
    raise ValueError(f"embedding matrix: there is no file {path}")


def _read(path: str) -> np.ndarray:
  try:
    found = np.load(path, allow_pickle=False)
  except (ValueError, EOFError, OSError) as error:
    raise ValueError(f"{path} is no .npy matrix: {error}") from error
  if not isinstance(found, np.ndarray):
    raise ValueError(f"{path} holds several arrays; want one, as .npy")
  return found


def _embedding_column(items: pa.Table) -> np.ndarray:
  if "embedding" not in items.schema.names:
    raise ValueError(
      "tokenizer.vectors=embedding needs a matrix (tokenizer.embedding, or "
      "--new_embedding for new items) or an `embedding` column in the item "
      "table; neither is given"
    )
  rows = items["embedding"].to_pylist()
  widths = np.array([-1 if row is None else len(row) for row in rows])
  wrong = np.flatnonzero(widths != widths.max(initial=1))
  if len(wrong):
    found = "null" if widths[wrong[0]] < 0 else f"{widths[wrong[0]]} values"
    raise ValueError(
      f"item table, column `embedding`, row {wrong[0] + 1}: {found}; expected "
      f"{widths.max(initial=1)} values in every row"
    )
  return np.array(
    [[np.nan if v is None else v for v in row] for row in rows], np.float32
  )


def fit(
  config: config_lib.TokenizerConfig,
  items: pa.Table,
  user_offsets: Int[np.ndarray, "U1"],
  events: Int[np.ndarray, "events"],
  on_step: aligned_lib.OnStep = lambda step, steps, loss: None,
) -> tuple[Float[np.ndarray, "I D"], Vectorizer, str]:
  """The vectors a config asks for, and what makes them.

  `content`, `fused` and `aligned` fall back to `collaborative` where no two
  items share a word.

  Args:
    config: `vectors` and its settings.
    items: the prepared item table; row i is dense item i + 1.
    user_offsets: events of user u are events[offsets[u] : offsets[u + 1]].
    events: dense item ids of training events, oldest first within a user.
    on_step: told of the training of `aligned` ones.

  Returns:
    float32 [I, D], what `transform` takes, and a line that says what they are.

  Raises:
    ValueError: an unknown kind or bad setting, a bad given matrix, or events
      that give `aligned` no pairs.
  """
  kinds = ("content", "embedding", "collaborative", "fused", "aligned")
  if config.vectors not in kinds:
    raise ValueError(f"tokenizer.vectors is {config.vectors!r}; known: {kinds}")
  for name in ("vector_size", "window"):
    if getattr(config, name) < 1:
      raise ValueError(f"tokenizer.{name} must be at least 1")
  if config.vectors == "embedding":
    vectors, source = given_vectors(config.embedding, items)
    frozen = Vectorizer("embedding", vectors.shape[1])
    return vectors, frozen, f"vectors from {source}"
  texts = content_lib.item_texts(items)
  content, recipe = content_lib.fit(texts, config.vector_size)
  has_content = content.any()
  if config.vectors == "content" and has_content:
    frozen = Vectorizer("content", content.shape[1], recipe)
    return content, frozen, "content vectors (TF-IDF)"
  collaborative = collaborative_lib.collaborative_vectors(
    user_offsets, events, items.num_rows, config.window, config.vector_size
  )
  if not has_content:
    line = "collaborative vectors (PPMI of training events)"
    if config.vectors != "collaborative":
      line += f", not {config.vectors}: no two items share a word of text"
    frozen = Vectorizer("collaborative", collaborative.shape[1])
    return collaborative, frozen, line
  if config.vectors == "aligned":
    pairs = pairs_lib.item_pairs(user_offsets, events, collaborative)
    aligner, line = aligned_lib.fit(
      texts, recipe, pairs, config.qformer, config.seed, on_step
    )
    frozen = Vectorizer("aligned", aligner.width, recipe, aligner=aligner)
    return aligner.vectors(texts, recipe), frozen, line
  return _with_guesses(config.vectors, content, collaborative, recipe)


def _with_guesses(
  kind: str,
  content: Float[np.ndarray, "I D2"],
  collaborative: Float[np.ndarray, "I D"],
  recipe: content_lib.Content,
) -> tuple[Float[np.ndarray, "I D3"], Vectorizer, str]:
  """`collaborative` or `fused` vectors, as `fit` returns them."""
  width = collaborative.shape[1]
  guessed = int((~collaborative.any(axis=1)).sum())
  weights = collaborative_lib.ridge(collaborative, content)
  collaborative = collaborative_lib.fill(collaborative, content, weights)
  note = f"; {guessed} items without neighbours guessed from their text"
  if kind == "collaborative":
    frozen = Vectorizer("collaborative", width, recipe, weights)
    return collaborative, frozen, "collaborative vectors" + note
  return (
    np.concatenate([content, collaborative], axis=1),
    Vectorizer("fused", content.shape[1] + width, recipe, weights),
    "fused vectors (content and collaborative)" + note,
  )


def transform(
  vectorizer: Vectorizer, items: pa.Table, embedding: str = ""
) -> Float[np.ndarray, "I D"]:
  """Vectors of items that were not there when the vectorizer was fitted.

  They come out as those of a fitted item with the same text and no events: a
  collaborative part is guessed from content.

  Args:
    vectorizer: what `fit` gave.
    items: columns as in the prepared item table, as far as given.
    embedding: kind `embedding`: .npy [I, D]; empty: the `embedding` column.

  Returns:
    float32 [I, D]; zero rows where content is needed and no word is known.

  Raises:
    ValueError: collaborative vectors without content to guess them from, or
      a bad given matrix.
  """
  kind = vectorizer.kind
  if kind == "embedding":
    vectors, source = given_vectors(embedding, items)
    if vectors.shape[1] != vectorizer.width:
      raise ValueError(
        f"{source} has width {vectors.shape[1]}, the known items' vectors "
        f"have {vectorizer.width}; give vectors of the same model"
      )
    return vectors
  if vectorizer.content is None:
    raise ValueError(
      "the known items' vectors come from events alone, which new items do "
      "not have; prepare items with texts, or tokenize the whole catalogue "
      "again once the new items have events"
    )
  texts = content_lib.item_texts(items)
  if kind == "aligned":
    return vectorizer.aligner.vectors(texts, vectorizer.content)
  content = vectorizer.content.vectors(texts)
  if kind == "content":
    return content
  collaborative = collaborative_lib.guess(content, vectorizer.ridge)
  if kind == "collaborative":
    return collaborative
  return np.concatenate([content, collaborative], axis=1)
