"""Files written whole or not at all, and fingerprints of what made them."""

import hashlib
import json
import os
import pathlib
import tempfile
from typing import Any

import numpy as np

PathLike = str | os.PathLike[str]


def write_bytes(path: PathLike, content: bytes) -> None:
  """Writes a file under a temporary name, then renames it into place."""
  path = pathlib.Path(path)
  path.parent.mkdir(parents=True, exist_ok=True)
  handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
  try:
    with os.fdopen(handle, "wb") as file:
      file.write(content)
    # mkstemp makes the file private; artefacts are as readable as the rest.
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)
  except BaseException:
    pathlib.Path(temporary).unlink(missing_ok=True)
    raise


def write_json(path: PathLike, value: Any) -> None:
  """Writes indented JSON atomically; dataclasses go through `asdict` first."""
  write_bytes(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: PathLike) -> Any:
  """Reads JSON; a broken file is refused by name.

  Raises:
    ValueError: the file is not JSON.
    FileNotFoundError: there is no such file.
  """
  try:
    return json.loads(pathlib.Path(path).read_text())
  except (json.JSONDecodeError, UnicodeDecodeError) as error:
    raise ValueError(
      f"{path} is not readable JSON ({error}); delete it and run the step "
      "that writes it again"
    ) from error


def sha256(path: PathLike) -> str:
  """The hex SHA-256 of a file's content, read in chunks."""
  with open(path, "rb") as file:
    return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(*parts: Any) -> str:
  """Twelve hex digits that change when any part changes.

  Args:
    *parts: arrays (their bytes, shape and dtype count) or JSON values.
  """
  digest = hashlib.sha256()
  for part in parts:
    if isinstance(part, np.ndarray):
      digest.update(f"{part.dtype}{part.shape}".encode())
      digest.update(np.ascontiguousarray(part).tobytes())
    else:
      digest.update(json.dumps(part, sort_keys=True).encode())
    digest.update(b"\0")
  return digest.hexdigest()[:12]
