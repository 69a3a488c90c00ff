"""Small logs with a pattern to learn, written as the CSV a user would give."""

import pathlib

import numpy as np

from onerec_jax import config as config_lib


def write_csv(
  folder: pathlib.Path,
  users: int = 40,
  items: int = 30,
  events: int = 12,
  seed: int = 0,
) -> pathlib.Path:
  """Events where item i is mostly followed by item i + 1, with string ids.

  Returns:
    The folder, holding events.csv and items.csv.
  """
  rng = np.random.default_rng(seed)
  folder.mkdir(parents=True, exist_ok=True)
  lines = ["user_id,item_id,timestamp_ms,rating"]
  for user in range(users):
    item = int(rng.integers(items))
    for event in range(events):
      time = 1_600_000_000_000 + user * 1_000 + event * 3_600_000
      lines.append(f"u-{user},it_{item},{time},{rng.integers(1, 6)}")
      jump = rng.random() < 0.2
      item = int(rng.integers(items)) if jump else (item + 1) % items
  (folder / "events.csv").write_text("\n".join(lines) + "\n")
  words = ["red", "blue", "green", "round", "square", "soft"]
  lines = ["item_id,title,category"]
  for item in range(items):
    kind = words[item % 6]
    lines.append(f"it_{item},{kind} thing number {item},{words[item // 6 % 6]}")
  (folder / "items.csv").write_text("\n".join(lines) + "\n")
  return folder


def config(folder: pathlib.Path) -> config_lib.Config:
  """A lazy decoder that trains on `write_csv`'s log in seconds."""
  c = config_lib.Config(name="tiny")
  c.prepare.dataset = "tables"
  c.prepare.events = str(folder / "events.csv")
  c.prepare.items = str(folder / "items.csv")
  c.prepare.num_shards = 2
  c.pipeline.batch_size = 8
  c.pipeline.row_positions = c.pipeline.row_targets = 16
  c.pipeline.max_history = 8
  c.tokenizer.num_codes = 8
  c.tokenizer.num_levels = 2
  c.tokenizer.vector_size = 8
  c.model.d_model = 16
  c.model.num_heads = c.model.num_kv_heads = 2
  c.model.d_ff = 32
  c.model.sid_embed_dim = 8
  c.model.feature_embed_dim = 8
  c.optimizer.learning_rate = 1e-2
  c.optimizer.warmup_steps = 2
  c.training.num_steps = 10
  c.training.log_every = 2
  c.training.validate_every = 5
  c.training.checkpoint_every = 3
  c.evaluation.beam_width = 10
  c.evaluation.batch_size = 16
  c.evaluation.cutoffs = (5, 10)
  return c
