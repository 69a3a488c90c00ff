"""Whole sessions, from a log to recommendations, on a world with a pattern."""

import functools

import jax
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import model_configs, partitioning, runs, workflow
from onerec_jax.data import splits
from onerec_jax.evaluation import held_out
from onerec_jax.inference import assemble, recommender
from tests import worlds

pytestmark = pytest.mark.usefixtures("one_device")

ITEMS = 24


def write_log(folder):
  """Requests of two: each starts where the user's last one ended."""
  worlds.write_csv(folder, items=ITEMS)
  rng = np.random.default_rng(0)
  lines = ["user_id,item_id,timestamp_ms,request_id"]
  for user in range(60):
    item = int(rng.integers(ITEMS))
    for request in range(8):
      for slot in range(2):
        time = 10**12 + request * 1_000_000 + user * 1_000 + slot
        lines.append(f"u{user},it_{item},{time},r{request}")
        item = (item + 1) % ITEMS
  (folder / "events.csv").write_text("\n".join(lines) + "\n")
  return folder


def config_of(folder):
  c = worlds.config(folder)
  c.name = "session_decoder"
  c.prepare.split = "time"
  c.prepare.validation_from_ms = 10**12 + 6 * 1_000_000
  c.prepare.test_from_ms = 10**12 + 7 * 1_000_000
  c.pipeline.targets, c.pipeline.session_items = "session", 2
  c.pipeline.row_targets = 4
  c.model = model_configs.SessionDecoderConfig(
    session_items=2, d_model=16, num_heads=2, d_ff=32, dropout=0.0,
    sid_embed_dim=8, feature_embed_dim=8,
    moe=model_configs.MoEConfig(),  # dense: quicker to compile
  )  # fmt: skip
  c.training.num_steps = c.training.validate_every = 150
  c.training.checkpoint_every = c.training.log_every = 150
  c.evaluation.select = "ndcg@2"
  c.evaluation.batch_size = 64
  c.evaluation.beam_width = 12
  return c


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp("sessions")
  config = config_of(write_log(folder / "raw"))
  return folder, workflow.train(config, folder)


@pytest.mark.slow
def test_it_learns_what_comes_next_and_after_that(trained):
  """Chance is 2 / 24; the pattern repeats no item within a history of eight."""
  folder, _ = trained
  found = workflow.evaluate_sessions(folder, "session_decoder")
  assert found.metrics["queries"] == 60
  assert found.metrics["precision@2"] > 0.8
  assert found.metrics["full@2"] == 1.0
  # In order: the one that comes next, then the one after.
  right = found.items[:, 0] == found.target
  assert right.mean() > 0.8
  again = workflow.evaluate_sessions(folder, "session_decoder")
  assert again.metrics == found.metrics


@pytest.mark.slow
def test_the_recommender_serves_the_best_session_and_more(trained):
  folder, _ = trained
  served = recommender.Recommender.load(folder, "session_decoder")
  history = [f"it_{i}" for i in range(3, 11)]
  request = recommender.Request(history=history)
  (items,), (scores,) = served.recommend([request], k=6)
  assert items[:2] == ["it_11", "it_12"]
  assert len(set(items)) == 6
  assert not {*items} & {*history}
  assert scores == sorted(scores, reverse=True)
  # Fewer than a session.
  few = recommender.Request(history=history, allowed=["it_20"])
  assert served.recommend([few], k=3)[0] == [["it_20"]]


@pytest.mark.slow
def test_validation_measures_requests_and_their_loss(trained):
  folder, system = trained
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  params = assemble.load_params(
    system, folder / "models" / "session_decoder", mesh
  )
  found = workflow.validator(system, mesh)(params)
  asked = held_out.requests(system.prepared, splits.VALIDATION, 2)
  # Chain rule by hand: teacher-forced log-probabilities of both items' codes.
  total, prepared = 0.0, system.prepared
  apply = jax.jit(functools.partial(system.model.apply, {"params": params}))
  for batch, rows in held_out.batches(
    prepared, asked, system.config.pipeline, 2, 64
  ):
    batch = jax.device_put(batch)
    logits = apply(batch, system.catalogue)
    codes = system.catalogue.codes[np.asarray(batch.targets)]
    for level, x in enumerate(np.asarray(x, np.float64) for x in logits):
      for row, place in np.ndindex(len(rows), 2):
        sid = codes[row, place]
        others = system.catalogue.codes[1:]
        follow = others[(others[:, :level] == sid[:level]).all(axis=1), level]
        own = x[row, place]
        kept = np.exp(own[np.unique(follow)]).sum()
        total += np.log(kept) - own[sid[level]]
  levels = system.catalogue.codes.shape[1]
  assert found["loss"] == pytest.approx(
    total / levels / (2 * len(asked)), rel=1e-3
  )


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"targets": "request"}, r"session_items=2 needs .*targets=session"),
    ({"session_items": 3}, r"pipeline\.session_items=3.*session_items=2"),
    ({"row_targets": 5}, r"session_items=2.*row_targets=5"),
  ],
)
def test_sessions_that_do_not_fit_are_refused(tmp_path, changes, message):
  config = config_of(tmp_path)
  for name, value in changes.items():
    setattr(config.pipeline, name, value)
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  with pytest.raises(ValueError, match=message):
    runs.check(config, mesh, ITEMS)
