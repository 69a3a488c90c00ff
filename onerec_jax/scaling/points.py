"""What scaling laws are fitted to: trained models and their losses."""

import csv
import dataclasses
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from onerec_jax import files

REQUIRED = ("parameters", "loss")
OPTIONAL = ("tokens", "targets", "flops")
NO_ARCHITECTURE = "all"
"""The group of points that name no architecture."""


@dataclasses.dataclass(frozen=True)
class Points:
  """Trained models of one architecture, P of them.

  Attributes:
    parameters: N of each.
    loss: in nats.
    tokens: D of each, training tokens or targets; None: not known.
    flops: training FLOPs of each, the same work counted for all; None: not
      known.
    rounding: half a unit of the last digit the losses were printed with; 0:
      they are exact.
  """

  parameters: Float[np.ndarray, "P"]
  loss: Float[np.ndarray, "P"]
  tokens: Float[np.ndarray, "P"] | None = None
  flops: Float[np.ndarray, "P"] | None = None
  rounding: float = 0.0

  def __post_init__(self):
    for name in ("parameters", "loss", "tokens", "flops"):
      values = getattr(self, name)
      if values is None:
        continue
      bad = ~(np.isfinite(values) & (values > 0))
      if bad.any():
        index = int(np.flatnonzero(bad)[0])
        raise ValueError(
          f"point {index + 1}: {name}={values[index]:g} is no positive number, "
          "and a scaling law needs its logarithm; leave the run out"
        )


def read(path: files.PathLike) -> dict[str, Points]:
  """Reads points from CSV with a header, or from a JSON list of objects.

  Columns: `parameters`, `loss`; optional `tokens` or `targets` (D), `flops`,
  `architecture`. Others, such as `seed`, are not looked at: every row is a
  point of its own.

  Returns:
    Architecture → its points, in the order of the file.

  Raises:
    ValueError: no rows; a value that is missing or no positive number, with
      file, row and column; both `tokens` and `targets`.
    FileNotFoundError: there is no such file.
  """
  rows = _rows(path)
  groups: dict[str, list[dict[str, float]]] = {}
  given = {column for row in rows for column in row if row[column] is not None}
  if {"tokens", "targets"} <= given:
    raise ValueError(
      f"{path} has both tokens and targets; D is one of them: drop a column"
    )
  columns = [c for c in (*REQUIRED, *OPTIONAL) if c in {*REQUIRED, *given}]
  for index, row in enumerate(rows, start=1):
    values = {c: _number(row.get(c), path, index, c) for c in columns}
    name = str(row.get("architecture") or NO_ARCHITECTURE)
    groups.setdefault(name, []).append(values)
  found = {}
  for name, group in groups.items():
    arrays = {c: np.array([values[c] for values in group]) for c in columns}
    found[name] = Points(
      parameters=arrays["parameters"],
      loss=arrays["loss"],
      tokens=arrays.get("tokens", arrays.get("targets")),
      flops=arrays.get("flops"),
    )
  return found


def _rows(path: files.PathLike) -> Sequence[Mapping[str, Any]]:
  if pathlib.Path(path).suffix == ".csv":
    with open(path, newline="") as file:
      rows = list(csv.DictReader(file))
  else:
    rows = files.read_json(path)
  if (
    not isinstance(rows, list)
    or not rows
    or not all(isinstance(row, dict) for row in rows)
  ):
    raise ValueError(
      f"{path} holds no points: want a CSV with a header, or a JSON list of "
      f"objects, with {' and '.join(REQUIRED)}"
    )
  return rows


def _number(value: Any, path: files.PathLike, index: int, column: str) -> float:
  try:
    number = float(value)
  except (TypeError, ValueError):
    number = math.nan
  if not (math.isfinite(number) and number > 0):
    raise ValueError(
      f"{path}, row {index}, column {column!r}: {value!r} is no positive "
      "number; correct it or leave the run out"
    )
  return number
