"""The picture of fitted laws."""

import io

import numpy as np
from matplotlib import image

from onerec_jax.scaling import laws, plots
from onerec_jax.scaling.points import Points


def test_a_panel_over_flops_where_they_are_known():
  n = np.geomspace(1e8, 1e10, 6)
  loss = 2 + 100 * n**-0.3
  widths = {}
  for name, flops in (("known", 18e9 * n), ("unknown", None)):
    points = Points(n, loss, None, flops)
    png = plots.draw({name: (points, laws.fit(points, resamples=5))})
    pixels = image.imread(io.BytesIO(png))
    widths[name] = pixels.shape[1]
    # Something of the first colour is there: the curve and the points.
    blue = np.abs(pixels[..., :3] - [0.184, 0.373, 0.816]).max(axis=-1) < 0.05
    assert blue.sum() > 1000
  assert widths["known"] == 2 * widths["unknown"]


def test_draws_several_laws_of_both_kinds():
  n = np.tile(np.geomspace(1e8, 1e10, 4), 3)
  d = np.repeat([1e9, 1e10, 1e11], 4)
  loss = 2 + 100 * n**-0.3 + 100 * d**-0.3
  two = Points(n, loss, d, 18 * n * d)
  one = Points(n[:4], loss[:4], None, None)
  fits = {
    "a $ sign": (two, laws.fit(two, resamples=5)),
    "other": (one, laws.fit(one, resamples=5)),
  }
  assert plots.draw(fits).startswith(b"\x89PNG")
  text = plots.formula(fits["a $ sign"][1])
  assert text == "2 + 100 / N^0.3 + 100 / D^0.3"
