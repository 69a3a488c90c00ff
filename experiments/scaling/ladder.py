r"""Ladders of three architectures at equal block parameters.

  python -m launch.sweep --sweep=experiments/scaling/ladder.py:beauty \
    --workdir=runs/ladder_beauty --run_locally --points=points.json
  python -m launch.fit_scaling --points=points.json

`beauty`, `movielens` or `smoke` (the simulated world, 20 steps a run);
`beauty:3` takes three seeds.

Cost on two cores: half a minute for a run of Beauty at the smallest width, four
to five minutes at the largest, a good half hour for all fifteen. Expect the
loss to fall at every width: to 3.61 nats a code for the lazy decoder of d = 24,
to 2.80 for that of d = 136.

Five widths over one and a half decades of block parameters. At a width d all
three have two blocks and 36·d² parameters in their matrices:

  lazy decoder     2 × (6 d² + 3·d·F)              F = 4 d
  encoder-decoder  (4 d² + 3·d·F) + (8 d² + 3·d·F) F = 4 d
  decoder-only     2 × (4 d² + 3·d·F)              F = 14/3 d

so that tables and heads, which go by d, are equal too; F of the decoder-only
is rounded to a multiple of 8, its parameters are within 1.4%. The encoder sees
backwards only, unlike the papers': one row holds a target at every event, and
an encoder that sees both ways would show a target the events after it. As in V2
the context is semantic IDs alone, the loss is over all K codes, and the
learning rate follows its rule, 5e-4 · √(1e8 / N): docs/sweeps.md says why also
here, far below the sizes it was made for.
"""

from experiments.beauty import lazy_decoder as beauty
from experiments.movielens import lazy_decoder as movielens
from experiments.simulator import lazy_decoder as simulator
from onerec_jax import config as config_lib
from onerec_jax import model_configs
from onerec_jax.scaling import sweep

WIDTHS = (24, 40, 56, 88, 136)
"""d: 20.7k, 57.6k, 113k, 279k and 666k block parameters."""
_SMOKE_WIDTHS = (16, 24)
_BASES = {"beauty": beauty, "movielens": movielens, "smoke": simulator}


def _models(d: int) -> dict[str, model_configs.GeneratorConfig]:
  shared = dict(
    d_model=d,
    num_heads=4,
    item_embedding=False,
    dropout=0.1,
    constrained_softmax=False,
  )
  wide = dict(shared, d_ff=4 * d)
  naive = dict(shared, d_ff=8 * round(14 / 3 * d / 8))
  return {
    "lazy_decoder": model_configs.LazyDecoderConfig(num_layers=2, **wide),
    "encoder_decoder": model_configs.EncoderDecoderConfig(
      encoder_layers=1, decoder_layers=1, causal_encoder=True, **wide
    ),
    "decoder_only": model_configs.DecoderOnlyConfig(num_layers=2, **naive),
  }


def _base(name: str) -> config_lib.Config:
  if name not in _BASES:
    raise ValueError(f"no ladder {name!r}; there are {', '.join(_BASES)}")
  changes = {
    "training.num_epochs": 5.0,
    "optimizer.learning_rate": 0.0,  # the rule
    # The loss is what counts: a narrow beam, and many users for it.
    "evaluation.beam_width": 10,
    "evaluation.validation_users": 5000,
  }
  if name == "movielens":
    changes["tokenizer.num_codes"] = 64
  if name == "smoke":
    changes |= {
      "prepare.simulation.num_users": 100,
      "prepare.simulation.num_items": 100,
      "prepare.simulation.num_days": 3,
      "tokenizer.num_codes": 16,
      "optimizer.warmup_steps": 5,
      "training.num_steps": 20,
      "training.log_every": 10,
      "training.validate_every": 10,
    }
  return sweep.changed(_BASES[name].get_config(), changes)


def get_sweep(arg: str = "beauty") -> dict[str, config_lib.Config]:
  """All architectures of a width before the next, all widths before a seed."""
  name, _, seeds = arg.partition(":")
  base = _base(name)
  if not (seeds or "1").isdigit():
    raise ValueError(f"{arg!r}: want a number of seeds, as {name}:3")
  runs = {}
  for seed in range(int(seeds or 1)):
    for d in _SMOKE_WIDTHS if name == "smoke" else WIDTHS:
      for system, model in _models(d).items():
        runs[f"{system}_d{d}_seed{seed}"] = sweep.changed(
          base, {"model": model, "training.seed": seed}
        )
  return runs
