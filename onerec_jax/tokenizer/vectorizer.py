"""What makes item vectors, frozen, and its file.

An artefact's folder holds `vectorizer.npz` (terms, idf, projection, ridge
weights, a Q-Former: what the kind needs), `vectors.npy` (the vectors that were
coded, to find a new item's neighbours) and `vectorizer.json` (kind, width, the
prepared data's fingerprint, checksums).
"""

import dataclasses
import io
import pathlib
import zipfile

import numpy as np
from jaxtyping import Float

from onerec_jax import files
from onerec_jax.tokenizer import sidecar
from onerec_jax.tokenizer.content import Content
from onerec_jax.tokenizer.qformer import Aligner

_NPZ = "vectorizer.npz"
VECTORS = "vectors.npy"
_FILES = sidecar.Sidecar(
  name="vectorizer.json",
  keys=frozenset({"kind", "width", "prepared"}),
  contents=(_NPZ, VECTORS),
  remedy="delete its vectorizer.json and run `python -m launch.tokenize` with "
  "the config of these semantic IDs, which leaves the IDs as they are",
)


@dataclasses.dataclass(frozen=True)
class Vectorizer:
  """Frozen after `item_vectors.fit`; `item_vectors.transform` applies it.

  Attributes:
    kind: `content`, `embedding`, `collaborative`, `fused` or `aligned`.
    width: D.
    content: None where vectors do not come from texts.
    ridge: float64 [content width, collaborative width]; for `fused`, and for
      `collaborative` with content.
    aligner: for `aligned`.
  """

  kind: str
  width: int
  content: Content | None = None
  ridge: Float[np.ndarray, "D2 D"] | None = None
  aligner: Aligner | None = None


@dataclasses.dataclass(frozen=True)
class Fitted:
  """A vectorizer with what it was fitted on.

  Attributes:
    vectorizer: frozen.
    vectors: float32 [I, D], row i = item i + 1.
    prepared: fingerprint of the prepared data.
  """

  vectorizer: Vectorizer
  vectors: Float[np.ndarray, "I D"]
  prepared: str

  def save(self, folder: files.PathLike) -> None:
    """Writes the three files, each atomically, the JSON last."""
    frozen = self.vectorizer
    arrays = {}
    if frozen.content is not None:
      # No term holds a line break: terms are runs of word characters.
      terms = "\n".join(frozen.content.terms).encode()
      arrays = {
        "terms": np.frombuffer(terms, np.uint8),
        "idf": frozen.content.idf,
        "projection": frozen.content.projection,
      }
    if frozen.ridge is not None:
      arrays["ridge"] = frozen.ridge
    if frozen.aligner is not None:
      arrays |= frozen.aligner.arrays()
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    header = {
      "kind": frozen.kind,
      "width": frozen.width,
      "prepared": self.prepared,
    }
    _FILES.write(
      pathlib.Path(folder),
      header,
      {_NPZ: buffer.getvalue(), VECTORS: array_bytes(self.vectors)},
    )

  @classmethod
  def load(cls, folder: files.PathLike) -> "Fitted":
    """Reads and checks what `save` wrote.

    Raises:
      FileNotFoundError: there is none.
      FormatError: it is broken or of another format; names file and cause.
    """
    folder = pathlib.Path(folder)
    if not exists(folder):
      raise FileNotFoundError(
        f"{folder / _FILES.name} is not there: these semantic IDs were made "
        "before it was kept; run `python -m launch.tokenize` with their "
        "config, which adds it and leaves the IDs as they are"
      )
    header = _FILES.read(folder)
    vectors = _FILES.load_array(folder / VECTORS)
    try:
      with np.load(folder / _NPZ, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
        frozen = _build(header["kind"], header["width"], arrays)
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
      raise _FILES.broken(folder / _NPZ, str(error)) from error
    if vectors.ndim != 2 or vectors.shape[1] != frozen.width:
      raise _FILES.broken(
        folder / VECTORS, f"shape {vectors.shape}, not [I, {frozen.width}]"
      )
    return cls(frozen, vectors, header["prepared"])


def _build(kind: str, width: int, arrays: dict[str, np.ndarray]) -> Vectorizer:
  """The vectorizer of these arrays.

  Raises:
    KeyError: one is missing.
    ValueError: they contradict each other.
  """
  if "terms" not in arrays:
    return Vectorizer(kind, width)
  terms = tuple(arrays["terms"].tobytes().decode().split("\n"))
  idf, projection = arrays["idf"], arrays["projection"]
  if idf.shape != (len(terms),) or projection.shape[:1] != (len(terms),):
    raise ValueError(
      f"{len(terms)} terms, idf {idf.shape}, projection {projection.shape}"
    )
  content = Content(terms, idf, projection)
  found = reads = projection.shape[1]
  weights = aligner = None
  if kind == "aligned":
    aligner = Aligner.from_arrays(arrays)
    reads, found = aligner.token_width, aligner.width
  elif kind != "content":
    weights = arrays["ridge"]
    reads = weights.shape[0]
    found = weights.shape[1] + (found if kind == "fused" else 0)
  if reads != projection.shape[1]:
    raise ValueError(f"projection {projection.shape}, read as if {reads} wide")
  if found != width:
    raise ValueError(f"width {found}, not {width}")
  return Vectorizer(kind, width, content, weights, aligner)


def exists(folder: files.PathLike) -> bool:
  """Whether a folder holds a finished vectorizer."""
  return _FILES.exists(pathlib.Path(folder))


def array_bytes(array: np.ndarray) -> bytes:
  """The content of an .npy file."""
  buffer = io.BytesIO()
  np.save(buffer, array, allow_pickle=False)
  return buffer.getvalue()
