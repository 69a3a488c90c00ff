r"""OneRec-V1's ECPO with its rewards, and GRPO beside it.

  python -m launch.align --config=experiments/simulator/ecpo.py:ecpo \
    --workdir=runs/aligned

Needs sft.py:item (of `free`, `format` and `probable`: sft.py:free) and
p_score.py in the same work directory.

  ecpo, grpo      groups of 32 beams, judged by the P-Score
  free            groups of 128 beams over all codes: what becomes of legality
  format          `free` with V1's format reward on K = 5 random beams of 128
  probable        the same on the 5 most probable, which V1 rejects
"""

from experiments.simulator import ipa, sft
from onerec_jax import config as config_lib

VARIANTS = ("ecpo", "grpo", "free", "format", "probable")


def get_config(arg: str = "ecpo") -> config_lib.Config:
  if arg not in VARIANTS:
    raise ValueError(f"argument {arg!r}: want one of {VARIANTS}")
  free = arg in ("free", "format", "probable")
  start = "free" if free else "item"
  c = sft.get_config(start)
  c.name = "ecpo" if arg == "ecpo" else f"ecpo_{arg}"
  ipa.set_schedule(c)
  a = c.alignment
  a.start = f"sft_{start}"
  a.objective = "ecpo" if free else arg
  a.rewards = ("p_score=1",)
  a.requests, a.group = 8, 32
  a.sync_every = 20
  if free:
    a.constrained, a.group = False, 128
  if arg in ("format", "probable"):
    a.format_samples = 5
    a.format_choice = "random" if arg == "format" else "probable"
  return c
