r"""What a disliked item's gradient is worth as it becomes improbable.

  python -m benchmarks.negative_gradients --output=gradients.json \
    --plot=docs/images/negative_gradients.png

One token of K = 8,192 codes, advantage −1, probability π under the policy; the
norm is of the loss's gradient by the K logits, by autodiff through the losses
of training. Ratio clipping (GRPO, ECPO) is given the π_old that a sampler of a
while ago would have had: ten times less sure than the policy (the ratio grew),
equal, or twice as sure (the ratio fell below 1 − ε: the sample is dropped).
GBPO's fades with π, where a plain policy gradient pushes on as hard at π = 1e-8
as at a tenth (arXiv 2508.20900 §3.6). With a logged π_old of .2 it fades too,
but what the policy has since become sure of is pushed up to five times as hard.
"""

import io
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import rich
import rich.table
from absl import app, flags
from matplotlib import figure
from matplotlib.backends import backend_agg

from onerec_jax import files
from onerec_jax.alignment import ecpo, gbpo

_OUTPUT = flags.DEFINE_string("output", "", "JSON to write.")
_PLOT = flags.DEFINE_string("plot", "", "PNG to write.")

CODES = 8192
PROBABILITIES = tuple(float(10.0**-n) for n in np.arange(0.05, 8.01, 0.25))

Loss = Callable[[jax.Array], jax.Array]
"""log π of the token → its loss."""


def _against(loss: Callable[..., jax.Array], times: float) -> Loss:
  """A ratio loss with π_old = times · π."""

  def of(log_probability):
    old = jax.lax.stop_gradient(log_probability) + jnp.log(times)
    return loss(log_probability, old, jnp.float32(-1.0))

  return of


LOSSES: dict[str, Loss] = {
  "GRPO, ratio 10": _against(ecpo.grpo, 0.1),
  "ECPO, ratio 10": _against(ecpo.ecpo, 0.1),
  "GRPO and ECPO, ratio 1": _against(ecpo.grpo, 1.0),
  "GRPO and ECPO, ratio .5": _against(ecpo.grpo, 2.0),
  "GBPO": lambda log_p: gbpo.gbpo(log_p, None, jnp.float32(-1.0)),
  "GBPO, π_old .2 logged": lambda log_p: gbpo.gbpo(
    log_p, jnp.log(0.2), jnp.float32(-1.0)
  ),
}


def norms(loss: Loss) -> np.ndarray:
  """The gradient's norm over the logits, at each of PROBABILITIES."""

  def of_logits(logits):
    return loss(jax.nn.log_softmax(logits)[0])

  @jax.jit
  def norm(probability):
    rest = jnp.log((1 - probability) / (CODES - 1))
    logits = jnp.full(CODES, rest).at[0].set(jnp.log(probability))
    return jnp.linalg.norm(jax.grad(of_logits)(logits))

  return np.asarray([norm(p) for p in PROBABILITIES])


def draw(found: dict[str, np.ndarray]) -> figure.Figure:
  """Norm over π, both logarithmic."""
  canvas = figure.Figure((4.8, 3.2), dpi=200, layout="constrained")
  backend_agg.FigureCanvasAgg(canvas)
  plane = canvas.subplots()
  for name, values in found.items():
    # What is thrown away has no place on a logarithmic axis.
    line = "--" if "logged" in name else "-"  # GBPO's two lie on each other.
    plane.plot(PROBABILITIES, np.maximum(values, 1e-9), line, label=name)
  plane.set_xscale("log")
  plane.set_yscale("log")
  plane.invert_xaxis()
  plane.set_xlabel("π of the disliked token")
  plane.set_ylabel("gradient norm over the logits")
  plane.grid(color="#d4d7dd", linewidth=0.6)
  plane.spines[["top", "right"]].set_visible(False)
  plane.legend(frameon=False, fontsize=7)
  return canvas


def main(argv: list[str]) -> None:
  """Entry point."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  found = {name: norms(loss) for name, loss in LOSSES.items()}
  table = rich.table.Table("π", *found, box=None)
  for place in range(0, len(PROBABILITIES), 4):
    values = (f"{norm[place]:.2e}" for norm in found.values())
    table.add_row(f"{PROBABILITIES[place]:.1e}", *values)
  rich.print(table)
  if _OUTPUT.value:
    files.write_json(
      _OUTPUT.value,
      {"probability": PROBABILITIES}
      | {name: values.tolist() for name, values in found.items()},
    )
  if _PLOT.value:
    buffer = io.BytesIO()
    draw(found).savefig(buffer, format="png")
    files.write_bytes(_PLOT.value, buffer.getvalue())


if __name__ == "__main__":
  app.run(main)
