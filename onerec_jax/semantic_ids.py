"""The semantic-ID artefact: codes, codebooks, reverse index, quality report.

A folder `<workdir>/semantic_ids/<fingerprint>/` holds `semantic_ids.npz`
(codes and codebooks) and `semantic_ids.json` (format version, sizes, report
and the checksum of the first). The JSON is written last, so a folder with it
is whole.
"""

import dataclasses
import io
import math
import pathlib
import zipfile
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from onerec_jax import files

FORMAT_VERSION = 1
_JSON = "semantic_ids.json"
_NPZ = "semantic_ids.npz"

# Below these an artefact is refused (INFERRED; OneRec-V1, Table 11, has every
# code in use and 97% of the maximum entropy).
MIN_ENTROPY_SHARE = 0.5
MIN_UTILISATION = 0.3
MAX_IN_COLLISIONS = 0.5
MIN_DISTINCT_VECTORS = 0.2
MIN_ITEMS_TO_JUDGE = 32
MIN_ITEMS_PER_CODE = 2
"""With fewer, or in smaller catalogues, nothing is judged."""
MIN_ITEMS_PER_LATER_CODE = 16
"""With fewer, levels after the first are not judged: where a first code has a
handful of items, what it leaves over is small and sparse by nature."""

NUM_NEIGHBOURS = 10
NEIGHBOUR_SAMPLE = 2000


class CodebookCollapseError(ValueError):
  """Semantic IDs that tell too few items apart to be trained on."""


class FormatError(ValueError):
  """An artefact that is broken or newer than this program."""


@dataclasses.dataclass(frozen=True)
class SemanticIds:
  """Codes of every item.

  Attributes:
    codes: int32 [I + 1, L]; row 0 is padding (zeros).
    codebook_sizes: K of each level, the extra collision level included.
    codebooks: float32 [K_l, D] of each level; none for an extra level.
    fingerprint: names the config and the inputs.
    report: `quality_report`.
    collisions: how they were handled: `keep`, `extra` or `assign`.
  """

  codes: Int[np.ndarray, "I1 L"]
  codebook_sizes: tuple[int, ...]
  codebooks: list[Float[np.ndarray, "_ D"]]
  fingerprint: str
  report: dict[str, Any]
  collisions: str = "keep"

  @property
  def num_items(self) -> int:
    """Items without padding."""
    return self.codes.shape[0] - 1

  def groups(self) -> dict[tuple[int, ...], np.ndarray]:
    """The reverse index: semantic ID → its item ids, ascending."""
    codes = self.codes[1:]
    order = np.lexsort(codes.T[::-1])
    ordered = codes[order]
    new = np.any(ordered[1:] != ordered[:-1], axis=1)
    starts = np.flatnonzero(np.concatenate([[True], new]))
    members = np.split(order.astype(np.int32) + 1, starts[1:])
    return dict(zip(map(tuple, ordered[starts].tolist()), members))

  def save(self, folder: files.PathLike) -> None:
    """Writes the two files, each atomically, the JSON last."""
    folder = pathlib.Path(folder)
    # Without the old JSON a half-written pair cannot pass for a whole one.
    (folder / _JSON).unlink(missing_ok=True)
    books = {f"codebook_{i}": book for i, book in enumerate(self.codebooks)}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, codes=self.codes, **books)
    files.write_bytes(folder / _NPZ, buffer.getvalue())
    header = {
      "format_version": FORMAT_VERSION,
      "fingerprint": self.fingerprint,
      "num_items": self.num_items,
      "codebook_sizes": list(self.codebook_sizes),
      "num_codebooks": len(self.codebooks),
      "collisions": self.collisions,
      "sha256": files.sha256(folder / _NPZ),
      "report": self.report,
    }
    files.write_json(folder / _JSON, header)

  @classmethod
  def load(cls, folder: files.PathLike) -> "SemanticIds":
    """Reads and checks an artefact.

    Raises:
      FileNotFoundError: there is none.
      FormatError: it is broken or of a newer format; names file and cause.
    """
    folder = pathlib.Path(folder)
    if not exists(folder):
      raise FileNotFoundError(
        f"no semantic IDs in {folder}; run `python -m launch.tokenize` first"
      )
    header = files.read_json(folder / _JSON)
    _check_header(folder, header)
    try:
      with np.load(folder / _NPZ, allow_pickle=False) as arrays:
        codes = arrays["codes"]
        codebooks = [
          arrays[f"codebook_{i}"] for i in range(header["num_codebooks"])
        ]
    except (KeyError, ValueError, zipfile.BadZipFile) as error:
      raise _broken(folder / _NPZ, str(error)) from error
    sizes = tuple(header["codebook_sizes"])
    _check_arrays(folder / _NPZ, header, codes, codebooks)
    return cls(
      codes=codes,
      codebook_sizes=sizes,
      codebooks=codebooks,
      fingerprint=header["fingerprint"],
      report=header["report"],
      collisions=header["collisions"],
    )


