"""The report's pictures: each as a PNG for light and one for dark pages."""

import base64
import dataclasses
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import axes, figure, ticker
from matplotlib.backends import backend_agg

from onerec_jax.evaluation import bootstrap, result

# Inches as small as a phone, so that 10-point text stays readable there.
_WIDTH, _DPI = 4.8, 200


@dataclasses.dataclass(frozen=True)
class _Theme:
  ink: str
  faint: str
  series: tuple[str, ...]


_LIGHT = _Theme(
  ink="#22252b",
  faint="#d4d7dd",
  series=("#2f5fd0", "#d1602b", "#2b8a57", "#8b4fb8", "#a8851a", "#5b6470"),
)
_DARK = _Theme(
  ink="#e4e6ea",
  faint="#3c424c",
  series=("#7ea6ff", "#ff9d6b", "#63cf97", "#c99bf0", "#e0bf55", "#a6afbd"),
)


@dataclasses.dataclass(frozen=True)
class Picture:
  """One plot.

  Attributes:
    light: data URI of a PNG for light pages.
    dark: the same for dark pages.
    alt: what it shows, in words.
  """

  light: str
  dark: str
  alt: str


def _picture(
  draw: Callable[[axes.Axes, _Theme], None], alt: str, height: float
) -> Picture:
  """Draws once a theme, on a transparent ground."""
  uris = []
  for theme in (_LIGHT, _DARK):
    # The object interface: pyplot would keep every figure in global state.
    canvas = figure.Figure(
      figsize=(_WIDTH, height), dpi=_DPI, layout="constrained"
    )
    backend_agg.FigureCanvasAgg(canvas)
    plane = canvas.add_subplot()
    draw(plane, theme)
    plane.spines[["top", "right"]].set_visible(False)
    plane.spines[["left", "bottom"]].set_color(theme.faint)
    plane.tick_params(colors=theme.ink, length=0, labelsize=9)
    plane.xaxis.label.set_color(theme.ink)
    plane.yaxis.label.set_color(theme.ink)
    plane.xaxis.set_major_locator(ticker.MaxNLocator(5))
    plane.set_axisbelow(True)
    legend = plane.get_legend()
    if legend is not None:
      for text in legend.get_texts():
        text.set_color(theme.ink)
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png", transparent=True)
    encoded = base64.b64encode(buffer.getvalue()).decode()
    uris.append(f"data:image/png;base64,{encoded}")
  return Picture(*uris, alt=alt)


def curves(
  runs: Mapping[str, Sequence[Mapping[str, Any]]], kind: str, key: str
) -> Picture | None:
  """A logged figure over steps, one line a run.

  Args:
    runs: name → records of its metrics.jsonl.
    kind: `train` or `validation`.
    key: such as `loss`; records without it are passed over.

  Returns:
    None where no run has logged it.
  """
  lines = {}
  for name, records in runs.items():
    points = [
      (r["step"], r[key])
      for r in records
      if r.get("kind") == kind
      and _is_number(r.get("step"))
      and _is_number(r.get(key))
    ]
    if points:
      lines[name] = np.array(sorted(points), np.float64)
  if not lines:
    return None

  def draw(plane: axes.Axes, theme: _Theme) -> None:
    for index, (name, points) in enumerate(lines.items()):
      plane.plot(
        *points.T,
        color=theme.series[index % len(theme.series)],
        linewidth=1.8,
        marker="o" if len(points) < 40 else "",
        markersize=3.5,
        label=_plain(name),
      )
    plane.set_xlabel("step")
    plane.set_ylabel(f"{kind} {key}")
    plane.grid(color=theme.faint, linewidth=0.6)
    if len(lines) > 1:
      plane.legend(frameon=False, fontsize=9)

  return _picture(draw, f"{kind} {key} over steps", 2.8)


def metric_intervals(
  evaluations: Sequence[result.Evaluation], metric: str
) -> Picture:
  """Each model's metric with its interval, unfiltered and seen-filtered."""
  rows = []
  for evaluation in evaluations:
    keys = (metric, f"filtered/{metric}")
    values = np.stack([evaluation.per_query[k] for k in keys], axis=1)
    rows.append(bootstrap.intervals(values, evaluation.user))

  def draw(plane: axes.Axes, theme: _Theme) -> None:
    labels = ("unfiltered", "seen-filtered")
    for column, label in enumerate(labels):
      found = [row[column] for row in rows]
      place = np.arange(len(rows)) + (column - 0.5) * 0.26
      color = theme.series[column]
      plane.hlines(
        place,
        [i.low for i in found],
        [i.high for i in found],
        color=color,
        linewidth=2.4,
      )
      plane.plot([i.mean for i in found], place, "o", color=color, label=label)
    plane.set_yticks(
      np.arange(len(rows)), [_plain(e.name) for e in evaluations]
    )
    plane.set_ylim(len(rows) - 0.4, -0.6)
    plane.set_xlim(left=0)
    plane.set_xlabel(f"{metric}, {bootstrap.LEVEL:.0%} interval over users")
    plane.grid(axis="x", color=theme.faint, linewidth=0.6)
    plane.legend(
      frameon=False,
      fontsize=9,
      loc="lower left",
      bbox_to_anchor=(0, 1),
      ncols=2,
      borderaxespad=0,
    )

  height = 1.2 + 0.5 * len(rows)
  return _picture(draw, f"{metric} of each model with intervals", height)


def code_usage(codes: np.ndarray, size: int, level: int) -> Picture:
  """Items of each code of one level, most used code first.

  Args:
    codes: [I] codes of the level.
    size: K.
    level: from 1, for the label.
  """
  counts = np.sort(np.bincount(codes, minlength=size))[::-1]

  def draw(plane: axes.Axes, theme: _Theme) -> None:
    plane.fill_between(
      np.arange(size + 1),
      np.append(counts, counts[-1]),
      step="post",
      color=theme.series[0],
      alpha=0.85,
      linewidth=0,
    )
    plane.axhline(
      len(codes) / size, color=theme.series[1], linewidth=1.4, linestyle="--"
    )
    plane.text(
      size, len(codes) / size, "even ", color=theme.series[1], ha="right",
      va="bottom", fontsize=9,
    )  # fmt: skip
    plane.set_xlim(0, size)
    plane.set_ylim(bottom=0)
    plane.set_xlabel(f"codes of level {level}, most used first")
    plane.set_ylabel("items")
    plane.yaxis.set_major_locator(ticker.MaxNLocator(4, integer=True))

  return _picture(draw, f"items of each code of level {level}", 2.2)


def _is_number(value: Any) -> bool:
  return (
    isinstance(value, int | float)
    and not isinstance(value, bool)
    and bool(np.isfinite(value))
  )


def _plain(text: str) -> str:
  # A dollar sign would start matplotlib's formula mode; a leading underscore
  # would hide the line from the legend.
  return " " + text.replace("$", r"\$")
