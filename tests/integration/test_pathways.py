"""User pathways from a log to recommendations, on a world with a pattern."""

import re
import subprocess
import sys

import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import model_configs, workflow
from onerec_jax.data import snapshots
from onerec_jax.inference import recommender
from tests import worlds

pytestmark = pytest.mark.usefixtures("one_device")

ITEMS = 24
EVENTS = 16
GENERATOR = {
  "d_model": 16, "num_heads": 2, "d_ff": 32, "dropout": 0.0,
  "sid_embed_dim": 8, "feature_embed_dim": 8, "lifelong_queries": 4,
  "lifelong_layers": 1,
}  # fmt: skip
MODELS = {
  "lazy_decoder": model_configs.LazyDecoderConfig(num_kv_heads=2, **GENERATOR),
  "encoder_decoder": model_configs.EncoderDecoderConfig(
    causal_encoder=False, **GENERATOR
  ),
}


def config_of(folder, name):
  c = worlds.config(folder / "raw")
  c.name = name
  c.model = MODELS[name]
  c.pipeline.targets = "request"
  c.pipeline.row_targets = 1
  c.pipeline.batch_size = 32
  c.pipeline.pathways = config_lib.PathwaysConfig(4, 4, 6)
  c.lifelong = config_lib.LifelongConfig(every=5, max_items=2)
  steps = 150 if name == "encoder_decoder" else 90
  c.training.num_steps = c.training.validate_every = steps
  c.training.checkpoint_every = c.training.log_every = steps
  return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("pathways")
  worlds.write_csv(folder / "raw", users=60, items=ITEMS, events=EVENTS)
  for name in MODELS:
    workflow.train(config_of(folder, name), folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_it_learns_what_comes_next(folder, name):
  """The next item follows in four of five cases; chance is 5 / 24."""
  found = workflow.evaluate(folder, name)
  assert found.metrics["recall@5"] > 0.7


@pytest.mark.slow
def test_histories_are_compressed_once(folder):
  (made,) = snapshots.root(folder).glob("*/manifest.json")
  config = config_of(folder, "lazy_decoder")
  system = workflow.assembled(config, folder)
  assert system.prepared.snapshots.manifest["users"] == 60
  assert system.prepared.snapshots.manifest["snapshots"] == 60 * 3
  assert [*snapshots.root(folder).glob("*/manifest.json")] == [made]


@pytest.mark.slow
def test_a_given_history_is_read_as_the_stored_one(folder):
  """Also its positive events and its representatives."""
  asked = recommender.Recommender.load(folder, "lazy_decoder")
  lines = (folder / "raw" / "events.csv").read_text().split()[1:]
  rows = [r for r in (x.split(",") for x in lines) if r[0] == "u-4"]
  request = recommender.Request(
    history=[r[1] for r in rows],
    timestamps_ms=[int(r[2]) for r in rows],
    event_columns={"rating": [float(r[3]) for r in rows]},
    user="u-4",
  )
  stored = recommender.Request(user="u-4")
  items, scores = asked.recommend([request, stored], 5)
  assert items[0] == items[1]
  np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)
  # Without ratings no event is known to be positive.
  bare = recommender.Request(
    history=request.history, timestamps_ms=request.timestamps_ms, user="u-4"
  )
  _, other = asked.recommend([bare], 5)
  assert np.abs(np.subtract(other[0], scores[0])).max() > 1e-4
  newcomer, _ = asked.recommend([recommender.Request(history=[])], 5)
  assert len(newcomer[0]) == 5


@pytest.mark.slow
def test_the_program_tells_its_throughput(folder):
  command = [
    sys.executable, "-m", "launch.compress", f"--workdir={folder}",
    "--config.tokenizer.num_codes=8", "--config.tokenizer.num_levels=2",
    "--config.tokenizer.vector_size=8", "--config.lifelong.every=8",
  ]  # fmt: skip
  lifelong = "--config.pipeline.pathways.lifelong=9"
  done = subprocess.run(
    [*command, lifelong], capture_output=True, text=True, check=True
  )
  # Two snapshots a user, of eight and of all sixteen events.
  assert re.search(r"clustered events\W+1,440\b", done.stdout)
  assert "events per second" in done.stdout
  failed = subprocess.run(command, capture_output=True, text=True, check=False)
  assert failed.returncode == 1
  assert "pipeline.pathways.lifelong=2000" in failed.stderr
