"""OneRec-V1's encoder-decoder on Amazon Beauty, beside the lazy decoder.

  python -m launch.train --config=experiments/beauty/encoder_decoder.py

One encoder and one decoder block have the 393,216 block parameters of the
lazy decoder's two; everything else is alike. The encoder is causal, so that
one row serves targets at all times of a history.
"""

from experiments.beauty import lazy_decoder
from onerec_jax import config as config_lib
from onerec_jax import model_configs


def get_config(arg: str = "") -> config_lib.Config:
  c = lazy_decoder.get_config(arg)
  c.name = "encoder_decoder"
  c.model = model_configs.EncoderDecoderConfig(dropout=0.3, context_dropout=0.2)
  return c
