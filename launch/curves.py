r"""Draws what runs logged over training, side by side.

  python -m launch.curves --workdir=runs/evidence \
    --runs=ecpo+ecpo_s1,ecpo_grpo+ecpo_grpo_s1 \
    --figures=reward_mean,ratio_max,legality --output=curves.png

`+` joins seeds of one model: the mean is drawn, and what lies between them
shaded. --record writes the numbers, seeds apart.
"""

import rich
import rich.table
from absl import app
from absl import flags as absl_flags

from launch import flags
from onerec_jax import files
from onerec_jax.evaluation import curves

_RUNS = absl_flags.DEFINE_list("runs", [], "Which; + joins seeds.")
_FIGURES = absl_flags.DEFINE_list(
  "figures", ["loss"], "Of metrics.jsonl, where training logs it or else "
  "validation; validation/loss is the other loss.",
)  # fmt: skip
_LOG = absl_flags.DEFINE_list("log", [], "Figures on a logarithmic axis.")
_OUTPUT = absl_flags.DEFINE_string("output", "", "PNG to write.")
_RECORD = absl_flags.DEFINE_string("record", "", "JSON file for the numbers.")
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  if not _RUNS.value:
    raise app.UsageError("--runs is needed, as --runs=ecpo,ecpo_grpo")
  workdir = flags.workdir()
  found = []
  for name in _FIGURES.value:
    of_models = [curves.read(workdir, run, name) for run in _RUNS.value]
    known = [curve for curve in of_models if curve is not None]
    if not known:
      raise ValueError(f"none of {', '.join(_RUNS.value)} logged {name!r}")
    found += known
  table = rich.table.Table("figure", "model", "first", "middle", "last")
  for curve in found:
    means = curve.values.mean(0)
    three = means[0], means[len(means) // 2], means[-1]
    name, *others = curve.model.split("+")
    name += f" ({1 + len(others)} seeds)" if others else ""
    table.add_row(curve.figure, name, *(f"{x:.4g}" for x in three))
  rich.print(table)
  if _OUTPUT.value:
    files.write_bytes(_OUTPUT.value, curves.draw(found, _LOG.value))
  if _RECORD.value:
    files.write_json(_RECORD.value, curves.as_json(found))


if __name__ == "__main__":
  flags.run(main)
