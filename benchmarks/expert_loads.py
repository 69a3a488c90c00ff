r"""The busiest expert over training, with and without balancing.

  python -m benchmarks.expert_loads --workdir=runs/amazon_beauty \
    [--runs=experts,experts_unbalanced] [--output=docs/images/expert_loads.png]

Reads the metrics of trained runs (experiments/beauty/experts.py), prints
`max_expert_load`, the load of the busiest expert over the mean of all, and
draws it.
"""

import io
import pathlib

from absl import app, flags
from matplotlib import figure
from matplotlib.backends import backend_agg

from onerec_jax import files
from onerec_jax.training import metrics_writer

_WORKDIR = flags.DEFINE_string("workdir", "runs/amazon_beauty", "Of the runs.")
_RUNS = flags.DEFINE_list("runs", ["experts", "experts_unbalanced"], "Which.")
_OUTPUT = flags.DEFINE_string("output", "", "PNG to write.")


def loads(run: pathlib.Path) -> tuple[list[int], list[float]]:
  """Steps, and the busiest expert's load over the mean since the last one."""
  lines = metrics_writer.read(run / "metrics.jsonl")
  found = [r for r in lines if r["kind"] == "train" and "max_expert_load" in r]
  if not found:
    raise ValueError(f"{run}/metrics.jsonl has no max_expert_load")
  return [r["step"] for r in found], [r["max_expert_load"] for r in found]


def main(argv: list[str]) -> None:
  """Entry point."""
  del argv
  canvas = figure.Figure(figsize=(4.8, 3.2), dpi=200, layout="constrained")
  backend_agg.FigureCanvasAgg(canvas)
  plane = canvas.subplots()
  for name in _RUNS.value:
    steps, values = loads(pathlib.Path(_WORKDIR.value) / "models" / name)
    plane.plot(steps, values, label=name)
    tenths = range(0, len(steps), max(1, len(steps) // 10))
    print(name, *(f"{steps[i]}: {values[i]:.2f}" for i in tenths), sep="  ")
  plane.set_xlabel("step")
  plane.set_ylabel("busiest expert / mean")
  plane.set_ylim(bottom=1.0)
  plane.grid(color="#d4d7dd", linewidth=0.6)
  plane.spines[["top", "right"]].set_visible(False)
  plane.legend(frameon=False, fontsize=8)
  if _OUTPUT.value:
    buffer = io.BytesIO()
    canvas.savefig(buffer, format="png")
    files.write_bytes(_OUTPUT.value, buffer.getvalue())


if __name__ == "__main__":
  app.run(main)