def _broken(path: pathlib.Path, cause: str) -> FormatError:
  return FormatError(
    f"{path} is broken: {cause}. Delete the folder {path.parent} and run "
    "`python -m launch.tokenize` again"
  )


def _check_header(folder: pathlib.Path, header: Any) -> None:
  path = folder / _JSON
  if not isinstance(header, dict) or "format_version" not in header:
    raise _broken(path, "it has no format_version")
  version = header["format_version"]
  if version != FORMAT_VERSION:
    raise FormatError(
      f"{path} has format version {version}, this program reads "
      f"{FORMAT_VERSION}; update onerec_jax, or delete the folder and run "
      "`python -m launch.tokenize` again"
    )
  keys = {"fingerprint", "num_items", "codebook_sizes", "num_codebooks"}
  missing = (keys | {"collisions", "sha256", "report"}) - set(header)
  if missing:
    raise _broken(path, f"it lacks {sorted(missing)}")
  if not (folder / _NPZ).is_file():
    raise _broken(folder / _NPZ, "the file is missing")
  if files.sha256(folder / _NPZ) != header["sha256"]:
    raise _broken(folder / _NPZ, f"its checksum is not the one in {_JSON}")


def _check_arrays(
  path: pathlib.Path,
  header: dict[str, Any],
  codes: np.ndarray,
  codebooks: list[np.ndarray],
) -> None:
  sizes = header["codebook_sizes"]
  expected = (header["num_items"] + 1, len(sizes))
  if codes.dtype != np.int32 or codes.shape != expected:
    raise _broken(
      path, f"codes are {codes.dtype} {codes.shape}, not int32 {expected}"
    )
  if codes[0].any():
    raise _broken(path, "row 0 of the codes is not padding (zeros)")
  if (codes < 0).any() or (codes >= np.array(sizes)[None]).any():
    raise _broken(path, f"codes lie outside the codebook sizes {sizes}")
  for level, book in enumerate(codebooks):
    if book.dtype != np.float32 or book.shape[:1] != (sizes[level],):
      raise _broken(path, f"codebook {level} is {book.dtype} {book.shape}")


def root(workdir: files.PathLike) -> pathlib.Path:
  """Where a work directory keeps its semantic IDs."""
  return pathlib.Path(workdir) / "semantic_ids"


def exists(folder: files.PathLike) -> bool:
  """Whether a folder holds a finished artefact."""
  return (pathlib.Path(folder) / _JSON).is_file()


def find(workdir: files.PathLike, fingerprint: str) -> pathlib.Path:
  """The folder of one artefact, for `SemanticIds.load`.

  Raises:
    FileNotFoundError: it is not there; names those that are.
  """
  folder = root(workdir) / fingerprint
  if exists(folder):
    return folder
  there = sorted(p.parent.name for p in root(workdir).glob(f"*/{_JSON}"))
  raise FileNotFoundError(
    f"no semantic IDs {fingerprint} in {root(workdir)} (there: "
    f"{there or 'none'}); run `python -m launch.tokenize` with the config of "
    "the run, on the same prepared data"
  )


def latest(workdir: files.PathLike) -> pathlib.Path:
  """The folder of the artefact written last.

  Raises:
    FileNotFoundError: there is none.
  """
  found = list(root(workdir).glob(f"*/{_JSON}"))
  if not found:
    raise FileNotFoundError(
      f"no semantic IDs in {root(workdir)}; run `python -m launch.tokenize`"
    )
  return max(found, key=lambda path: path.stat().st_mtime_ns).parent


def quality_report(
  codes: Int[np.ndarray, "I L"],
  codebook_sizes: tuple[int, ...],
  vectors: Float[np.ndarray, "I D"] | None = None,
  reconstruction: Float[np.ndarray, "I D"] | None = None,
) -> dict[str, Any]:
  """How well codes tell items apart, and like items alike.

  Args:
    codes: [I, L] without the padding row.
    codebook_sizes: K of each level.
    vectors: [I, D] what was coded.
    reconstruction: [I, D] the sum of the chosen centroids.

  Returns:
    A JSON-ready dict. Per level: `utilisation` (share of codes in use),
    `entropy` (nats) and `entropy_share` (of ln K; 1 where K is 1). For all:
    `num_items`, `collision_rate` (1 − distinct IDs / I), `in_collisions`
    (share of items whose ID another item has), `largest_group`; with vectors
    `distinct_vectors` (share) and `neighbour_agreement` (share of the 10
    nearest neighbours that share the first code, over at most 2,000 items
    evenly spaced) beside `chance_agreement`; with a reconstruction
    `relative_error` (mean squared error / variance).
  """
  levels = [_level_report(c, k) for c, k in zip(codes.T, codebook_sizes)]
  _, sizes = np.unique(codes, axis=0, return_counts=True)
  report = {
    "num_items": len(codes),
    "codebook_sizes": [int(k) for k in codebook_sizes],
    "levels": levels,
    "collision_rate": 1 - len(sizes) / len(codes),
    "in_collisions": float(sizes[sizes > 1].sum() / len(codes)),
    "largest_group": int(sizes.max()),
  }
  if vectors is not None:
    distinct = len(np.unique(vectors, axis=0))
    report["distinct_vectors"] = distinct / len(codes)
    if len(codes) > 1:
      report |= _neighbour_agreement(vectors, codes[:, 0])
  if vectors is not None and reconstruction is not None:
    variance = float(np.var(vectors, axis=0, dtype=np.float64).sum())
    error = np.square(vectors - reconstruction, dtype=np.float64)
    error = float(error.sum(axis=1).mean())
    report["relative_error"] = error / variance if variance > 0 else 0.0
  return report


