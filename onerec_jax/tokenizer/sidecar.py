"""Files beside the semantic IDs: arrays or tables, and a JSON that vouches.

The JSON has a format version and the checksum of each file. It is written
last, so a folder with it is whole.
"""

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from onerec_jax import files, semantic_ids

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Sidecar:
  """One kind of such files.

  Attributes:
    name: of the JSON.
    keys: what the JSON says besides version and checksums.
    contents: names of the other files.
    remedy: what to do where one is broken.
  """

  name: str
  keys: frozenset[str]
  contents: tuple[str, ...]
  remedy: str

  def exists(self, folder: pathlib.Path) -> bool:
    """Whether a folder holds finished ones."""
    return (folder / self.name).is_file()

  def write(
    self,
    folder: pathlib.Path,
    header: Mapping[str, Any],
    contents: Mapping[str, bytes],
  ) -> None:
    """Writes the files, each atomically, then the JSON."""
    # Without the old JSON half-written files cannot pass for whole ones.
    (folder / self.name).unlink(missing_ok=True)
    for name, content in contents.items():
      files.write_bytes(folder / name, content)
    sums = {name: files.sha256(folder / name) for name in contents}
    files.write_json(
      folder / self.name,
      {"format_version": FORMAT_VERSION, **header, "sha256": sums},
    )

  def read(self, folder: pathlib.Path) -> dict[str, Any]:
    """The JSON, once it and the files it vouches for are found whole.

    Raises:
      FormatError: broken or of another format; names file and cause.
    """
    path = folder / self.name
    header = files.read_json(path)
    if not isinstance(header, dict) or "format_version" not in header:
      raise self.broken(path, "it has no format_version")
    version = header["format_version"]
    if version != FORMAT_VERSION:
      raise semantic_ids.FormatError(
        f"{path} has format version {version}, this program reads "
        f"{FORMAT_VERSION}; update onerec_jax, or {self.remedy}"
      )
    missing = (self.keys | {"sha256"}) - set(header)
    if missing:
      raise self.broken(path, f"it lacks {sorted(missing)}")
    for name in self.contents:
      if not (folder / name).is_file():
        raise self.broken(folder / name, "the file is missing")
      if files.sha256(folder / name) != header["sha256"].get(name):
        cause = f"its checksum is not the one in {self.name}"
        raise self.broken(folder / name, cause)
    return header

  def load_array(self, path: pathlib.Path) -> np.ndarray:
    """Reads an .npy file.

    Raises:
      FormatError: it is none.
    """
    try:
      return np.load(path, allow_pickle=False)
    except ValueError as error:
      raise self.broken(path, str(error)) from error

  def broken(self, path: pathlib.Path, cause: str) -> semantic_ids.FormatError:
    """What to raise for a file that cannot be used."""
    return semantic_ids.FormatError(
      f"{path} is broken: {cause}. To mend it, {self.remedy}"
    )
