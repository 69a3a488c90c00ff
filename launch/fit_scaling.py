r"""Fits scaling laws to trained models, with intervals and a picture.

  python -m launch.fit_scaling --points=runs.csv --output=results/raw/scaling
  python -m launch.fit_scaling --paper --output=results/raw/paper_law

Columns of the points (CSV, or a JSON list of objects): parameters, loss;
optional tokens or targets, flops, architecture. --paper fits OneRec-V2's own
Table 5. Writes <output>.json and <output>.png; an architecture that cannot be
fitted does not hold up the others.
"""

import rich
import rich.box
import rich.table
from absl import app
from absl import flags as absl_flags

from launch import flags
from onerec_jax import files
from onerec_jax.scaling import laws, paper_tables, plots, points

_POINTS = absl_flags.DEFINE_string("points", "", "CSV or JSON of points.")
_PAPER = absl_flags.DEFINE_bool("paper", False, "The paper's own points.")
_METHOD = absl_flags.DEFINE_enum(
  "method", laws.METHODS[0], laws.METHODS, "How to fit; see docs/scaling.md."
)
_OUTPUT = absl_flags.DEFINE_string("output", "", "Path without an extension.")
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  if bool(_POINTS.value) == _PAPER.value:
    raise app.UsageError("want either --points=runs.csv or --paper")
  found = paper_tables.points() if _PAPER.value else points.read(_POINTS.value)
  fits, refused = laws.fit_each(found, _METHOD.value)
  for name, (_, law) in fits.items():
    table = rich.table.Table(
      title=f"{name}: {plots.formula(law)}",
      caption=f"{len(law.residuals)} points, R² {law.r_squared:.4f}; "
      f"{law.level:.0%} intervals, {law.resampling} resampled",
      box=rich.box.SIMPLE_HEAD,
    )
    for column in ("", "fitted", "interval", "of rounding alone"):
      table.add_column(column)
    for constant, value in law.constants.items():
      spans = (law.intervals, law.rounding_intervals)
      shown = ["{:.4g} … {:.4g}".format(*s[constant]) for s in spans if s]
      table.add_row(constant, f"{value:.4f}", *shown)
    rich.print(table)
  if _PAPER.value:
    rich.print(f"The paper prints {paper_tables.LAW}.")
  if _OUTPUT.value and fits:
    record = {name: law.record() for name, (_, law) in fits.items()}
    files.write_json(f"{_OUTPUT.value}.json", record)
    files.write_bytes(f"{_OUTPUT.value}.png", plots.draw(fits))
  if refused:
    raise ValueError("\n".join(refused))


if __name__ == "__main__":
  flags.run(main)
