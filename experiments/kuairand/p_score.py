r"""OneRec-V1's P-Score on KuaiRand: would this user like this video?

  python -m launch.train --config=experiments/kuairand/p_score.py \
    --workdir=runs/kuairand

Learns from likes and hates alike, and judges items that no event ever named by
what is known of them: length, and semantic IDs that others share. It is the
reward of feedback.py:ecpo. Overfits within a few epochs; the best is kept.
"""

from experiments.kuairand import feedback
from onerec_jax import config as config_lib
from onerec_jax import model_configs


def get_config(arg: str = "") -> config_lib.Config:
  del arg
  c = judge_of(feedback.get_config())
  c.training.num_epochs = 5
  return c


def judge_of(c: config_lib.Config) -> config_lib.Config:
  """The P-Score of likes, on the data of a model that imitates them."""
  c.name = "p_score"
  c.pipeline.targets = "request"
  c.pipeline.imitate = "all"
  c.model = model_configs.PScoreConfig(
    objectives=("like",), context_dropout=0.1
  )
  c.training.validate_every = 200
  c.evaluation.select = "auc"
  return c
