r"""OneRec's Iterative Preference Alignment, and the losses it is compared with.

  python -m launch.align --config=experiments/simulator/ipa.py:dpo \
    --workdir=runs/aligned

Needs sft.py:session and p_score.py in the same work directory. The argument is
the loss on pairs (onerec_jax/alignment/objectives.py). Pairs are the best and
the worst of 32 beams; the sampler, DPO's reference, becomes the policy anew
three times (OneRec: each epoch). `once` is IPA's loss without its iterations:
answers and reference stay the start's.

What judges sessions is V1's P-Score, σ of the mean logit of a session's items.
`session_reward` is `dpo` by OneRec's own reward model, session_reward.py, which
tells the beams of one request apart by length and hardly by liking: at this
weight it buys watch time with likes and follows (docs/rewards.md,
docs/alignment_evidence.md).
"""

from experiments.simulator import sft
from onerec_jax import config as config_lib
from onerec_jax.alignment import objectives

STEPS = 300

_SCALES = {"ipo": (0.5, 0.0125), "simpo": (2.0, 0.5)}
"""Loss → (β, weight), if not DPO's. Equal weights would compare step sizes: at
Δ = 0 DPO's slope is β / 2 = .05, IPO's 1 / β (its margin is 1 / 2β nats).
SimPO's β is divided by the 15 codes of a session; 2 is the least it was tried
with."""

_OF_CPO = 1 / 15
"""λ of the better session's own loss, a sum over 15 codes: their mean, as it is
usually run. At 1 its gradient is twenty times the preference's (β / 2)."""

VARIANTS = ("once", "session_reward")
"""Arguments that are DPO with something else changed."""


def get_config(arg: str = "dpo") -> config_lib.Config:
  known = sorted((*VARIANTS, *objectives.PAIRS))
  if arg not in known:
    raise ValueError(f"argument {arg!r}: want one of {known}")
  c = sft.get_config("session")
  c.name = f"ipa_{arg}"
  set_schedule(c)
  a = c.alignment
  a.start = "sft_session"
  a.objective = "dpo" if arg in VARIANTS else arg
  a.rewards = ("session_reward=1" if arg == "session_reward" else "p_score=1",)
  # Of 16 rows with at most three sessions each: r_DPO is about 5%.
  a.requests, a.group = 2, 32
  a.losers = 3 if arg == "s_dpo" else 1
  a.sync_every = STEPS if arg == "once" else STEPS // 3
  # Under imitation alone NDCG of 1,000 requests fell by 7%.
  a.gate = 0.2
  a.beta, a.weight = _SCALES.get(arg, (0.1, 0.5))
  if arg == "cpo":
    a.likelihood = _OF_CPO
  return c


def set_schedule(c: config_lib.Config) -> None:
  """A tenth of the start's learning rate, for STEPS."""
  c.optimizer.learning_rate /= 10
  c.optimizer.schedule = "constant"
  c.optimizer.warmup_steps = 20
  c.training.num_steps = STEPS
  c.training.validate_every = 100
