r"""OneRec-V1's P-Score on your own events: what an item is worth to a user.

  python -m launch.train --workdir=runs/mine \
    --config=experiments/tables/p_score.py:like,click
  python -m launch.recommend --workdir=runs/mine --user=alice --ranker=p_score
  python -m launch.align --workdir=runs/mine --config.name=aligned_ecpo \
    --config.alignment.start=lazy_decoder --config.alignment.objective=ecpo \
    --config.alignment.rewards="('p_score=1',)" \
    --config.optimizer.learning_rate=2e-4 --config.training.num_epochs=2

The argument names flags of your events, a tower each. Reads what is prepared
there already (lazy_decoder.py); docs/rewards.md says what the figures mean. An
`auc` near .5 is no judge. 300 steps of 8 rows take about a minute on one core.
"""

from experiments.tables import lazy_decoder
from onerec_jax import config as config_lib
from onerec_jax import model_configs


def get_config(arg: str = "like") -> config_lib.Config:
  c = lazy_decoder.get_config()
  c.name = "p_score"
  # What else was shown at a request must not tell what came of an item.
  c.pipeline.targets = "request"
  c.pipeline.labels = True
  c.model = model_configs.PScoreConfig(
    objectives=tuple(arg.split(",")), context_dropout=0.1
  )
  c.evaluation.select = "auc"
  return c
