"""Lazy decoder on Foursquare New York check-ins (leave-one-out)."""

from experiments.kuairand import lazy_decoder as kuairand
from onerec_jax import config as config_lib


def get_config(arg: str = "") -> config_lib.Config:
  c = kuairand.get_config(arg)
  c.prepare = config_lib.PrepareConfig(dataset="foursquare_nyc")
  return c
