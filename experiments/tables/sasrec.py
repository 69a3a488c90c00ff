r"""SASRec on your own events: what the lazy decoder is to be compared with.

  python -m launch.train --workdir=runs/mine \
    --config=experiments/tables/sasrec.py
  python -m launch.evaluate --workdir=runs/mine

Reads what is prepared there already (lazy_decoder.py).
"""

from experiments.tables import lazy_decoder
from onerec_jax import config as config_lib
from onerec_jax import model_configs


def get_config(arg: str = "") -> config_lib.Config:
  c = lazy_decoder.get_config(arg)
  c.name = "sasrec"
  c.model = model_configs.SASRecConfig()
  return c
