r"""Experts on Amazon Beauty: what balancing without a loss does to their loads.

  python -m launch.train --config=experiments/beauty/experts.py
  python -m launch.train --config=experiments/beauty/experts.py:unbalanced
  python -m launch.curves --workdir=runs/amazon_beauty \
    --runs=experts,experts_unbalanced --figures=max_expert_load

The lazy decoder of lazy_decoder.py with 8 experts, 2 of them a token, and a
shared one, in its second block; an expert has a quarter of the dense width.
`unbalanced` leaves the balancing out. `max_expert_load` of the metrics is the
load of the busiest expert over the mean: 1 is balanced, 4 is all on two.
"""

from experiments.beauty import lazy_decoder
from onerec_jax import config as config_lib
from onerec_jax import model_configs


def get_config(arg: str = "") -> config_lib.Config:
  if arg not in ("", "unbalanced"):
    raise ValueError(f"argument {arg!r}: want none, or unbalanced")
  c = lazy_decoder.get_config()
  c.name = f"experts_{arg}" if arg else "experts"
  c.model.moe = model_configs.MoEConfig(
    num_experts=8,
    experts_per_token=2,
    shared_experts=1,
    d_ff=64,
    dense_layers=1,
    balance_rate=0.0 if arg else 1e-3,
  )
  c.training.num_epochs = 4
  return c
