"""Lazy decoder on KuaiRand's liked-or-hated rows, split by time.

Most later rows are of items never seen before (the file is no exposure log):
figures are small and the cold slice is large.
"""

from onerec_jax import config as config_lib


def get_config(arg: str = "") -> config_lib.Config:
  del arg
  c = config_lib.Config(name="lazy_decoder")
  c.prepare.dataset = "kuairand"
  c.prepare.split = "time"
  c.prepare.where = '"like" = 1'
  c.tokenizer.vectors = "fused"
  c.model.d_model = 64
  c.model.num_heads = c.model.num_kv_heads = 2
  c.model.d_ff = 128
  c.optimizer.learning_rate = 2e-3
  c.optimizer.weight_decay = 0.05
  c.training.num_epochs = 15
  c.training.patience = 4
  return c
