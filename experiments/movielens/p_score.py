r"""OneRec-V1's P-Score on MovieLens' opinions: would this user like this film?

  python -m launch.train --config=experiments/movielens/p_score.py \
    --workdir=runs/opinions

Learns from every rating, 4 and 5 as likes; the reward of feedback.py:ecpo.
"""

from experiments.movielens import feedback
from onerec_jax import config as config_lib
from onerec_jax import model_configs


def get_config(arg: str = "") -> config_lib.Config:
  del arg
  c = feedback.get_config()
  c.name = "p_score"
  c.pipeline.targets = "request"
  c.pipeline.imitate = "all"
  c.model = model_configs.PScoreConfig(
    objectives=("like",), context_dropout=0.1
  )
  c.training.num_steps = 2400
  c.training.validate_every = 200
  c.evaluation.select = "auc"
  return c
