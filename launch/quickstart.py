"""The whole way on real data: bash launch/quickstart.sh [--dataset=simulator].

Prepares, tokenizes, trains lazy decoder and SASRec, measures both beside
popularity, shows some recommendations and writes <workdir>/report.html. What
is done already is skipped.
"""

import time

from absl import flags as absl_flags
from rich.console import Console

from experiments.movielens import lazy_decoder as movielens
from experiments.movielens import sasrec as movielens_sasrec
from experiments.simulator import lazy_decoder as simulator
from experiments.simulator import sasrec as simulator_sasrec
from launch import flags
from onerec_jax import workflow, workflow_report
from onerec_jax.evaluation import tables

_EXPERIMENTS = {
  "movielens_100k": (movielens, movielens_sasrec),
  "simulator": (simulator, simulator_sasrec),
}
_DATASET = absl_flags.DEFINE_enum(
  "dataset", "movielens_100k", sorted(_EXPERIMENTS), "What to learn from."
)
_DATA_DIR = absl_flags.DEFINE_string(
  "data_dir", "", "Where the raw files lie; default: look around, download."
)
_USERS = absl_flags.DEFINE_integer("users", 3, "Users to recommend to.")
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  flags.start()
  console, start = Console(stderr=True), time.perf_counter()
  configs = [module.get_config() for module in _EXPERIMENTS[_DATASET.value]]
  workdir = flags.workdir(configs[0])
  for config in configs:
    config.prepare.data_dir = _DATA_DIR.value
    console.rule(f"train {config.name}")
    workflow.train(config, workdir)
  console.rule("evaluate")
  names = [*(config.name for config in configs), workflow.POPULARITY]
  evaluations = [workflow.evaluate(workdir, name) for name in names]
  examples = workflow_report.examples(workdir, evaluations, _USERS.value)
  tables.render_recommendations(examples)
  tables.print_table(evaluations)
  page = workflow_report.report(workdir, evaluations, examples)
  took = time.perf_counter() - start
  console.print(f"done in {took:.0f} s; look at {page}", highlight=False)


if __name__ == "__main__":
  flags.run(main)
