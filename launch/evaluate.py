r"""Measures trained runs on a split and prints the table.

  python -m launch.evaluate --workdir=runs/movielens_100k
  python -m launch.evaluate --workdir=... --models=lazy_decoder,popularity
  python -m launch.evaluate --workdir=... --models=plain,better \
    --baselines=plain
  python -m launch.evaluate --workdir=... --models=a_seed0+a_seed1+a_seed2 \
    --output=results/raw/a.json

`+` joins seeds of one model: figures are means over them, printed with their
standard deviations, and intervals are of each query's mean. Without --models:
popularity and every trained run but reward models, of other data, and those
that imitate other events (pipeline.imitate) than the latest; a line names them.
"""

from absl import app
from absl import flags as absl_flags

from launch import flags
from onerec_jax import files, runs, workflow, workflow_report
from onerec_jax.evaluation import result, tables

_MODELS = absl_flags.DEFINE_list(
  "models", [], "Names under <workdir>/models; `popularity` is the baseline."
)
_SPLIT = absl_flags.DEFINE_enum(
  "split", "test", ["validation", "test"], "Which events are asked for."
)
_BASELINES = absl_flags.DEFINE_list(
  "baselines", list(tables.BASELINES), "Which of them the others are compared "
  "with, written as in --models; the earlier ones are compared with none of "
  "the later.",
)  # fmt: skip
_OUTPUT = absl_flags.DEFINE_string(
  "output", "", "JSON to write: all figures, differences, and averages."
)
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  flags.start()
  workdir = flags.workdir()
  names = _MODELS.value or [
    *runs.current_runs(workdir),
    workflow.POPULARITY,
  ]
  flags.seeds("models", names)
  if absent := {*_BASELINES.value} - {*names, *tables.BASELINES}:
    raise app.UsageError(
      f"--baselines has {', '.join(sorted(absent))}, which --models has not"
    )
  each = "+".join(names).split("+")
  evaluations = dict(
    zip(each, workflow.evaluate_all(workdir, each, _SPLIT.value))
  )
  models = {name: [evaluations[n] for n in name.split("+")] for name in names}
  found = [result.joined(seeds) for seeds in models.values()]
  compared = tables.print_table(found, baselines=_BASELINES.value)
  summaries = {
    name: workflow_report.summary(workdir, e) for name, e in evaluations.items()
  }
  averages = {
    name: result.aggregate([summaries[seed.name] for seed in seeds])
    for name, seeds in models.items()
    if len(seeds) > 1
  }
  record = {"models": summaries, "averages": averages, "comparisons": compared}
  tables.print_averages(averages, tables.headline(tables.cutoffs(found)))
  if _OUTPUT.value:
    files.write_json(_OUTPUT.value, {"split": _SPLIT.value, **record})


if __name__ == "__main__":
  flags.run(main)
