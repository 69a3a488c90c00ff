"""Trains an experiment: prepares and tokenizes first where that is not done.

  python -m launch.train --config=experiments/beauty/lazy_decoder.py
  python -m launch.train --config=... --config.model.num_layers=4 --workdir=...

A killed run continues where it was when the same command runs again. At the
end the best model by validation is measured on the test split: its ranking, or
of a reward model how well it tells answers apart.
"""

import functools

import jax
from absl import flags as absl_flags

from launch import flags
from onerec_jax import workflow
from onerec_jax.evaluation import rewards as reward_figures
from onerec_jax.evaluation import tables
from onerec_jax.models import reward

_CONFIG = flags.define_config()
_DISTRIBUTED = flags.define_distributed()
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  flags.start(_DISTRIBUTED.value)
  config = _CONFIG.value
  workdir = flags.workdir(config)
  system = workflow.train(config, workdir)
  if isinstance(system.model, reward.RewardModel):
    figures = reward_figures.evaluate(workdir, config.name)
    show = functools.partial(tables.print_figures, config.name, figures)
  else:
    evaluations = [workflow.evaluate(workdir, config.name)]
    show = functools.partial(tables.print_table, evaluations)
  if jax.process_index() == 0:
    show()


if __name__ == "__main__":
  flags.run(main)
