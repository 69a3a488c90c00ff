r"""OneRec-V1's P-Score on MovieLens' opinions: would this user like this film?

  python -m launch.train --config=experiments/movielens/p_score.py \
    --workdir=runs/opinions

Learns from every rating, 4 and 5 as likes; the reward of feedback.py:ecpo.
"""

from experiments.kuairand import p_score
from experiments.movielens import feedback
from onerec_jax import config as config_lib


def get_config(arg: str = "") -> config_lib.Config:
  del arg
  c = p_score.judge_of(feedback.get_config())
  c.training.num_steps = 2400
  return c
