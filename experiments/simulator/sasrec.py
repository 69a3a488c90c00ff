"""SASRec on clicks of the simulated world; argument `bce` as elsewhere."""

from experiments.movielens import sasrec as movielens
from experiments.simulator import lazy_decoder
from onerec_jax import config as config_lib


def get_config(arg: str = "softmax") -> config_lib.Config:
  c = movielens.get_config(arg)
  c.prepare = lazy_decoder.get_config().prepare
  return c
