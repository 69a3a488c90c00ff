"""Lifelong histories compressed for training: a step of data preparation.

Compressing a history anew for every target would be far too slow, so it is
done ahead, at every `lifelong.every` events of a user; a target sees the latest
snapshot that lies before its request. Under <workdir>/lifelong/<fingerprint>:

  users-….array_record  one record a user: all snapshots, int32 throughout:
                        user, snapshots, features C; then for each snapshot
                        until, R, event [R], size [R], averages [C, R]
  users-….json          its checksum and counts; written last, so a shard with
                        one is whole and a run cut off goes on after it
  vectors.npy           the item vectors, to compress histories of requests
  manifest.json         format_version fingerprint features every cap
                        users events snapshots clustered_events representatives
                        seconds events_per_second shards
"""

import os
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from onerec_jax import config as config_lib
from onerec_jax import files
from onerec_jax.data import lifelong, shards

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
_VECTORS = "vectors.npy"
_COUNTS = ("users", "events", "snapshots", "clustered_events",
           "representatives")  # fmt: skip
OnUser = Callable[[int], None]
"""Told of each user that is done, by index."""


def root(workdir: files.PathLike) -> pathlib.Path:
  """Where the snapshots of a work directory lie."""
  return pathlib.Path(workdir) / "lifelong"


def fingerprint(
  config: config_lib.LifelongConfig, cap: int, prepared: str, vectors: str
) -> str:
  """Names the snapshots made of these inputs.

  Args:
    config: how histories are compressed.
    cap: the most representatives of one.
    prepared: the data's fingerprint.
    vectors: the fingerprint of the semantic IDs that item vectors belong to.
  """
  return files.fingerprint(
    FORMAT_VERSION, config_lib.to_dict(config), cap, prepared, vectors
  )


class Snapshots:
  """Random access to the snapshots of prepared users; picklable.

  Attributes:
    manifest: see the module docstring.
    vectors: float32 [I, D], row i = item i + 1.
  """

  def __init__(self, folder: pathlib.Path, config: config_lib.LifelongConfig):
    self._folder = folder
    self._config = config
    self.manifest = files.read_json(folder / MANIFEST)
    self.vectors = np.load(folder / _VECTORS, mmap_mode="r")
    sizes = [shard["users"] for shard in self.manifest["shards"]]
    self._starts = np.cumsum([0, *sizes])
    self._readers: dict[int, Any] = {}
    self._pid = os.getpid()

  @classmethod
  def open(
    cls,
    workdir: files.PathLike,
    name: str,
    config: config_lib.LifelongConfig,
  ) -> "Snapshots":
    """Opens the snapshots of this fingerprint.

    Raises:
      ValueError: there are none, or a shard is missing or changed.
    """
    folder = root(workdir) / name
    if not (folder / MANIFEST).is_file():
      raise ValueError(
        f"{folder} holds no compressed histories; run python -m "
        "launch.compress with the run's config and this work directory"
      )
    opened = cls(folder, config)
    for shard in opened.manifest["shards"]:
      _check(folder, shard)
    return opened

  def __reduce__(self):
    return Snapshots, (self._folder, self._config)

  def user(self, index: int) -> list[lifelong.Snapshot]:
    """The snapshots of dense user `index` + 1, oldest first."""
    shard = int(np.searchsorted(self._starts, index, side="right")) - 1
    if self._pid != os.getpid():
      # As in shards.py: a fork must not share readers.
      self._readers, self._pid = {}, os.getpid()
    if shard not in self._readers:
      name = self.manifest["shards"][shard]["name"]
      self._readers[shard] = shards.reader(self._folder / name)
    place = int(index - self._starts[shard])
    content = self._readers[shard].read([place])[0]
    return decode(content, self.manifest["features"])

  def before(self, index: int, event: int) -> lifelong.Snapshot | None:
    """The latest snapshot of nothing but what came before an event."""
    if event < self._config.every:
      return None
    found = [s for s in self.user(index) if s.until <= event]
    return found[-1] if found else None

  def of_history(
    self,
    items: Int[np.ndarray, "n"],
    features: Mapping[str, np.ndarray],
  ) -> lifelong.Snapshot | None:
    """The snapshot that a stored user with this history would have.

    Args:
      items: dense ids, oldest first.
      features: event features, bucketed.
    """
    until = len(items) // self._config.every * self._config.every
    if not until:
      return None
    averaged = {
      name: features[name][:until] for name in self.manifest["features"]
    }
    return lifelong.compress(
      items[:until], averaged, self.vectors, self._config, self.manifest["cap"]
    )


def encode(user: int, snapshots: list[lifelong.Snapshot], count: int) -> bytes:
  """A user's snapshots as bytes, with `count` continuous features."""
  parts = [np.asarray([user, len(snapshots), count])]
  for snapshot in snapshots:
    parts += [
      np.asarray([snapshot.until, len(snapshot.event)]),
      snapshot.event,
      snapshot.size,
      *snapshot.averages.values(),
    ]
  return np.concatenate(parts).astype("<i4").tobytes()


