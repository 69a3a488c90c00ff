r"""OneRec-V1's P-Score on the simulated world: what an item is worth.

  python -m launch.train --config=experiments/simulator/p_score.py \
    --workdir=runs/aligned

Learns from all that the log shows, clicked or not, with the same data and
semantic IDs as experiments/simulator/onerec.py. docs/rewards.md has cost and
figures.
"""

from experiments.simulator import session_reward
from onerec_jax import config as config_lib
from onerec_jax import model_configs


def get_config(arg: str = "") -> config_lib.Config:
  del arg
  c = session_reward.get_config()
  c.name = "p_score"
  c.pipeline.targets = "request"
  c.model = model_configs.PScoreConfig(context_dropout=0.1)
  c.evaluation.batch_size = 32
  return c
