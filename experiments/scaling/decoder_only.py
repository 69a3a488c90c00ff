r"""The naive decoders that OneRec-V2 compares its lazy ones to.

python -m launch.compile_tpu --topology=v5p:4x4x4 \
  --config=experiments/scaling/decoder_only.py:0.1B

Width and blocks of V2's sizes, 0.05B … 8B.
"""

from experiments.scaling import lazy_decoder
from onerec_jax import config as config_lib
from onerec_jax.scaling import sizes


def get_config(arg: str = "0.1B") -> config_lib.Config:
  model = sizes.decoder_only(arg)
  return lazy_decoder.of_model(f"decoder_only_{arg}", model)
