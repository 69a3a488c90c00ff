r"""The runs behind docs/alignment_evidence.md, over seeds.

  python -m launch.sweep --sweep=experiments/simulator/evidence.py:items:3 \
    --workdir=runs/evidence --run_locally

Each seed has a start, reward models and alignments of its own; the runs of seed
0 have the names of their experiment files, those of seed n end on `_s<n>`. A
control imitates on from the start for as many steps: what an alignment is to
be compared with. `items` and `sessions` come first; `catalogue` needs neither.

items      sft.py:item and :free, p_score.py, ecpo.py and gbpo.py
sessions   sft.py:session, session_reward.py, p_score.py, ipa.py with each loss
           and by the session reward alone
ratio      IPA on 1% to 20% of the sessions (OneRec's r_DPO), by the P-Score
           and by the session reward
long       900 steps: IPA, whose answers and reference are renewed every 100,
           and DPO, SimPO and S-DPO, which in 300 went as far or further, on
           the start's answers with the start as reference throughout; the
           control imitates as long
groups     ECPO on groups of 8 to 512 beams (V1 Table 9 in form)
stability  ECPO and GRPO at ten times the rate on draws at temperature 2 from a
           sampler that is never renewed
legality   600 steps on free beams without a gate, the objective weighing a
           hundred times the next-token loss, at five times the rate (at ten a
           few steps do it all): ECPO and GRPO without the format reward, ECPO
           with it on K = 5 and 20 random beams, on 20 at 1.5 times its weight,
           and on the 5 most probable; and 400 steps on 20 at five times its
           weight from where ECPO without it had ended
collapse   ECPO, GBPO on feedback, and both, at rates ×1, ×3, ×10 that decay to
           zero, as the start's did, and a gate of 3%; GBPO alone three times
           as heavy as in `items`, where it gains less than imitation at such
           rates loses
catalogue  starts, P-Score and ECPO on groups of 32 to 2,048 in a world of
           20,000 items: hours of CPU, in a work directory of its own, since
           its runs are named as those of `items` and `groups`
"""

from collections.abc import Callable
from typing import Any

from experiments.simulator import (
  ecpo,
  gbpo,
  ipa,
  p_score,
  session_reward,
  sft,
)
from onerec_jax import config as config_lib
from onerec_jax.scaling import sweep

Runs = dict[str, config_lib.Config]

RATES = (1, 3, 10)
"""Times the alignment's own learning rate."""


def get_sweep(arg: str = "items") -> Runs:
  """All runs of a seed before the next seed's."""
  study, _, seeds = arg.partition(":")
  if study not in _STUDIES or not (seeds or "1").isdigit():
    raise ValueError(
      f"no study {arg!r}: want one of {', '.join(_STUDIES)}, or with seeds, "
      "as items:3"
    )
  found = {}
  for seed in range(int(seeds or 1)):
    suffix = f"_s{seed}" if seed else ""
    for name, config in _STUDIES[study]().items():
      found[name + suffix] = _with_seed(config, seed, suffix)
  return found


def _with_seed(
  config: config_lib.Config, seed: int, suffix: str
) -> config_lib.Config:
  changes: dict[str, Any] = {"training.seed": seed}
  if config.alignment.start:
    changes["alignment.start"] = config.alignment.start + suffix
    changes["alignment.rewards"] = tuple(
      reward.replace("=", f"{suffix}=") for reward in config.alignment.rewards
    )
  return sweep.changed(config, changes)


def _control(config: config_lib.Config) -> config_lib.Config:
  """The same steps with nothing but the next-token loss."""
  part = "weight" if config.alignment.objective else "feedback_weight"
  return sweep.changed(config, {f"alignment.{part}": 0.0})


def _items() -> Runs:
  return {
    "sft_item": sft.get_config("item"),
    "p_score": p_score.get_config(),
    "sft_item_longer": _control(gbpo.get_config("duration")),
    "ecpo": ecpo.get_config("ecpo"),
    "ecpo_grpo": ecpo.get_config("grpo"),
    **{f"gbpo_{name}": gbpo.get_config(name) for name in gbpo.VARIANTS},
    "sft_free": sft.get_config("free"),
  }


def _sessions() -> Runs:
  variants = ("dpo", "session_reward", "once")
  losses = ("ipo", "cdpo", "rdpo", "cpo", "simpo", "s_dpo")
  return {
    "sft_session": sft.get_config("session"),
    "session_reward": session_reward.get_config(),
    "p_score": p_score.get_config(),
    "sft_session_longer": _control(ipa.get_config("dpo")),
    **{f"ipa_{name}": ipa.get_config(name) for name in (*variants, *losses)},
  }


