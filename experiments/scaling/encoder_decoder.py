r"""The encoder-decoders of OneRec-V1 and those of V2's comparison.

python -m launch.compile_tpu --topology=v5p:4x4x4 \
  --config=experiments/scaling/encoder_decoder.py:0.935B

`0.015B`, `0.121B`, `0.935B` and `2.633B` are V1's Table 1, the last two with
24 experts, 2 or 4 of them a token; `launch.paper_tables` prints what their
blocks hold beside the names. `0.05B` … `8B` have width and blocks of V2's
sizes, half of the blocks an encoder. A request sees what came before it, so
the encoder sees both ways.

`0.935B:pathways`, and so every size, reads V1's user pathways: 20 events, 256
positive ones and 2,000 representatives, 128 positions after the Q-Former.
Without the word it reads the plain history of 511 events, as V2 compares it;
that needs no compression of histories before the training.
"""

import dataclasses

from experiments.scaling import lazy_decoder
from onerec_jax import config as config_lib
from onerec_jax.scaling import sizes


def get_config(arg: str = "0.935B") -> config_lib.Config:
  size, _, context = arg.partition(":")
  if context not in ("", "pathways"):
    raise ValueError(f"{context!r}: want pathways, as {size}:pathways")
  model = sizes.encoder_decoder(size)
  model.causal_encoder = False
  name = f"encoder_decoder_{arg}".replace(":", "_")
  c = lazy_decoder.of_model(name, model)
  if context:
    c.pipeline.pathways = dataclasses.replace(sizes.REPORT_PATHWAYS)
  return c
