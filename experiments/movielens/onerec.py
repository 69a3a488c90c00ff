r"""OneRec on days of MovieLens 100K: whole sessions, or one item at a time.

  python -m launch.train --config=experiments/movielens/onerec.py:session \
    --workdir=runs/movielens_days
  python -m launch.train --config=experiments/movielens/onerec.py:pointwise \
    --workdir=runs/movielens_days
  python -m launch.compare_sessions --workdir=runs/movielens_days

Ratings of a user less than eight hours apart are one visit, and a visit is cut
into sessions of five; the last fifth of the ratings validates and tests.
docs/sessions.md has cost and figures.
"""

from experiments.simulator import onerec as simulator
from onerec_jax import config as config_lib


def get_config(arg: str = "session") -> config_lib.Config:
  c = simulator.get_config(arg)
  c.prepare = config_lib.PrepareConfig(
    dataset="movielens_100k",
    split="time",
    request_gap_ms=8 * 3_600_000,
  )
  c.pipeline.row_positions = 128
  c.pipeline.row_targets = 100
  c.pipeline.batch_size = 8
  c.tokenizer.num_codes = 64
  c.training.num_steps = 400
  c.training.validate_every = 200
  return c
