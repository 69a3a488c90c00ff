"""Runs of a small simulated world that look trained, to serve it."""

import copy
import pathlib

from onerec_jax import checkpoint, files, model_configs, runs, workflow
from onerec_jax import config as config_lib
from onerec_jax.data import rows
from onerec_jax.inference import assemble
from onerec_jax.simulation.state import DAY_MS, DAY_ZERO_MS
from tests import tiny

SLOTS = 2


def _config(name, model, **pipeline):
  c = config_lib.Config(name=name, model=model)
  c.prepare.dataset = "simulator"
  c.prepare.simulation = config_lib.SimulationConfig(
    num_users=16, num_items=32, num_days=3, slots=SLOTS, requests_per_day=2.0
  )
  c.prepare.split = "time"
  c.prepare.validation_from_ms = DAY_ZERO_MS + DAY_MS
  c.prepare.test_from_ms = DAY_ZERO_MS + 2 * DAY_MS
  c.prepare.num_shards = 1
  c.tokenizer.num_codes, c.tokenizer.num_levels = 8, 2
  c.tokenizer.vector_size = 8
  c.pipeline.targets = "request"
  c.pipeline.batch_size = 8
  c.pipeline.row_positions, c.pipeline.row_targets = 12, 4
  c.pipeline.max_history = 8
  c.pipeline.labels = True
  # Warm-up of the run's own, which is behind it when it serves.
  c.optimizer.learning_rate, c.optimizer.warmup_steps = 1e-2, 100
  c.evaluation.beam_width, c.evaluation.batch_size = 4, 16
  for field, value in pipeline.items():
    setattr(c.pipeline, field, value)
  return c


CONFIGS = (
  _config("lazy", model_configs.LazyDecoderConfig(
    d_model=16, num_heads=2, num_kv_heads=2, d_ff=16, sid_embed_dim=4,
    feature_embed_dim=4, dropout=0.0,
  )),
  _config("two_tower", model_configs.TwoTowerConfig(d_model=16, d_ff=16)),
  _config("p_score", model_configs.PScoreConfig(
    objectives=("click",), d_model=16, d_ff=16, num_layers=1, sid_embed_dim=4,
    feature_embed_dim=4,
  )),
)  # fmt: skip


def write(workdir: pathlib.Path) -> pathlib.Path:
  """Runs of random parameters, which takes a fraction of training's time."""
  for config in CONFIGS:
    system = workflow.assembled(copy.deepcopy(config), workdir)
    names = sorted(rows.feature_sizes(system.prepared))
    example = rows.request_batch([], names, config.pipeline, 1)
    params = tiny.random_params(system.model, example, system.catalogue, 0)
    run_directory = assemble.run_directory(workdir, config.name)
    checkpoint.save_best(run_directory, 0, params)
    files.write_json(
      run_directory / "config.json", runs.record(system, workdir)
    )
  return workdir
