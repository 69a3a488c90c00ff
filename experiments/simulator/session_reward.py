r"""OneRec's reward model on the simulated world: what a session is worth.

  python -m launch.train --config=experiments/simulator/session_reward.py \
    --workdir=runs/aligned

Learns from all sessions that the log shows, good and bad, with the same data
and semantic IDs as experiments/simulator/onerec.py, so that it can be the
reward of those models. docs/rewards.md has cost and figures.
"""

from experiments.simulator import onerec
from onerec_jax import config as config_lib
from onerec_jax import model_configs


def get_config(arg: str = "") -> config_lib.Config:
  del arg
  c = onerec.get_config()
  c.name = "session_reward"
  c.pipeline.targets = "exposed"
  c.pipeline.labels = True
  c.model = model_configs.SessionRewardConfig(context_dropout=0.1)
  c.training.num_steps = 2500
  c.training.validate_every = 500
  c.evaluation.select = "auc"
  c.evaluation.validation_users = 1000
  return c
