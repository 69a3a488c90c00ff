"""Prepares a log anew for a model that is trained already.

Preparation fits the codes of categories to the training events: the most
frequent is 1. With more events the same category may get another code, and a
new one may get its own, which a trained embedding knows nothing of. `rebucket`
gives prepared data the codes of the data a model was trained on: what had no
code there has none (0), as when the model meets it in a request.
"""

import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from onerec_jax import files
from onerec_jax.data import features, shards

_TABLES = {"item": shards.ITEMS, "user": shards.USERS}


def rebucket(
  prepared: shards.PreparedData,
  manifest: Mapping[str, Any],
  directory: files.PathLike,
) -> pathlib.Path:
  """Writes prepared data again, with other data's codes.

  Args:
    prepared: the data.
    manifest: of the data the model was trained on.
    directory: to write; what is there is replaced.

  Returns:
    The directory.

  Raises:
    ValueError: features that the model does not read, or lacks.
  """
  directory = pathlib.Path(directory)
  shutil.rmtree(directory, ignore_errors=True)
  directory.mkdir(parents=True)
  old, new = manifest["bucketing"], prepared.manifest["bucketing"]
  _check(old, new, prepared.directory)
  written = []
  for kind, name in _TABLES.items():
    table = pq.read_table(prepared.directory / name)
    for feature in new[kind]:
      column = shards.FEATURE_PREFIX + feature
      codes = _translation(old[kind][feature], new[kind][feature])
      place = table.schema.get_field_index(column)
      values = codes[table[column].to_numpy()]
      table = table.set_column(place, column, pa.array(values, pa.int32()))
    pq.write_table(table, directory / name)
    written.append({"name": name, "sha256": files.sha256(directory / name)})
  users = {
    feature: _translation(old["user"][feature], spec)
    for feature, spec in new["user"].items()
  }
  files.write_json(
    directory / shards.MANIFEST,
    prepared.manifest
    | {
      "bucketing": old,
      "item_features": manifest["item_features"],
      "user_features": manifest["user_features"],
      "tables": written,
      "shards": shards.write(
        directory,
        _records(prepared, users),
        len(prepared),
        len(prepared.manifest["shards"]),
      ),
    },
  )
  return directory


def _records(
  prepared: shards.PreparedData, users: Mapping[str, np.ndarray]
) -> Iterator[shards.UserRecord]:
  for index in range(len(prepared)):
    record = prepared.user(index)
    coded = {
      name: int(users[name][code])
      for name, code in record.user_features.items()
    }
    yield record._replace(user_features=coded)


def _translation(old: features.Spec, new: features.Spec) -> np.ndarray:
  """int32 [values of the new feature]: the old code of each."""
  if old["kind"] != "codes":
    return np.arange(features.vocab_size(new), dtype=np.int32)
  known = {value: code for code, value in enumerate(old["values"], start=1)}
  return np.asarray([0, *(known.get(v, 0) for v in new["values"])], np.int32)


def _check(
  old: Mapping[str, Any], new: Mapping[str, Any], directory: pathlib.Path
) -> None:
  """Refuses what no translation of codes makes alike."""
  fitted = lambda spec: spec["kind"] if spec["kind"] == "codes" else spec
  for kind in ("event", "user", "item"):
    ours, theirs = (
      {name: fitted(spec) for name, spec in buckets[kind].items()}
      for buckets in (new, old)
    )
    if ours != theirs:
      different = sorted(
        name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)
      )
      raise ValueError(
        f"the {kind} features {different} of {directory} are not those the "
        "model was trained on; give the log the columns that it had then"
      )
