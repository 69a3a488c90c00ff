"""Items added to semantic IDs after they were fitted.

The folder of an extension holds, beside semantic IDs of all items so far,
`new_items.parquet` (what was given of the new items, with their dense ids),
`vectors.npy` (theirs) and `extension.json` (the parent's fingerprint,
checksums). The parent is what `tokenize` fitted, or an earlier extension.
"""

import dataclasses
import hashlib
import io
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float

from onerec_jax import config as config_lib
from onerec_jax import files, semantic_ids
from onerec_jax.data import schema, shards
from onerec_jax.data.datasets import tables
from onerec_jax.tokenizer import content, item_vectors, sidecar, vectorizer

_ITEMS = "new_items.parquet"
_FILES = sidecar.Sidecar(
  name="extension.json",
  keys=frozenset({"parent"}),
  contents=(_ITEMS, vectorizer.VECTORS),
  remedy="delete the folder and add the items again",
)


@dataclasses.dataclass(frozen=True)
class Extension:
  """What one extension added.

  Attributes:
    parent: fingerprint of the semantic IDs it started from.
    items: `item_id` (dense, after the parent's), `raw_id`, `title` and the
      other columns given.
    vectors: float32 [new items, D].
  """

  parent: str
  items: pa.Table
  vectors: Float[np.ndarray, "N D"]

  def save(self, folder: files.PathLike) -> None:
    """Writes the three files, each atomically, the JSON last."""
    _FILES.write(
      pathlib.Path(folder),
      {"parent": self.parent},
      {
        _ITEMS: _parquet_bytes(self.items),
        vectorizer.VECTORS: vectorizer.array_bytes(self.vectors),
      },
    )

  @classmethod
  def load(cls, folder: files.PathLike) -> "Extension":
    """Reads and checks what `save` wrote.

    Raises:
      FileNotFoundError: the folder holds no extension.
      FormatError: it is broken or of another format; names file and cause.
    """
    folder = pathlib.Path(folder)
    if not is_extension(folder):
      raise FileNotFoundError(f"{folder} holds no {_FILES.name}")
    header = _FILES.read(folder)
    try:
      items = pq.read_table(folder / _ITEMS)
    except pa.ArrowInvalid as error:
      raise _FILES.broken(folder / _ITEMS, str(error)) from error
    vectors = _FILES.load_array(folder / vectorizer.VECTORS)
    return cls(header["parent"], items, vectors)


@dataclasses.dataclass(frozen=True)
class Known:
  """All that semantic IDs know: what was fitted and every extension since.

  Attributes:
    prepared: the data of the fit.
    vectorizer: of the fit.
    ids: of all items so far.
    vectors: float32 [I, D] of all items so far.
    extensions: oldest first.
  """

  prepared: shards.PreparedData
  vectorizer: vectorizer.Vectorizer
  ids: semantic_ids.SemanticIds
  vectors: Float[np.ndarray, "I D"]
  extensions: list[Extension]

  @classmethod
  def load(cls, workdir: files.PathLike, fingerprint: str) -> "Known":
    """Follows an artefact's parents back to what was fitted.

    Raises:
      FileNotFoundError: it, a parent or its vectorizer is not there.
      ValueError: the prepared data is not that of the fit, or an artefact is
        broken; named.
    """
    folder = semantic_ids.find(workdir, fingerprint)
    ids = semantic_ids.SemanticIds.load(folder)
    extensions: list[Extension] = []
    while is_extension(folder):
      extensions.insert(0, Extension.load(folder))
      folder = semantic_ids.find(workdir, extensions[0].parent)
    fitted = vectorizer.Fitted.load(folder)
    prepared = shards.PreparedData.open(workdir)
    if prepared.manifest["fingerprint"] != fitted.prepared:
      raise ValueError(
        f"{folder} was made of other data than {prepared.directory} now "
        "holds; prepare that again, or tokenize what is prepared now"
      )
    vectors = [fitted.vectors, *(e.vectors for e in extensions)]
    return cls(
      prepared,
      fitted.vectorizer,
      ids,
      np.concatenate(vectors),
      extensions,
    )

  @property
  def rows(self) -> int:
    """Rows of the code table so far, padding included."""
    return len(self.ids.codes)

  def check_new(self, items: pa.Table) -> None:
    """Refuses items that are known already.

    Raises:
      ValueError: names the first, and says how many there are.
    """
    known = set(self.prepared.item_index)
    for earlier in self.extensions:
      known |= set(earlier.items["raw_id"].to_pylist())
    raw = items["item_id"].to_pylist()
    twice = [row for row, item in enumerate(raw) if item in known]
    if twice:
      raise ValueError(
        f"new items, row {twice[0] + 1}: item {raw[twice[0]]!r} has a "
        f"semantic ID in {self.ids.fingerprint} already ({len(twice)} of "
        f"{len(raw)} items have); leave such items out"
      )

  def table(self, items: pa.Table) -> pa.Table:
    """New items as `Extension.items` keeps them."""
    rest = {n: items[n] for n in items.schema.names if n != "item_id"}
    nulls = pa.nulls(items.num_rows, pa.string())
    dense = np.arange(self.rows, self.rows + items.num_rows, dtype=np.int32)
    return pa.table(
      {"title": nulls, **rest, "item_id": dense, "raw_id": items["item_id"]}
    )


