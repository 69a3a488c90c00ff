r"""OneRec on the simulated world: whole sessions, or one item at a time.

  python -m launch.train --config=experiments/simulator/onerec.py:session \
    --workdir=runs/sessions
  python -m launch.train --config=experiments/simulator/onerec.py:pointwise \
    --workdir=runs/sessions
  python -m launch.compare_sessions --workdir=runs/sessions

Both learn from the same five items of the same requests, all impressions with
their flags being history; the last two days validate and test. docs/sessions.md
has cost and figures.
"""

from onerec_jax import config as config_lib
from onerec_jax import model_configs
from onerec_jax.simulation.state import DAY_MS, DAY_ZERO_MS

GOOD = "count(*) FILTER (WHERE click) >= 3"
"""INFERRED: of five items three are clicked. OneRec asks for five watched of
five to ten, and for total watch time and interactions above thresholds it does
not give."""


def get_config(arg: str = "session") -> config_lib.Config:
  if arg not in ("session", "pointwise"):
    raise ValueError(f"argument {arg!r}: want session or pointwise")
  c = config_lib.Config(name=f"onerec_{arg}")
  c.prepare.dataset = "simulator"
  c.prepare.session = GOOD
  c.prepare.split = "time"
  days = c.prepare.simulation.num_days
  c.prepare.validation_from_ms = DAY_ZERO_MS + (days - 2) * DAY_MS
  c.prepare.test_from_ms = DAY_ZERO_MS + (days - 1) * DAY_MS
  c.pipeline.targets = "session"
  c.pipeline.max_history = 50
  c.pipeline.row_positions = 102
  c.pipeline.row_targets = 15
  c.pipeline.batch_size = 16
  c.tokenizer.vectors = "fused"
  c.tokenizer.num_codes = 32
  c.model = model_configs.SessionDecoderConfig(
    session_items=5 if arg == "session" else 1,
    d_model=64,
    num_heads=2,
    d_ff=128,
    dropout=0.1,
    context_dropout=0.1,
  )
  c.model.moe.d_ff = 64
  c.optimizer.learning_rate = 2e-3
  c.optimizer.b2 = 0.98
  c.optimizer.weight_decay = 0.05
  c.training.num_steps = 900
  c.training.validate_every = 300
  c.evaluation.beam_width = 32
  c.evaluation.batch_size = 128
  c.evaluation.validation_users = 256
  c.evaluation.select = "filtered/ndcg@5"
  return c
