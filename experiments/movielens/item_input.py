"""What an event is read by, on MovieLens 100K: V1's Table 5 in form.

  python -m launch.train --config=experiments/movielens/item_input.py:shared

The argument: `id`, `sid` (semantic IDs), `both`, or `shared` (semantic IDs by
the tables that the decoder reads its codes from). One to two minutes each on
two cores; results in docs/id_tables.md.
"""

from experiments.movielens import lazy_decoder
from onerec_jax import config as config_lib

INPUTS = {
  "id": ("none", True),
  "sid": ("own", False),
  "both": ("own", True),
  "shared": ("shared", False),
}
"""Argument → (model.sid_embedding, model.item_embedding)."""


def get_config(arg: str = "both") -> config_lib.Config:
  return read_by(lazy_decoder.get_config(), arg)


def read_by(c: config_lib.Config, kind: str) -> config_lib.Config:
  """The config of a lazy decoder, with its events read so."""
  if kind not in INPUTS:
    raise ValueError(f"argument {kind!r}: want one of {sorted(INPUTS)}")
  c.name = f"item_input_{kind}"
  c.model.sid_embedding, c.model.item_embedding = INPUTS[kind]
  return c