def _ratio() -> Runs:
  """A pair counts as much, beside a session imitated, whatever the share."""
  wide = {"pipeline.batch_size": 3 * sft.get_config().pipeline.batch_size}
  by = {"ratio": "dpo", "ratio_reward": "session_reward"}
  bases = {
    prefix: sweep.changed(ipa.get_config(variant), wide)  # about 110 sessions
    for prefix, variant in by.items()
  }
  # Without pairs no reward is asked: one control for both.
  runs = {"ratio_0": _control(bases["ratio"])}
  for prefix, base in bases.items():
    of_pair = base.alignment.weight / base.alignment.requests / 3
    for requests in (1, 5, 20):
      weight = of_pair * requests
      runs[f"{prefix}_{requests}"] = sweep.changed(
        base,
        {"alignment.requests": requests, "alignment.weight": weight},
      )
  return runs


def _long() -> Runs:
  steps = 3 * ipa.STEPS
  once = {"training.num_steps": steps, "alignment.sync_every": steps}
  runs = {
    f"long_{loss}": sweep.changed(ipa.get_config(loss), once)
    for loss in ("dpo", "simpo", "s_dpo")
  }
  renewed = {"training.num_steps": steps}
  iterated = sweep.changed(ipa.get_config("dpo"), renewed)
  return {"long_0": _control(iterated), "long_ipa": iterated, **runs}


def _groups() -> Runs:
  return {
    f"group_{size}": sweep.changed(
      ecpo.get_config("ecpo"),
      {"alignment.group": size, "alignment.requests": 4},
    )
    for size in (8, 32, 128, 512)
  }


def _stability() -> Runs:
  stale = {
    "alignment.sync_every": ipa.STEPS,
    "alignment.weight": 1.0,
    "alignment.search": "sample",
    "alignment.temperature": 2.0,
    "alignment.gate": 1.0,
  }
  return {
    f"stale_{name}": _at_rate(
      sweep.changed(ecpo.get_config(name), stale), RATES[-1]
    )
    for name in ("ecpo", "grpo")
  }


def _legality() -> Runs:
  hard = {
    "alignment.weight": 100.0,
    "alignment.gate": 1.0,
    "training.num_steps": 2 * ipa.STEPS,
  }
  variants = {
    "ecpo": ("free", {}),
    "grpo": ("free", {"alignment.objective": "grpo"}),
    "format": ("format", {}),
    "format_20": ("format", {"alignment.format_samples": 20}),
    "format_strong": (
      "format",
      {"alignment.format_samples": 20, "alignment.format_weight": 1.5},
    ),
    "probable": ("probable", {}),
  }
  runs = {
    f"legality_{name}": _at_rate(
      sweep.changed(ecpo.get_config(variant), hard | changes), 5
    )
    for name, (variant, changes) in variants.items()
  }
  runs["legality_restored"] = sweep.changed(
    runs["legality_format_20"],
    {
      "alignment.start": "legality_ecpo",
      "alignment.format_weight": 5.0,
      "training.num_steps": 400,
    },
  )
  return runs


def _collapse() -> Runs:
  heavy = {"alignment.feedback_weight": 3.0}
  variants = {
    "ecpo": ecpo.get_config("ecpo"),
    "gbpo": sweep.changed(gbpo.get_config("duration"), heavy),
    "both": gbpo.get_config("both"),
  }
  careful = {"optimizer.schedule": "cosine", "alignment.gate": 0.03}
  return {
    f"collapse_{name}_x{rate}": _at_rate(sweep.changed(c, careful), rate)
    for rate in RATES
    for name, c in variants.items()
  }


def _catalogue() -> Runs:
  runs = {
    "sft_item": sft.get_config("item"),
    "p_score": p_score.get_config(),
  }
  for config in runs.values():
    config.training.num_steps = 4000
    config.training.validate_every = 1000
  aligned = sweep.changed(ecpo.get_config("ecpo"), {"alignment.requests": 4})
  runs["sft_item_longer"] = _control(aligned)
  for size in (32, 128, 512, 2048):
    runs[f"group_{size}"] = sweep.changed(aligned, {"alignment.group": size})
  # An answer of 512 then counts as much as one of 128.
  heavy = {"alignment.weight": 4 * aligned.alignment.weight}
  runs["group_512_heavy"] = sweep.changed(runs["group_512"], heavy)
  world = {
    "prepare.simulation.num_users": 6000,
    "prepare.simulation.num_items": 20_000,
    "tokenizer.num_codes": 128,
    "pipeline.batch_size": 64,
  }
  wider = {"model.d_model": 128, "model.d_ff": 256, "model.num_layers": 3}
  return {
    name: sweep.changed(config, world if name == "p_score" else world | wider)
    for name, config in runs.items()
  }


def _at_rate(config: config_lib.Config, rate: int) -> config_lib.Config:
  wanted = rate * config.optimizer.learning_rate
  return sweep.changed(config, {"optimizer.learning_rate": wanted})


_STUDIES: dict[str, Callable[[], Runs]] = {
  "items": _items,
  "sessions": _sessions,
  "ratio": _ratio,
  "long": _long,
  "groups": _groups,
  "stability": _stability,
  "legality": _legality,
  "collapse": _collapse,
  "catalogue": _catalogue,
}
