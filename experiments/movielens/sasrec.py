"""SASRec on MovieLens 100K; argument `bce` for one sampled negative."""

from experiments.movielens import lazy_decoder
from onerec_jax import config as config_lib
from onerec_jax import model_configs


def get_config(arg: str = "softmax") -> config_lib.Config:
  c = lazy_decoder.get_config()
  c.name = "sasrec" if arg == "softmax" else f"sasrec_{arg}"
  c.model = model_configs.SASRecConfig(loss=arg)
  return c
