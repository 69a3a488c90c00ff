"""The pictures of an online test, as PNG files."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import figure, ticker
from matplotlib.backends import backend_agg

from onerec_jax import files

_INK, _FAINT = "#22252b", "#d4d7dd"
_COLORS = ("#2f5fd0", "#d1602b")
_CURVES = {
  "day": {
    "stay_s": "stay time a user-day, s",
    "views": "views a user-day",
    "satisfaction": "true satisfaction",
    "cold_views": "cold-start views a user-day",
  },
  "request": {
    "watch_s": "watch time of a request, s",
    "satisfaction": "true satisfaction",
    "duration_s": "mean length shown, s",
    "topics": "topics of a request",
  },
}
"""What they are drawn over → four figures of `ab_test` and their titles."""
_DPI = 200


def forest(rows: Sequence[Mapping[str, Any]], path: files.PathLike) -> None:
  """Relative differences with their intervals, one line a figure.

  Args:
    rows: of `ab_test.compare`; those without a relative difference are passed
      over.
    path: PNG to write.
  """
  known = [row for row in rows if np.isfinite(row["relative"])]
  canvas = figure.Figure(
    (5.2, 1.0 + 0.28 * len(known)), dpi=_DPI, layout="constrained"
  )
  backend_agg.FigureCanvasAgg(canvas)
  plane = canvas.add_subplot()
  place = np.arange(len(known))
  value = 100 * np.asarray([row["relative"] for row in known])
  low = 100 * np.asarray([row["relative_low"] for row in known])
  high = 100 * np.asarray([row["relative_high"] for row in known])
  plane.axvline(0, color=_INK, linewidth=0.8)
  plane.hlines(place, low, high, color=_COLORS[0], linewidth=2.2)
  plane.plot(value, place, "o", color=_COLORS[0], markersize=4.5)
  plane.set_yticks(place, [row["figure"] for row in known])
  plane.set_ylim(len(known) - 0.4, -0.6)
  plane.set_xlabel("treatment over control, %, 95% interval over users")
  plane.grid(axis="x", color=_FAINT, linewidth=0.6)
  _save(canvas, path)


def curves(
  rows: Sequence[Mapping[str, Any]], path: files.PathLike, over: str = "day"
) -> None:
  """Four figures of both arms, day by day or request by request.

  Args:
    rows: of `ab_test.by_day` or `by_request`.
    path: PNG to write.
    over: `day` or `request`.

  Raises:
    KeyError: another.
  """
  canvas = figure.Figure((6.4, 4.4), dpi=_DPI, layout="constrained")
  backend_agg.FigureCanvasAgg(canvas)
  planes = canvas.subplots(2, 2).ravel()
  names = list(dict.fromkeys(row["arm"] for row in rows))
  for plane, (key, label) in zip(planes, _CURVES[over].items()):
    for name, color in zip(names, _COLORS):
      mine = [row for row in rows if row["arm"] == name]
      plane.plot(
        [row[over] for row in mine], [row[key] for row in mine], "o-",
        color=color, markersize=3.5, linewidth=1.8,
        # A dollar sign would start matplotlib's formula mode.
        label=" " + name.replace("$", r"\$"),
      )  # fmt: skip
    plane.set_title(label, fontsize=9, color=_INK, loc="left")
    plane.xaxis.set_major_locator(ticker.MaxNLocator(5, integer=True))
    plane.grid(color=_FAINT, linewidth=0.6)
    plane.set_xlabel(over, fontsize=9)
  canvas.legend(
    *planes[0].get_legend_handles_labels(), frameon=False, fontsize=9,
    loc="outside upper left", ncols=2,
  )  # fmt: skip
  _save(canvas, path)


def _save(canvas: figure.Figure, path: files.PathLike) -> None:
  for plane in canvas.axes:
    plane.spines[["top", "right"]].set_visible(False)
    plane.spines[["left", "bottom"]].set_color(_FAINT)
    plane.tick_params(colors=_INK, length=0, labelsize=8)
  canvas.savefig(path, facecolor="white")
