r"""Two-tower retrieval on the simulated world: the first stage of a cascade.

  python -m launch.train --config=experiments/simulator/two_tower.py \
    --workdir=runs/aligned
  python -m launch.train --config=experiments/simulator/p_score.py \
    --workdir=runs/aligned
  python -m launch.ab_test --workdir=runs/aligned --control=cascade \
    --treatment=sft_item --output=runs/aligned/ab/cascade

Learns the positive answers among what experiments/simulator/onerec.py learns
sessions of; the P-Score ranks what it retrieves. docs/ab_test.md says more.
"""

from experiments.simulator import onerec
from onerec_jax import config as config_lib
from onerec_jax import model_configs


def get_config(arg: str = "") -> config_lib.Config:
  del arg
  c = onerec.get_config()
  c.name = "two_tower"
  c.pipeline.targets = "request"
  c.pipeline.imitate = "positive"
  c.pipeline.row_targets = 40
  c.model = model_configs.TwoTowerConfig()
  c.evaluation.beam_width = 100
  c.evaluation.select = "recall@50"
  c.evaluation.cutoffs = (10, 50)
  return c
