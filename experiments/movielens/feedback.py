r"""MovieLens 100K's opinions: imitate the likes, then learn from dislikes too.

  python -m launch.train --config=experiments/movielens/feedback.py:sft \
    --workdir=runs/opinions
  python -m launch.align --config=experiments/movielens/feedback.py:pairs \
    --workdir=runs/opinions
  python -m launch.feedback_pairs --workdir=runs/opinions \
    --runs=feedback_sft,feedback_pairs,popularity

Ratings of 4 and 5 are likes, 1 and 2 dislikes (data set `movielens_opinions`),
split by time, 80 / 10 / 10%. As experiments/kuairand/feedback.py, but here
later events are of items that training knows. `imitate` takes as many steps
without feedback: what `gbpo`, `pairs` and `ecpo`, which needs p_score.py in the
same work directory, are to be compared with. docs/alignment.md has figures.
"""

from experiments.kuairand import feedback as kuairand
from experiments.movielens import lazy_decoder
from onerec_jax import config as config_lib

_ALIGNED = ("imitate", "gbpo", "pairs", "ecpo")


def get_config(arg: str = "sft") -> config_lib.Config:
  if arg not in ("sft", *_ALIGNED):
    raise ValueError(f"argument {arg!r}: want sft or one of {_ALIGNED}")
  c = lazy_decoder.get_config()
  c.name = f"feedback_{arg}"
  c.prepare.dataset = "movielens_opinions"
  c.prepare.split = "time"
  c.prepare.positive = '"like"'
  c.pipeline.imitate = "positive"
  c.pipeline.labels = True
  if arg != "sft":
    c.optimizer.learning_rate = 2e-4
    c.optimizer.warmup_steps = 10
    c.training.num_epochs = 3
    c.training.patience = 0
    a = c.alignment
    a.start = "feedback_sft"
    a.feedback = "like"
    a.feedback_loss = "pairs" if arg == "pairs" else "gbpo"
    # GBPO's push on a code is π / (1 − π), little where there are many.
    a.feedback_weight = {"imitate": 0.0, "gbpo": 30.0}.get(arg, 1.0)
    a.gate = 0.1
  if arg == "ecpo":
    kuairand.judge_catalogue(a, weight=0.1)
  return c
