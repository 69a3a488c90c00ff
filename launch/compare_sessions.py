r"""Compares the sessions of two models on held-out requests.

  python -m launch.compare_sessions --workdir=runs/sessions \
    --a=onerec_session --b=onerec_pointwise
  python -m launch.compare_sessions --workdir=... --a=session_0,session_1 \
    --b=pointwise_0,pointwise_1 --output=results/raw/sessions.json

Several names are the seeds of one model.
"""

import rich
import rich.box
import rich.table
from absl import flags as absl_flags

from launch import flags
from onerec_jax import files, workflow, workflow_report
from onerec_jax.evaluation import sessions

_A = absl_flags.DEFINE_list("a", ["onerec_session"], "Runs of one model.")
_B = absl_flags.DEFINE_list("b", ["onerec_pointwise"], "Runs of the other.")
_SPLIT = absl_flags.DEFINE_enum(
  "split", "test", ["validation", "test"], "Which requests are asked."
)
_OUTPUT = absl_flags.DEFINE_string("output", "", "JSON to write: all figures.")
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  flags.start()
  workdir = flags.workdir()
  found = {
    name: workflow.evaluate_sessions(workdir, name, _SPLIT.value)
    for name in (*_A.value, *_B.value)
  }
  rows = sessions.compare(*([found[n] for n in m.value] for m in (_A, _B)))
  names = "a: " + ", ".join(_A.value) + " | b: " + ", ".join(_B.value)
  table = rich.table.Table(
    "metric", "a", "b", "a - b", "95%", title=names, box=rich.box.SIMPLE
  )
  for row in rows:
    table.add_row(
      row["metric"], f"{row['mean_a']:.4f}", f"{row['mean_b']:.4f}",
      f"{row['difference']:+.4f}", f"{row['low']:+.4f} … {row['high']:+.4f}",
    )  # fmt: skip
  rich.print(table)
  if _OUTPUT.value:
    models = {n: workflow_report.summary(workdir, e) for n, e in found.items()}
    record = {"split": _SPLIT.value, "models": models, "comparison": rows}
    files.write_json(_OUTPUT.value, record)


if __name__ == "__main__":
  flags.run(main)
