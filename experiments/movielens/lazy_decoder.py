"""Lazy decoder on MovieLens 100K (all ratings, leave-one-out).

  python -m launch.train --config=experiments/movielens/lazy_decoder.py

One to two minutes on two cores; R@10 about .14 unfiltered (results/ledger.md).
"""

from onerec_jax import config as config_lib


def get_config(arg: str = "") -> config_lib.Config:
  del arg
  c = config_lib.Config(name="lazy_decoder")
  c.prepare.dataset = "movielens_100k"
  c.pipeline.max_history = 50
  c.pipeline.row_positions = c.pipeline.row_targets = 128
  c.pipeline.batch_size = 8
  c.tokenizer.vectors = "fused"
  c.model.num_layers = 1
  c.model.d_model = 64
  c.model.num_heads = c.model.num_kv_heads = 2
  c.model.d_ff = 128
  c.model.dropout = 0.2
  c.model.context_dropout = 0.1
  c.optimizer.learning_rate = 2e-3
  c.optimizer.b2 = 0.98
  c.optimizer.weight_decay = 0.05
  c.optimizer.warmup_steps = 100
  c.training.num_epochs = 12
  c.evaluation.beam_width = 100
  return c
