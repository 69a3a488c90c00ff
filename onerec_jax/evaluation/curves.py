"""Curves of what runs logged, seeds together: the picture and its numbers."""

import dataclasses
import io
import math
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure
from matplotlib.backends import backend_agg

from onerec_jax import files
from onerec_jax.inference import assemble
from onerec_jax.training import metrics_writer

_COLORS = ("#2f5fd0", "#d1602b", "#2b8a57", "#8b4fb8", "#a8851a", "#5b6470")


@dataclasses.dataclass(frozen=True)
class Curve:
  """One logged figure of one model.

  Attributes:
    model: the seeds' runs joined by +.
    figure: name in metrics.jsonl, or `validation/<name>`.
    steps: [N] that all seeds logged.
    values: [seeds, N]; NaN where what was logged is not finite.
  """

  model: str
  figure: str
  steps: np.ndarray
  values: np.ndarray


def read(workdir: files.PathLike, model: str, name: str) -> Curve | None:
  """A figure over training; None if no seed logged it at a common step.

  Args:
    workdir: the work directory.
    model: a run, or seeds joined by +.
    name: of the figure, as in metrics.jsonl; of training where that and
      validation log it (`loss`), unless it begins with `validation/`.

  Raises:
    FileNotFoundError: a run has logged nothing.
  """
  found = []
  for run in model.split("+"):
    path = pathlib.Path(assemble.run_directory(workdir, run)) / "metrics.jsonl"
    records = metrics_writer.read(path)
    if not records:
      raise FileNotFoundError(f"{path}: no such file, or nothing in it yet")
    found.append(_logged(records, name))
  steps = sorted(set.intersection(*map(set, found)))
  if not steps:
    return None
  values = np.asarray([[of[step] for step in steps] for of in found], float)
  return Curve(model, name, np.asarray(steps), values)


def _logged(
  records: Sequence[Mapping[str, Any]], name: str
) -> dict[int, float | None]:
  """Step → value; None where it was not finite."""
  plain = name.removeprefix("validation/")
  kinds = ("train", "validation") if plain == name else ("validation",)
  of_kinds = [
    {r["step"]: r[plain] for r in records if r["kind"] == kind and plain in r}
    for kind in kinds
  ]
  return next(filter(None, of_kinds), {})


def as_json(curves: Sequence[Curve]) -> list[dict[str, Any]]:
  """The curves' numbers; `values` has one row for each seed, None for NaN."""
  return [
    {
      "model": curve.model,
      "figure": curve.figure,
      "steps": curve.steps.tolist(),
      "values": [
        [value if math.isfinite(value) else None for value in row]
        for row in curve.values.tolist()
      ],
    }
    for curve in curves
  ]


def draw(curves: Sequence[Curve], logarithmic: Sequence[str] = ()) -> bytes:
  """A PNG, a panel a figure: the mean of the seeds, from least to most shaded.

  Args:
    curves: of some models and figures.
    logarithmic: figures on a logarithmic axis.
  """
  figures = list(dict.fromkeys(curve.figure for curve in curves))
  models = list(dict.fromkeys(curve.model for curve in curves))
  columns = min(2, len(figures))
  rows = -(-len(figures) // columns)
  # The object interface: pyplot would keep every figure in global state.
  canvas = figure.Figure(
    (3.6 * columns + 0.4, 2.5 * rows + 0.5), dpi=200, layout="constrained"
  )
  backend_agg.FigureCanvasAgg(canvas)
  planes = canvas.subplots(rows, columns, squeeze=False).ravel()
  for name, plane in zip(figures, planes):
    for curve in (c for c in curves if c.figure == name):
      color = _COLORS[models.index(curve.model) % len(_COLORS)]
      label = curve.model.split("+")[0]
      plane.plot(curve.steps, curve.values.mean(0), color=color, label=label)
      ends = curve.values.min(0), curve.values.max(0)
      plane.fill_between(curve.steps, *ends, color=color, alpha=0.2, lw=0)
    plane.set_title(name, fontsize=9, loc="left")
    plane.set_yscale("log" if name in logarithmic else "linear")
    plane.grid(color="#d4d7dd", linewidth=0.6)
    plane.spines[["top", "right"]].set_visible(False)
    plane.tick_params(labelsize=8, length=0)
    plane.set_xlabel("step", fontsize=8)
  for plane in planes[len(figures) :]:
    plane.set_axis_off()
  handles = {}
  for plane in planes[: len(figures)]:
    found, labels = plane.get_legend_handles_labels()
    handles |= dict(zip(labels, found))
  canvas.legend(
    handles.values(), handles.keys(), frameon=False, fontsize=8,
    loc="outside upper left", ncols=3,
  )  # fmt: skip
  buffer = io.BytesIO()
  canvas.savefig(buffer, format="png", facecolor="white")
  return buffer.getvalue()
