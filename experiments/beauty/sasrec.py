"""SASRec on Amazon Beauty; argument `bce` for one sampled negative.

  python -m launch.train --config=experiments/beauty/sasrec.py

Seven minutes on two cores; R@10 .0791, N@10 .0412 unfiltered, the mean of three
seeds (results/ledger.md).

One negative a target teaches less an epoch and costs less: five times the
epochs take about the time of the full softmax.
"""

from experiments.beauty import lazy_decoder
from onerec_jax import config as config_lib
from onerec_jax import model_configs


def get_config(arg: str = "softmax") -> config_lib.Config:
  c = lazy_decoder.get_config()
  c.name = "sasrec" if arg == "softmax" else f"sasrec_{arg}"
  c.model = model_configs.SASRecConfig(loss=arg)
  c.training.num_epochs = 60 if arg == "bce" else 12
  return c
