r"""KuaiRand's likes and hates: imitate the likes, then learn from both.

  python -m launch.train --config=experiments/kuairand/feedback.py:sft \
    --workdir=runs/kuairand
  python -m launch.align --config=experiments/kuairand/feedback.py:gbpo \
    --workdir=runs/kuairand
  python -m launch.feedback_pairs --workdir=runs/kuairand \
    --runs=feedback_imitate,feedback_gbpo

Split by time, 80 / 10 / 10%. The whole log is history, with its flags; only
likes are targets of the next-token loss and of evaluation. `gbpo` goes on with
GBPO on every logged row, +1 for a like and −1 for a hate; `pairs` puts a user's
likes above the hates of the same row instead; `duration` is V2's reward, +1 for
what was played longest for its length; in `ecpo` the P-Score (p_score.py, same
work directory) judges items drawn from the whole catalogue, most of which
nobody was shown; `imitate`, for as many steps without feedback, is what those
are to be compared with. docs/alignment.md has cost and figures.
"""

from experiments.kuairand import lazy_decoder
from onerec_jax import alignment_config
from onerec_jax import config as config_lib

_ALIGNED = ("imitate", "gbpo", "pairs", "duration", "ecpo")


def get_config(arg: str = "sft") -> config_lib.Config:
  if arg not in ("sft", *_ALIGNED):
    raise ValueError(f"argument {arg!r}: want sft or one of {_ALIGNED}")
  c = lazy_decoder.get_config()
  c.name = f"feedback_{arg}"
  c.prepare.where = ""
  c.prepare.positive = '"like"'
  c.pipeline.imitate = "positive"
  c.pipeline.labels = True
  if arg != "sft":
    c.optimizer.learning_rate = 5e-4
    c.optimizer.schedule = "constant"
    c.optimizer.warmup_steps = 10
    c.training.num_epochs = 10
    c.training.patience = 0
    a = c.alignment
    a.start = "feedback_sft"
    a.feedback = "duration" if arg == "duration" else "like"
    a.feedback_loss = "pairs" if arg == "pairs" else "gbpo"
    a.feedback_weight = 0.0 if arg == "imitate" else 1.0
    a.gate = 0.3
  if arg == "ecpo":
    judge_catalogue(a, weight=1.0)
    # The start is the best of fifteen validations on few hits: imitating on is
    # below it, too.
    a.gate = 0.9
  return c


def judge_catalogue(a: alignment_config.AlignmentConfig, weight: float) -> None:
  """ECPO by the P-Score on items from all of the catalogue, not on beams."""
  a.feedback = ""
  a.objective, a.weight = "ecpo", weight
  a.rewards = ("p_score=1",)
  a.search, a.requests, a.group = "sample", 8, 128
  # Near uniform: what the model would never answer is to be judged, too.
  a.temperature = 8.0
  a.sync_every = 10
