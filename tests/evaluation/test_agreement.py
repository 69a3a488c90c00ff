"""Reward models against the truth within a request; correlations by numpy."""

import copy
import functools

import jax
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import model_configs, semantic_ids
from onerec_jax.data import prepare, shards
from onerec_jax.data import rows as rows_lib
from onerec_jax.evaluation import agreement, held_out, preference
from onerec_jax.inference import assemble
from onerec_jax.simulation.state import DAY_MS, DAY_ZERO_MS
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")

M, W, LIMIT = 3, 4, 5
SIZES = {
  "d_model": 16, "num_heads": 2, "d_ff": 16, "sid_embed_dim": 4,
  "feature_embed_dim": 4,
}  # fmt: skip
MODELS = {
  "session": model_configs.SessionDecoderConfig(
    session_items=M, encoder_layers=1, decoder_layers=1,
    moe=model_configs.MoEConfig(), **SIZES,
  ),
  "by_item": model_configs.PScoreConfig(
    objectives=("click", "like"), num_layers=1, dropout=0.0, **SIZES
  ),
  "by_session": model_configs.SessionRewardConfig(
    objectives=("swt",), session_size=M - 1, num_layers=1, dropout=0.0, **SIZES
  ),
}  # fmt: skip


def correlation(head, figure):
  """Deviations from each request's mean, one request after the other."""
  pairs = [
    (value - mean(of), true - mean(by))
    for of, by in zip(head.tolist(), figure.tolist())
    for value, true in zip(of, by)
  ]
  return np.corrcoef(np.array(pairs).T)[0, 1]


def mean(values):
  return sum(values) / len(values)


def test_what_requests_differ_by_does_not_count():
  rng = np.random.default_rng(0)
  head, like = rng.random((2, 6, 5)).astype(np.float32)
  truth = {"ltr": like, "swt": 30 * head + 100 * rng.random((6, 1))}
  found = agreement.within_requests(head, truth)
  assert found.r["ltr"] == pytest.approx(correlation(head, like), abs=1e-6)
  assert found.r["swt"] == pytest.approx(1.0, abs=1e-6)
  assert found.spread == pytest.approx(
    np.sqrt(np.mean([np.var(row) for row in head])), rel=1e-6
  )
  # A head that knows only which request is worth more tells nothing apart.
  flat = agreement.within_requests(
    np.repeat(like.mean(1, keepdims=True), 5, axis=1), truth
  )
  assert flat.spread == 0
  assert np.isnan(flat.r["ltr"])


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Name → system and random parameters, on a small simulated world."""
  c = config_lib.Config(name="data")
  c.prepare.dataset, c.prepare.split = "simulator", "time"
  world = c.prepare.simulation
  world.num_users, world.num_items, world.num_days, world.slots = 20, 60, 3, 4
  c.prepare.validation_from_ms = DAY_ZERO_MS + DAY_MS
  c.prepare.test_from_ms = DAY_ZERO_MS + 2 * DAY_MS
  c.pipeline.session_items, c.pipeline.max_history = M, 7
  c.evaluation.batch_size, c.evaluation.beam_width = 8, 6
  folder = tmp_path_factory.mktemp("world")
  data = shards.PreparedData.open(prepare.prepare(c.prepare, folder))
  numbers = np.arange(-1, data.num_items).clip(0)
  codes = np.stack(np.divmod(numbers, 8), axis=1).astype(np.int32)
  coded = semantic_ids.SemanticIds(codes, (8, 8), [], "by number", {})
  found = {}
  for seed, (name, model) in enumerate(MODELS.items()):
    config = copy.deepcopy(c)
    config.name, config.model = name, model
    system = assemble.assemble(config, data, coded)
    found[name] = tiny.with_params(system, seed)
  return found


def test_a_judge_is_asked_about_the_answers_of_the_run(runs, monkeypatch):
  monkeypatch.setattr(assemble, "load", lambda _, name, mesh: runs[name])
  ask = functools.partial(
    agreement.of_run, "", split="test", width=W, limit=LIMIT
  )
  found = ask("session", ["by_item"])["by_item"]
  assert sorted(found) == ["click", "like", "p"]

  true = preference.of_run("", "session", "test", W, LIMIT)
  system, params = runs["by_item"]
  requests = held_out.requests(system.prepared, 2, M, LIMIT)
  scores = jax.jit(
    lambda *given: system.model.apply(
      {"params": params}, *given, method="scores"
    )
  )
  like = []
  for row, sessions in enumerate(true.sessions):
    record = system.prepared.user(int(requests.user[row]) - 1)
    before = rows_lib.before(system.prepared, record, int(requests.first[row]))
    batch = tiny.asking(system, [before])
    logits = scores(batch, system.catalogue, sessions.reshape(1, W * M))
    logits = np.asarray(logits["like"], np.float64).reshape(W, M).mean(axis=1)
    like.append(1 / (1 + np.exp(-logits)))
  for figure, value in true.values.items():
    expected = correlation(np.array(like), value)
    assert found["like"].r[figure] == pytest.approx(expected, abs=1e-4)

  with pytest.raises(ValueError, match="by_session judges sessions of 2"):
    ask("session", ["by_session"])
  with pytest.raises(ValueError, match="by_item answers a request with one"):
    ask("by_item", ["by_item"])
