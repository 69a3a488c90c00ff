r"""The encoder-decoders of OneRec-V1 and those of V2's comparison.

python -m launch.compile_tpu --topology=v5p:4x4x4 \
  --config=experiments/scaling/encoder_decoder.py:0.935B

`0.015B`, `0.121B`, `0.935B` and `2.633B` are V1's Table 1, the last two with
24 experts, 2 or 4 of them a token; `launch.paper_tables` prints what their
blocks hold beside the names. `0.05B` … `8B` have width and blocks of V2's
sizes, half of the blocks an encoder. A request sees what came before it, so
the encoder sees both ways.
"""

from experiments.scaling import lazy_decoder
from onerec_jax import config as config_lib
from onerec_jax.scaling import sizes


def get_config(arg: str = "0.935B") -> config_lib.Config:
  model = sizes.encoder_decoder(arg)
  model.causal_encoder = False
  return lazy_decoder.of_model(f"encoder_decoder_{arg}", model)
