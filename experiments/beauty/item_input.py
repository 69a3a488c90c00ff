"""What an event is read by, on Amazon Beauty: V1's Table 5 in form.

  python -m launch.train --config=experiments/beauty/item_input.py:shared

Arguments as in experiments/movielens/item_input.py; about five minutes each on
two cores; results in docs/id_tables.md.
"""

from experiments.beauty import lazy_decoder
from experiments.movielens import item_input
from onerec_jax import config as config_lib


def get_config(arg: str = "both") -> config_lib.Config:
  return item_input.read_by(lazy_decoder.get_config(), arg)
