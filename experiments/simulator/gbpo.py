r"""OneRec-V2's GBPO on users' own feedback, with and without a reward model.

  python -m launch.align --config=experiments/simulator/gbpo.py:duration \
    --workdir=runs/aligned

Needs sft.py:item in the same work directory; `both` needs p_score.py too.

  duration    advantages by play time among the user's videos of like duration
  play_time   by play time as it is, which favours long videos
  both        `duration` on what was logged, ECPO on the model's own answers
"""

from experiments.simulator import ecpo, ipa, sft
from onerec_jax import config as config_lib

VARIANTS = ("duration", "play_time", "both")


def get_config(arg: str = "duration") -> config_lib.Config:
  if arg not in VARIANTS:
    raise ValueError(f"argument {arg!r}: want one of {VARIANTS}")
  if arg == "both":
    c = ecpo.get_config("ecpo")
  else:
    c = sft.get_config("item")
    ipa.set_schedule(c)
  c.name = f"gbpo_{arg}"
  c.pipeline.labels = True
  a = c.alignment
  a.start = "sft_item"
  a.feedback = "play_time" if arg == "play_time" else "duration"
  a.feedback_weight = 1.0
  return c
