"""Lazy decoder on clicks of the simulated world (needs no data)."""

from experiments.movielens import lazy_decoder as movielens
from onerec_jax import config as config_lib


def get_config(arg: str = "") -> config_lib.Config:
  del arg
  c = movielens.get_config()
  c.prepare.dataset = "simulator"
  c.prepare.where = "click = 1"
  c.tokenizer.num_codes = 64
  return c