def read(
  path: str, on_bad_row: str = "error"
) -> tuple[pa.Table, dict[str, int]]:
  """New items from a CSV, TSV or Parquet file.

  Args:
    path: the file.
    on_bad_row: `error`, or `skip` to leave bad rows out and count them.

  Returns:
    Checked items, and how many rows were skipped by reason.

  Raises:
    FileNotFoundError: there is no such file.
    ValueError: a bad row or column; names file, row and value.
  """
  if not pathlib.Path(path).exists():
    raise FileNotFoundError(f"new items: there is no file {path}")
  # The reader takes events with every source; those are not read here.
  config = config_lib.PrepareConfig(
    dataset="tables", events=path, items=path, on_bad_row=on_bad_row
  )
  given = tables.load(config)
  source = {"items": path, "skipped": given.source["skipped"]}
  items, skipped = _validate(given.items, source, on_bad_row)
  own = {why: n for why, n in skipped.items() if why.startswith("items")}
  return items, own


def check(items: pa.Table) -> pa.Table:
  """Columns typed as in the item table of `schema`; none twice, none bad.

  Raises:
    ValueError: a bad row or column, or no rows.
  """
  return _validate(items, {"items": "the new items"}, "error")[0]


def _validate(
  items: pa.Table, source: dict[str, Any], on_bad_row: str
) -> tuple[pa.Table, Mapping[str, int]]:
  columns = ("user_id", "item_id", "timestamp_ms")
  none = pa.table({name: pa.array([], pa.string()) for name in columns})
  given = schema.Tables(none, items, source=source)
  checked, skipped = schema.validate(given, on_bad_row)
  if checked.items.num_rows == 0:
    raise ValueError(f"{source['items']}: there are no rows")
  return checked.items, skipped


def check_vectors(
  frozen: vectorizer.Vectorizer,
  items: pa.Table,
  vectors: Float[np.ndarray, "N D"],
) -> None:
  """Refuses items whose text says nothing, where it is all there is to go by.

  Raises:
    ValueError: names the first, and says how many there are.
  """
  if frozen.content is None:
    return
  empty = np.flatnonzero(~vectors.any(axis=1))
  if not len(empty):
    return
  row = int(empty[0])
  text = content.item_texts(items.slice(row, 1))[0].strip()
  cause = "has no text"
  if text:
    cause = f"has no word that the known items share, {text[:80]!r}"
  raise ValueError(
    f"new items, row {row + 1}: item {items['item_id'][row].as_py()!r} "
    f"{cause} ({len(empty)} of {len(vectors)} items have none); the "
    f"vectors are made from {', '.join(content.TEXT_COLUMNS)}: fill these in, "
    "or leave such items out"
  )


def fingerprint(parent: str, items: pa.Table, embedding: str = "") -> str:
  """Names the extension of `parent` by these items."""
  matrix = ""
  if embedding:
    item_vectors.check_file(embedding)
    matrix = files.sha256(embedding)
  table = hashlib.sha256(_parquet_bytes(items)).hexdigest()
  return files.fingerprint(sidecar.FORMAT_VERSION, parent, table, matrix)


def is_extension(folder: pathlib.Path) -> bool:
  """Whether a folder holds an extension, not what `tokenize` fitted."""
  return _FILES.exists(folder)


def latest_fitted(workdir: files.PathLike) -> str:
  """The fingerprint of what `tokenize` fitted for the latest artefact.

  Raises:
    FileNotFoundError: there is none.
  """
  folder = semantic_ids.latest(workdir)
  while is_extension(folder):
    folder = semantic_ids.find(workdir, Extension.load(folder).parent)
  return folder.name


def _parquet_bytes(table: pa.Table) -> bytes:
  buffer = io.BytesIO()
  pq.write_table(table, buffer)
  return buffer.getvalue()
