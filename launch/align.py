r"""Aligns a trained model with what users prefer; prints its test figures.

  python -m launch.align --config=experiments/simulator/ecpo.py \
    --workdir=runs/aligned

Starts from the best parameters of `alignment.start`, a run of the same work
directory, and makes a run of its own. Run it again after an interruption: it
resumes. docs/alignment.md tells what it logs and when it stops.
"""

import jax
from absl import flags as absl_flags

from launch import flags
from onerec_jax import runs, workflow, workflow_align
from onerec_jax.evaluation import tables

_CONFIG = flags.define_config()
_DISTRIBUTED = flags.define_distributed()
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  flags.start(_DISTRIBUTED.value)
  config = _CONFIG.value
  workdir = flags.workdir(config)
  workflow_align.align(config, workdir)
  runs.say_if_stopped(workdir, config.name)
  names = (config.alignment.start, config.name)
  evaluations = [workflow.evaluate(workdir, name) for name in names]
  if jax.process_index() == 0:
    tables.print_table(evaluations)


if __name__ == "__main__":
  flags.run(main)
