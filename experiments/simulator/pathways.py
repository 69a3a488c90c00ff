r"""The user pathways of OneRec-V1 on the simulated world, from few to all.

  python -m launch.train --config=experiments/simulator/pathways.py:all \
    --workdir=runs/pathways
  python -m launch.evaluate --workdir=runs/pathways --models=pathways_all

Arguments: `history` (the plain history, no pathways), `ids` (positive events'
item ids and nothing else), `short`, `positive` (short and positive) and `all`
(with the lifelong pathway). All learn from the
same requests of clicks for as many steps; docs/pathways.md has cost and
figures.
"""

from onerec_jax import config as config_lib
from onerec_jax import model_configs
from onerec_jax.simulation.state import DAY_MS, DAY_ZERO_MS

PATHWAYS = {
  "history": (0, 0, 0),
  "ids": (0, 32, 0),
  "short": (20, 0, 0),
  "positive": (20, 32, 0),
  "all": (20, 32, 64),
}
"""Lengths of short, positive and lifelong: the report's, to this world's."""


def get_config(arg: str = "all") -> config_lib.Config:
  if arg not in PATHWAYS:
    raise ValueError(f"argument {arg!r}: want one of {sorted(PATHWAYS)}")
  c = config_lib.Config(name=f"pathways_{arg}")
  c.prepare.dataset = "simulator"
  c.prepare.where = "click = 1"
  days = c.prepare.simulation.num_days = 21
  c.prepare.simulation.num_users = 400
  c.prepare.split = "time"
  c.prepare.validation_from_ms = DAY_ZERO_MS + (days - 2) * DAY_MS
  c.prepare.test_from_ms = DAY_ZERO_MS + (days - 1) * DAY_MS
  c.pipeline.targets = "request"
  c.pipeline.pathways = config_lib.PathwaysConfig(*PATHWAYS[arg])
  c.pipeline.max_history = 50
  c.pipeline.row_positions = 51
  c.pipeline.row_targets = 5
  c.pipeline.batch_size = 64
  c.lifelong.every = 20
  c.lifelong.max_items = 4
  c.tokenizer.vectors = "fused"
  c.tokenizer.num_codes = 32
  c.model = model_configs.EncoderDecoderConfig(
    d_model=64,
    num_heads=2,
    d_ff=128,
    causal_encoder=False,
    lifelong_queries=16,
  )
  if arg == "ids":
    c.model.sid_embedding = "none"
    c.model.feature_embed_dim = 0
  c.optimizer.learning_rate = 2e-3
  c.optimizer.weight_decay = 0.05
  c.training.num_steps = 1500
  c.training.validate_every = 250
  return c
