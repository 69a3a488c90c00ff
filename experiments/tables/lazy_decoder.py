r"""Lazy decoder on your own events: CSV or Parquet, see docs/your_data.md.

  python -m launch.prepare --workdir=runs/mine \
    --config.prepare.events=events.csv --config.prepare.items=items.csv
  python -m launch.train --workdir=runs/mine
  python -m launch.recommend --workdir=runs/mine --user=alice

A middle size that suits 10^3 to 10^6 events on a laptop; training stops when
validation has not improved for four epochs.
"""

from onerec_jax import config as config_lib


def get_config(arg: str = "") -> config_lib.Config:
  del arg
  c = config_lib.Config(name="lazy_decoder")
  c.prepare.dataset = "tables"
  c.tokenizer.vectors = "fused"
  c.optimizer.learning_rate = 2e-3
  c.optimizer.b2 = 0.98
  c.optimizer.weight_decay = 0.05
  c.pipeline.batch_size = 8
  c.model.dropout = 0.3
  c.model.context_dropout = 0.2
  c.training.num_epochs = 20
  c.training.patience = 4
  return c
