"""Writes <workdir>/report.html anew from what was trained and measured.

python -m launch.report --workdir=runs/movielens_100k --users=5
"""

from absl import flags as absl_flags

from launch import flags
from onerec_jax import workflow, workflow_report

_MODELS = absl_flags.DEFINE_list(
  "models", [], "Runs that were asked the same; default: all, and popularity."
)
_USERS = absl_flags.DEFINE_integer("users", 3, "Users to recommend to.")
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  flags.start()
  workdir = flags.workdir()
  evaluations = workflow.evaluate_all(workdir, _MODELS.value)
  examples = workflow_report.examples(workdir, evaluations, _USERS.value)
  print(workflow_report.report(workdir, evaluations, examples))


if __name__ == "__main__":
  flags.run(main)
