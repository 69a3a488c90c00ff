"""The alignment's part of the config tree (config.py)."""

import dataclasses


@dataclasses.dataclass
class AlignmentConfig:
  """Training on from a trained model by what users prefer (docs/alignment.md).

  Two streams may join the next-token loss: answers of the model itself, that
  rewards judge (`objective`), and feedback on what was logged (`feedback`).
  """

  start: str = ""
  """The run whose best parameters are the start; needed by launch.align."""
  objective: str = ""
  """Of the model's own answers. On pairs, the best against the worst: `dpo`,
  `ipo`, `cdpo`, `rdpo`, `cpo`, `simpo`, `s_dpo`; on whole groups: `grpo`,
  `ecpo`. Empty: the model is not asked."""
  weight: float = 0.1
  """Of the objective, a mean over requests, beside the next-token loss, a mean
  over targets. OneRec's λ times its r_DPO; neither is given (INFERRED)."""
  rewards: tuple[str, ...] = ()
  """`name=weight`, summed: the run of a reward model, `run/head` for one of its
  heads, or `module:function`, a reward of your own (alignment/rewards.py)."""

  requests: int = 16
  """Requests answered in each step. Over the batch's targets this is r_DPO."""
  group: int = 32
  """R, answers to a request (OneRec's N = 128, V1's G = 512)."""
  search: str = "beam"
  """`beam`: the R best answers; `sample`: draws, which may repeat."""
  constrained: bool = True
  """Whether answers are items only. False: any codes (V1 §2.5), no sessions."""
  temperature: float = 1.0
  """Of samples."""
  sync_every: int = 0
  """Steps from one copy of the policy to the sampler, which answers and is the
  reference, to the next (V1: 1000); 0: an epoch, as in OneRec's IPA."""

  beta: float = 0.1
  """β of the losses on pairs."""
  noise: float = 0.1
  """ε of `cdpo` and `rdpo`: the share of pairs that are the wrong way round."""
  likelihood: float = 1.0
  """λ of `cpo`."""
  margin: float = 0.5
  """γ of `simpo`."""
  losers: int = 1
  """Worse answers of a pair; more than one for `s_dpo` alone."""
  epsilon: float = 0.2
  """ε of `grpo` and `ecpo`."""
  delta: float = 0.1
  """δ of `ecpo`."""

  format_samples: int = 0
  """K of V1's format reward; 0: none. Needs `constrained=False`."""
  format_choice: str = "random"
  """Which K: `random`, or the most `probable`, which V1 rejects."""
  format_weight: float = 1.0
  """Of its loss beside the objective's; INFERRED, V1 names none."""
  suppressed: str = ""
  """V1's industrial reward: the items there may be too many of, by a feature
  of theirs, as `category=ads`; empty: none."""
  share: float = 0.2
  """f: their share of a group above which they earn less."""
  factor: float = 0.5
  """α: what is left of their reward then."""

  feedback: str = ""
  """Advantages of logged targets for GBPO (V2 §3.6): `duration`, `play_time`,
  or a label of the data; needs `pipeline.labels`. Empty: none."""
  feedback_loss: str = "gbpo"
  """`gbpo`, of each target alone; `pairs`, of a user's liked targets above the
  disliked ones of the same row."""
  feedback_weight: float = 0.1
  """Of that loss, a mean over targets."""
  logged_policy: bool = False
  """Whether the logged `log_probability` is π_old, where there is one. Right
  for what this model exposed; V2 takes π_old = sg π for other systems'."""

  gate: float = 0.05
  """The run stops once `evaluation.select` is more than this share below the
  start's; the last parameters above that stay the best."""
