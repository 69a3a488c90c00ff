"""V2's naive decoder-only baseline on Amazon Beauty.

  python -m launch.train --config=experiments/beauty/decoder_only.py

Two blocks have 327,680 block parameters, where the lazy decoder's two have
393,216 (it has two attentions a block); everything else is alike.
"""

from experiments.beauty import lazy_decoder
from onerec_jax import config as config_lib
from onerec_jax import model_configs


def get_config(arg: str = "") -> config_lib.Config:
  c = lazy_decoder.get_config(arg)
  c.name = "decoder_only"
  c.model = model_configs.DecoderOnlyConfig(
    num_layers=2, dropout=0.3, context_dropout=0.2
  )
  return c
