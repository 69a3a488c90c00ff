r"""What alignment starts from, on the simulated world: imitation alone.

  python -m launch.train --config=experiments/simulator/sft.py:session \
    --workdir=runs/aligned

`session` generates whole sessions (OneRec) and is what ipa.py starts from;
`item` generates items by V2's lazy decoder and is what ecpo.py and gbpo.py
start from; `free`, for the format reward, is `item` with a softmax over all
codes, so that it can be asked without the prefix index. All learn the positive
answers among all that the log shows, on the data of onerec.py, so that
session_reward.py and p_score.py can judge them. `rsft` is `item` on all answers
of the requests that were played longest (V1 §2.4). docs/alignment.md has cost.
"""

from experiments.simulator import onerec
from onerec_jax import config as config_lib
from onerec_jax import model_configs

VARIANTS = ("session", "item", "free", "rsft")


def get_config(arg: str = "session") -> config_lib.Config:
  if arg not in VARIANTS:
    raise ValueError(f"argument {arg!r}: want one of {VARIANTS}")
  c = onerec.get_config()
  c.name = f"sft_{arg}"
  # Alignment starts from what imitation gains nothing more on, and its gate
  # needs figures of more than a few users.
  c.training.num_steps = 1800
  c.evaluation.validation_users = 1000
  if arg == "session":
    return c
  c.pipeline.targets = "request"
  c.pipeline.imitate = "rsft" if arg == "rsft" else "positive"
  c.model = model_configs.LazyDecoderConfig(
    num_layers=2,
    d_model=64,
    num_heads=4,
    d_ff=128,
    sid_embed_dim=16,
    dropout=0.1,
    context_dropout=0.1,
    constrained_softmax=arg != "free",
  )
  return c
