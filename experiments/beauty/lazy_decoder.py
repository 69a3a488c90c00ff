"""Lazy decoder on Amazon Beauty (5-core, leave-one-out, history of 20).

  python -m launch.train --config=experiments/beauty/lazy_decoder.py

Five to six minutes on two cores; R@10 .0747, N@10 .0425 unfiltered, the mean of
three seeds (results/ledger.md). The argument says what the semantic IDs are
made of: `fused` by default, or another value of `tokenizer.vectors`, as
`lazy_decoder.py:aligned`.
"""

from onerec_jax import config as config_lib


def get_config(arg: str = "") -> config_lib.Config:
  name = f"lazy_decoder_{arg}" if arg else "lazy_decoder"
  c = config_lib.Config(name=name)
  c.prepare.dataset = "amazon_beauty"
  c.pipeline.max_history = 20
  c.pipeline.row_positions = c.pipeline.row_targets = 32
  c.pipeline.batch_size = 16
  c.tokenizer.vectors = arg or "fused"
  c.model.num_layers = 2
  c.model.dropout = 0.3
  c.model.context_dropout = 0.2
  c.optimizer.learning_rate = 2e-3
  c.optimizer.b2 = 0.98
  c.optimizer.weight_decay = 0.05
  c.optimizer.warmup_steps = 200
  c.training.num_epochs = 12
  return c
