"""The picture of fitted laws: loss over parameters and over FLOPs."""

import io
from collections.abc import Mapping

import numpy as np
from matplotlib import figure, ticker
from matplotlib.backends import backend_agg

from onerec_jax.scaling.laws import Law
from onerec_jax.scaling.points import Points

_COLORS = ("#2f5fd0", "#d1602b", "#2b8a57", "#8b4fb8", "#a8851a", "#5b6470")


def draw(fits: Mapping[str, tuple[Points, Law]]) -> bytes:
  """A PNG: points, curves and bands, one colour an architecture, log axes.

  The panel over FLOPs is there where any points have them. L(N) is drawn in it
  at the FLOPs of its points, interpolated. L(N, D) is drawn over parameters at
  the largest number of tokens, and over FLOPs with the best N and D of each
  budget.

  Args:
    fits: architecture → its points and law.
  """
  panels = 2 if any(p.flops is not None for p, _ in fits.values()) else 1
  # The object interface: pyplot would keep every figure in global state.
  canvas = figure.Figure(
    figsize=(4.8 * panels, 3.6), dpi=200, layout="constrained"
  )
  backend_agg.FigureCanvasAgg(canvas)
  planes = np.atleast_1d(canvas.subplots(1, panels, sharey=True))
  for index, (name, (points, law)) in enumerate(fits.items()):
    color = _COLORS[index % len(_COLORS)]
    _draw_one(planes, name, points, law, color)
  planes[0].set_ylabel("loss, nats")
  for plane, label in zip(planes, ("parameters", "training FLOPs")):
    plane.set_xlabel(label)
    plane.set_xscale("log")
    # Of one or two decades matplotlib names every minor tick, over each other.
    plane.xaxis.set_minor_formatter(ticker.NullFormatter())
    plane.set_yscale("log")
    # A loss spans far less than a decade: plain numbers, evenly spaced.
    plane.yaxis.set_major_locator(ticker.MaxNLocator(6))
    plane.yaxis.set_major_formatter(ticker.ScalarFormatter())
    plane.yaxis.set_minor_locator(ticker.NullLocator())
    plane.grid(color="#d4d7dd", linewidth=0.6)
    plane.spines[["top", "right"]].set_visible(False)
  planes[0].legend(frameon=False, fontsize=8)
  buffer = io.BytesIO()
  canvas.savefig(buffer, format="png")
  return buffer.getvalue()


def _draw_one(
  planes: np.ndarray, name: str, points: Points, law: Law, color: str
) -> None:
  for plane, where in zip(planes, (points.parameters, points.flops)):
    if where is not None:
      plane.plot(where, points.loss, "o", color=color, markersize=4)
  label = f" {name}: {formula(law)}"
  grid = np.geomspace(points.parameters.min(), points.parameters.max(), 100)
  if "beta" in law.constants:
    most = np.full(len(grid), points.tokens.max())
    _curve(planes[0], grid, law, (grid, most), color, label)
    if points.flops is not None:
      cost = np.median(points.flops / (points.parameters * points.tokens))
      flops = np.geomspace(points.flops.min(), points.flops.max(), 100)
      best = law.compute_optimal(flops, float(cost))
      _curve(planes[1], flops, law, best, color, label)
    return
  _curve(planes[0], grid, law, (grid, None), color, label)
  if points.flops is not None:
    order = np.argsort(points.parameters)
    logs = np.log(points.parameters[order]), np.log(points.flops[order])
    flops = np.exp(np.interp(np.log(grid), *logs))
    _curve(planes[1], flops, law, (grid, None), color, label)


def _curve(plane, where, law, arguments, color, label):
  plane.plot(
    where, law.predict(*arguments), color=color, linewidth=1.6, label=label
  )
  band = law.band(*arguments)
  plane.fill_between(where, *band, color=color, alpha=0.15, linewidth=0)


def formula(law: Law) -> str:
  """The law with its constants, as `3.13 + 3660 / N^0.489`."""
  c = law.constants
  text = f"{c['E']:.4g} + {c['A']:.4g} / N^{c['alpha']:.3g}"
  if "beta" in c:
    text += f" + {c['B']:.4g} / D^{c['beta']:.3g}"
  return text
