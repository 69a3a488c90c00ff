"""Two runs of random weights over a log of string ids."""

import numpy as np

from onerec_jax import checkpoint, files, model_configs, runs, workflow
from onerec_jax import config as config_lib
from onerec_jax.data import rows as rows_lib
from onerec_jax.inference import assemble
from tests import tiny

USERS, ITEMS, EVENTS = 8, 20, 6
CITIES = ("Oslo", "Rome", "Lima")
# What data frames write for users who are not known.
NAMES = [*(f"u-{user}" for user in range(USERS - 1)), "None"]


def write_log(folder):
  """Random events with string ids, ratings and the users' cities."""
  rng = np.random.default_rng(0)
  lines = ["user_id,item_id,timestamp_ms,rating"]
  for user in range(USERS):
    # Every item has events, so that all are in the catalogue.
    items = (rng.permutation(ITEMS)[:EVENTS] + 3 * user) % ITEMS
    times = 10**12 + np.cumsum(2 ** rng.integers(1, 30, EVENTS))
    for time, item in zip(times, items):
      lines.append(f"{NAMES[user]},it_{item},{time},{rng.integers(1, 6)}")
  (folder / "events.csv").write_text("\n".join(lines) + "\n")
  lines = ["item_id,title"]
  lines += [f"it_{i},{f'Thing {i}' if i else ''}" for i in range(ITEMS)]
  (folder / "items.csv").write_text("\n".join(lines) + "\n")
  lines = ["user_id,city"]
  lines += [f"{NAMES[user]},{CITIES[user % 3]}" for user in range(USERS)]
  (folder / "users.csv").write_text("\n".join(lines) + "\n")


def config_of(folder, name):
  c = config_lib.Config(name=name)
  c.prepare.dataset = "tables"
  for kind in ("events", "items", "users"):
    setattr(c.prepare, kind, str(folder / f"{kind}.csv"))
  c.prepare.num_shards = 2
  c.pipeline.max_history = 4
  c.tokenizer.vectors = "collaborative"
  c.tokenizer.num_codes, c.tokenizer.num_levels = 5, 2
  c.tokenizer.vector_size = 4
  if name == "sasrec":
    c.model = model_configs.SASRecConfig()
  else:
    c.model.sid_embed_dim = c.model.feature_embed_dim = 4
    c.model.num_kv_heads = 2
  c.model.d_model, c.model.num_heads, c.model.d_ff = 8, 2, 8
  c.model.num_layers = 1
  return c


def write(folder):
  """Both runs and their data."""
  write_log(folder)
  for name in ("lazy_decoder", "sasrec"):
    write_run(config_of(folder, name), folder)


def write_run(config, workdir):
  """A run as if it had been trained: (its system, its parameters)."""
  system = workflow.assembled(config, workdir)
  features = list(rows_lib.feature_sizes(system.prepared))
  batch = rows_lib.request_batch([], features, config.pipeline, 1)
  # Large ones: the ranking must not hang on rounding, as near ties would.
  params = tiny.random_params(system.model, batch, system.catalogue, 1)
  run = assemble.run_directory(workdir, config.name)
  files.write_json(run / "config.json", runs.record(system, workdir))
  checkpoint.save_best(run, 1, params)
  return system, params
