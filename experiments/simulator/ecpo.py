r"""OneRec-V1's ECPO with its rewards, and GRPO beside it.

  python -m launch.align --config=experiments/simulator/ecpo.py:ecpo \
    --workdir=runs/aligned

Needs sft.py:item (of `free`, `format` and `probable`: sft.py:free) and
p_score.py in the same work directory.

  ecpo, grpo      groups of 32 beams, judged by the P-Score
  free            draws without the prefix index: what becomes of legality
  format          and V1's format reward on K = 5 random draws of 64
  probable        its rejected choice, the 5 most probable draws
"""

from experiments.simulator import ipa, sft
from onerec_jax import config as config_lib

VARIANTS = ("ecpo", "grpo", "free", "format", "probable")


def get_config(arg: str = "ecpo") -> config_lib.Config:
  if arg not in VARIANTS:
    raise ValueError(f"argument {arg!r}: want one of {VARIANTS}")
  beams = arg in ("ecpo", "grpo")
  start = "item" if beams else "free"
  c = sft.get_config(start)
  c.name = "ecpo" if arg == "ecpo" else f"ecpo_{arg}"
  ipa.set_schedule(c)
  a = c.alignment
  a.start = f"sft_{start}"
  a.objective = arg if beams else "ecpo"
  a.rewards = ("p_score=1",)
  a.requests, a.group = 8, 32
  a.sync_every = 20
  if not beams:
    a.search, a.constrained, a.group = "sample", False, 64
  if arg in ("format", "probable"):
    a.format_samples = 5
    a.format_choice = "random" if arg == "format" else "probable"
  return c