def _level_report(codes: Int[np.ndarray, "I"], size: int) -> dict[str, float]:
  counts = np.bincount(codes, minlength=size)
  share = counts[counts > 0] / len(codes)
  # The sum is −0.0 where one code has all.
  entropy = abs(float(np.sum(share * np.log(share))))
  return {
    "utilisation": len(share) / size,
    "entropy": entropy,
    "entropy_share": entropy / math.log(size) if size > 1 else 1.0,
  }


def _neighbour_agreement(
  vectors: Float[np.ndarray, "I D"], first: Int[np.ndarray, "I"]
) -> dict[str, float]:
  items = len(vectors)
  sample = np.unique(np.linspace(0, items - 1, NEIGHBOUR_SAMPLE).astype(int))
  count = min(NUM_NEIGHBOURS, items - 1)
  norms = np.square(vectors).sum(axis=1)
  agree = []
  for rows in np.array_split(sample, math.ceil(len(sample) / 256)):
    distances = norms[None] - 2 * vectors[rows] @ vectors.T
    distances[np.arange(len(rows)), rows] = np.inf
    near = np.argpartition(distances, count - 1, axis=1)[:, :count]
    agree.append(first[near] == first[rows][:, None])
  share = np.bincount(first) / items
  return {
    "neighbour_agreement": float(np.concatenate(agree).mean()),
    "chance_agreement": float(np.square(share).sum()),
  }


def check_collapse(report: dict[str, Any], fitted_levels: int) -> None:
  """Refuses semantic IDs that have collapsed.

  Catalogues of fewer than 32 items, or of fewer than two items a code, are
  not judged: their figures are noise. The use of later levels is judged from
  16 items a code on.

  Args:
    report: `quality_report`.
    fitted_levels: levels with a codebook (an extra level's use says nothing).

  Raises:
    CodebookCollapseError: with the figures and what to change.
  """
  sizes = report["codebook_sizes"][:fitted_levels]
  items = report["num_items"]
  if items < MIN_ITEMS_TO_JUDGE or items < MIN_ITEMS_PER_CODE * max(sizes):
    return
  faults = []
  entropy = report["levels"][0]["entropy_share"]
  if entropy < MIN_ENTROPY_SHARE:
    faults.append(
      f"level 1 has {entropy:.1%} of the maximum entropy "
      f"(at least {MIN_ENTROPY_SHARE:.0%} expected)"
    )
  for number, level in enumerate(report["levels"][:fitted_levels], 1):
    least = MIN_ITEMS_PER_CODE if number == 1 else MIN_ITEMS_PER_LATER_CODE
    if items < least * sizes[number - 1]:
      continue
    if level["utilisation"] < MIN_UTILISATION:
      faults.append(
        f"level {number} uses {level['utilisation']:.1%} of its codes "
        f"(at least {MIN_UTILISATION:.0%} expected)"
      )
  if report["in_collisions"] > MAX_IN_COLLISIONS:
    faults.append(
      f"{report['in_collisions']:.1%} of the items share their semantic ID "
      f"(at most {MAX_IN_COLLISIONS:.0%} expected)"
    )
  distinct = report.get("distinct_vectors", 1.0)
  if distinct < MIN_DISTINCT_VECTORS:
    faults.append(
      f"only {distinct:.1%} of the item vectors differ "
      f"(at least {MIN_DISTINCT_VECTORS:.0%} expected)"
    )
  if faults:
    raise CodebookCollapseError(
      f"the semantic IDs of {items} items have collapsed: "
      + "; ".join(faults)
      + ". Give vectors that tell items apart (tokenizer.vectors=fused, "
      "longer item texts, a better embedding matrix), or spread the codes "
      "(tokenizer.balance=capped, tokenizer.collisions=assign), or ask for "
      "fewer codes (tokenizer.num_codes, tokenizer.num_levels)"
    )
