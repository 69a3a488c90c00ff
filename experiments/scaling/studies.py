r"""What changes a model besides its size: studies, on Amazon Beauty by default.

  python -m launch.sweep --sweep=experiments/scaling/studies.py:codebook \
    --workdir=runs/study_codebook --run_locally
  python -m launch.evaluate --workdir=runs/study_codebook --output=codebook.json

codebook   codes of a level, 64 to 512 (V1 Table 3; losses are not comparable
           across codebooks, recall is)
key_values how many layers of the context's keys there are, whether values are
           their own (V2 Table 3), and how many query heads share a key head
           (V2 Table 4); four layers of four heads
pass_at_k  recall among the K best of a beam of 1,024, K from 8 (V1 Table 4)
item_input what an event is read by (V1 Table 5); item_input_movielens: on
           MovieLens 100K
features   from ids of positive events alone to all pathways, beside the plain
           history, on the simulated world (V1 Table 2;
           experiments/simulator/pathways.py)
encoder    the lazy decoder and, at its block parameters, encoder-decoders whose
           encoder sees both ways, as the papers', or backwards only; targets of
           one request each, on the simulated world (V2 Table 2)

`codebook:3` takes three seeds. A run takes two to three minutes on two cores,
of item_input five.
"""

from experiments.beauty import item_input as beauty_input
from experiments.beauty import lazy_decoder
from experiments.movielens import item_input
from experiments.simulator import pathways, sft
from onerec_jax import config as config_lib
from onerec_jax import model_configs
from onerec_jax.scaling import sweep

_VARIANTS = {
  "codebook": {
    f"codes_{k}": {"tokenizer.num_codes": k} for k in (64, 128, 256, 512)
  },
  "key_values": {
    f"layers_{layers}_split_{split}": {
      "model.kv_layers": layers,
      "model.kv_split": split,
    }
    for layers, split in ((1, 1), (1, 2), (2, 1), (4, 1))
  }
  | {f"heads_{heads}": {"model.num_kv_heads": heads} for heads in (2, 1)},
  "pass_at_k": {
    "pass_at_k": {
      "evaluation.cutoffs": (8, 64, 512, 1024),
      "evaluation.select": "ndcg@8",
      "evaluation.beam_width": 1024,
      "evaluation.batch_size": 64,
      # The best of few steps is picked by few users: the beam is wide.
      "evaluation.validation_users": 500,
    }
  },
}
"""Study → name of a run → what it changes."""

ENCODERS = ("lazy_decoder", "both_ways", "backwards")


def _encoder(arg: str) -> config_lib.Config:
  """2 · (6·d² + 3·d·F) of the lazy decoder: (4 + 8)·d² + 6·d·F of a pair."""
  c = sft.get_config("item")
  if arg == "lazy_decoder":
    return c
  shared = (
    "d_model", "num_heads", "d_ff", "sid_embed_dim", "dropout",
    "context_dropout",
  )  # fmt: skip
  c.model = model_configs.EncoderDecoderConfig(
    causal_encoder=arg == "backwards",
    **{name: getattr(c.model, name) for name in shared},
  )
  return c


_EXPERIMENTS = {
  "features": (pathways.get_config, pathways.PATHWAYS),
  "item_input": (beauty_input.get_config, item_input.INPUTS),
  "item_input_movielens": (item_input.get_config, item_input.INPUTS),
  "encoder": (_encoder, ENCODERS),
}
"""Study → an experiment file's configs, and its arguments."""


def get_sweep(arg: str = "codebook") -> dict[str, config_lib.Config]:
  """All variants of a seed before the next seed."""
  study, _, seeds = arg.partition(":")
  known = [*_VARIANTS, *_EXPERIMENTS]
  if study not in known or not (seeds or "1").isdigit():
    raise ValueError(
      f"no study {arg!r}: want one of {', '.join(known)}, or with seeds, as "
      "codebook:3"
    )
  return {
    f"{name}_seed{seed}": sweep.changed(config, {"training.seed": seed})
    for seed in range(int(seeds or 1))
    for name, config in _variants(study).items()
  }


def _variants(study: str) -> dict[str, config_lib.Config]:
  if study in _EXPERIMENTS:
    get_config, arguments = _EXPERIMENTS[study]
    return {f"{study}_{name}": get_config(name) for name in arguments}
  base = lazy_decoder.get_config()
  base.training.num_epochs = 6.0
  if study == "key_values":
    base.model.num_layers = 4
  return {
    name: sweep.changed(base, changes)
    for name, changes in _VARIANTS[study].items()
  }