def decode(content: bytes, features: list[str]) -> list[lifelong.Snapshot]:
  """The inverse of `encode`.

  Raises:
    ValueError: the bytes hold other features, or another number of values.
  """
  values = np.frombuffer(content, "<i4")
  place, found = 3, []
  for _ in range(int(values[1])):
    until, rows = values[place : place + 2].tolist()
    stop = place + 2 + rows * (2 + len(features))
    body = values[place + 2 : stop]
    if values[2] != len(features) or len(body) != stop - place - 2:
      break
    body = body.reshape(-1, rows)
    averages = dict(zip(features, body[2:]))
    found.append(lifelong.Snapshot(until, body[0], body[1], averages))
    place = stop
  if place != len(values) or len(found) != values[1]:
    raise ValueError(
      f"a record of {len(values)} numbers does not hold {values[1]} snapshots "
      f"of the features {features}; delete its folder and run launch.compress "
      "again"
    )
  return found


def compress(
  config: config_lib.LifelongConfig,
  cap: int,
  prepared: shards.PreparedData,
  vectors: Float[np.ndarray, "I D"],
  vectors_name: str,
  workdir: files.PathLike,
  on_user: OnUser = lambda user: None,
) -> Snapshots:
  """Compresses the histories of all users; goes on where it was cut off.

  Args:
    config: how.
    cap: the most representatives of one history.
    prepared: the data.
    vectors: of the items, row i = item i + 1.
    vectors_name: the fingerprint of the semantic IDs they belong to.
    workdir: they go to <workdir>/lifelong/<fingerprint>/.
    on_user: told of each user done.

  Raises:
    ValueError: a setting that allows no representative.
  """
  _check_settings(config, cap)
  print_ = prepared.manifest["fingerprint"]
  name = fingerprint(config, cap, print_, vectors_name)
  folder = root(workdir) / name
  if (folder / MANIFEST).is_file():
    return Snapshots.open(workdir, name, config)
  folder.mkdir(parents=True, exist_ok=True)
  starts = shards.shard_starts(len(prepared), len(prepared.manifest["shards"]))
  features = lifelong.continuous(prepared.manifest["bucketing"]["event"])
  written = []
  for shard, (first, stop) in enumerate(zip(starts, starts[1:])):
    path = folder / f"users-{shard:05d}-of-{len(starts) - 1:05d}.array_record"
    done = path.with_suffix(".json")
    if not done.is_file():
      compressor = _Compressor(config, cap, features, vectors)
      counts = compressor.write(path, prepared, range(first, stop), on_user)
      entry = {"name": path.name, "sha256": files.sha256(path), **counts}
      files.write_json(done, entry)
    written.append(files.read_json(done))
  temporary = folder / f".{_VECTORS}"
  with open(temporary, "wb") as file:
    np.save(file, np.asarray(vectors, np.float32), allow_pickle=False)
  os.replace(temporary, folder / _VECTORS)
  files.write_json(
    folder / MANIFEST, _manifest(written) | {
      "fingerprint": name, "features": features, "every": config.every,
      "cap": cap,
    },
  )  # fmt: skip
  return Snapshots.open(workdir, name, config)


class _Compressor:
  """Writes one shard."""

  def __init__(
    self,
    config: config_lib.LifelongConfig,
    cap: int,
    features: list[str],
    vectors: np.ndarray,
  ):
    self.config, self.cap = config, cap
    self.features, self.vectors = features, vectors

  def write(
    self,
    path: pathlib.Path,
    prepared: shards.PreparedData,
    users: range,
    on_user: OnUser,
  ) -> dict[str, int | float]:
    """Writes the users of a shard; gives counts and seconds."""
    counts = dict.fromkeys(_COUNTS, 0)
    start = time.perf_counter()
    temporary = path.with_name(f".{path.name}")
    writer = shards.writer(temporary)
    for user in users:
      record = prepared.user(user)
      found = self.snapshots(record)
      writer.write(encode(record.user, found, len(self.features)))
      counts["users"] += 1
      counts["events"] += len(record.items)
      counts["snapshots"] += len(found)
      counts["clustered_events"] += sum(
        min(s.until, self.config.max_events) for s in found
      )
      counts["representatives"] += sum(len(s.event) for s in found)
      on_user(user)
    writer.close()
    os.replace(temporary, path)
    return counts | {"seconds": time.perf_counter() - start}

  def snapshots(self, record: shards.UserRecord) -> list[lifelong.Snapshot]:
    """One every so many events, of all events before it."""
    every = self.config.every
    return [
      lifelong.compress(
        record.items[:until],
        {name: record.features[name][:until] for name in self.features},
        self.vectors,
        self.config,
        self.cap,
      )
      for until in range(every, len(record.items) + 1, every)
    ]


def _check_settings(config: config_lib.LifelongConfig, cap: int) -> None:
  if cap < 1:
    raise ValueError(
      f"pipeline.pathways.lifelong={cap} leaves no representative; set, say, "
      "--config.pipeline.pathways.lifelong=2000"
    )
  for name in ("every", "max_items", "max_events", "iterations"):
    if getattr(config, name) < 1:
      raise ValueError(
        f"lifelong.{name}={getattr(config, name)} must be at least 1"
      )


def _manifest(written: list[dict[str, Any]]) -> dict[str, Any]:
  totals = {name: sum(s[name] for s in written) for name in _COUNTS}
  seconds = sum(shard["seconds"] for shard in written)
  return {
    "format_version": FORMAT_VERSION,
    **totals,
    "seconds": round(seconds, 3),
    "events_per_second": round(totals["clustered_events"] / seconds, 1),
    "shards": written,
  }


def _check(folder: pathlib.Path, shard: Mapping[str, Any]) -> None:
  path = folder / shard["name"]
  if not path.is_file() or files.sha256(path) != shard["sha256"]:
    raise ValueError(
      f"{path} is missing or changed; delete {folder} and run launch.compress "
      "again"
    )
