"""Reward models from a log to a reward, on feedback with a known ceiling.

A user likes the items of one category, and half of what is shown is of it.
That is clicked with probability .9, the rest with .1, so the best AUC of a
click is .9² + ½ · 2 · .9 · .1 = .9: what is left is chance.
"""

import copy
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import files, model_configs, semantic_ids, workflow
from onerec_jax.alignment import reward_models
from onerec_jax.data import rows as rows_lib
from onerec_jax.data import shards, splits
from onerec_jax.evaluation import rewards
from onerec_jax.inference import assemble
from onerec_jax.training import metrics_writer
from tests import worlds

pytestmark = pytest.mark.usefixtures("one_device")

ITEMS, USERS, REQUESTS, M = 24, 240, 12, 2
SIZES = {
  "d_model": 16, "num_heads": 2, "d_ff": 16, "num_layers": 1, "dropout": 0.0,
  "sid_embed_dim": 8, "feature_embed_dim": 8,
}  # fmt: skip
MODELS = {
  "session_reward": model_configs.SessionRewardConfig(
    session_size=M, session_seconds=40.0, **SIZES
  ),
  "p_score": model_configs.PScoreConfig(
    objectives=("click", "long_view", "like"), **SIZES
  ),
}


def liked(user, item):
  """worlds.write_csv has six items a category."""
  return item // 6 == user % 4


def write_log(folder):
  worlds.write_csv(folder, items=ITEMS)
  rng = np.random.default_rng(0)
  lines = [
    "user_id,item_id,timestamp_ms,request_id,play_time_ms,click,long_view,"
    "like,follow"
  ]
  for user in range(USERS):
    for request in range(REQUESTS):
      shown = []
      for slot in range(M):
        right = rng.random() < 0.5
        pool = [
          i for i in range(ITEMS)
          if liked(user, i) == right and i not in shown
        ]  # fmt: skip
        item = int(rng.choice(pool))
        shown.append(item)
        click = rng.random() < (0.9 if right else 0.1)
        play = int(rng.integers(15_000, 30_000)) if click else 2_000
        like = click and rng.random() < 0.5
        time = 10**12 + request * 1_000_000 + user * 1_000 + slot
        flags = (click, play > 18_000, like, click and rng.random() < 0.1)
        values = ",".join(str(bool(flag)).lower() for flag in flags)
        lines.append(f"u{user},it_{item},{time},r{request},{play},{values}")
  (folder / "events.csv").write_text("\n".join(lines) + "\n")


def config_of(folder, name):
  c = worlds.config(folder)
  c.name, c.model = name, MODELS[name]
  c.prepare.split = "time"
  c.prepare.validation_from_ms = 10**12 + (REQUESTS - 4) * 1_000_000
  c.prepare.test_from_ms = 10**12 + (REQUESTS - 2) * 1_000_000
  # Marks few sessions: a reward model must see the others too.
  c.prepare.session = "count(*) FILTER (WHERE click) = 2"
  c.pipeline.targets = "exposed" if name == "session_reward" else "request"
  c.pipeline.session_items, c.pipeline.labels = M, True
  c.pipeline.row_positions, c.pipeline.row_targets = 32, 8
  c.pipeline.max_history = 20
  c.optimizer.learning_rate = 3e-3
  if name == "session_reward":
    # By 300 steps of 8 rows a seed in four has learned its sessions too little.
    c.pipeline.batch_size, c.optimizer.learning_rate = 24, 4e-3
  c.training.num_steps = c.training.checkpoint_every = 300
  c.training.validate_every = c.training.log_every = 150
  c.evaluation.select = "auc"
  c.evaluation.batch_size = 64
  return c


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
  folder = tmp_path_factory.mktemp("rewards")
  write_log(folder / "raw")
  for name in MODELS:
    workflow.train(config_of(folder / "raw", name), folder)
  return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_it_learns_who_likes_what(folder, name):
  found = rewards.evaluate(folder, name, "test")
  if name == "p_score":
    assert 0.84 < found["auc_click"] < 0.94
    assert found["user_auc_click"] > 0.8
    assert 0.84 < found["tower/auc_click"] < 0.94
    assert found["auc_like"] > 0.7
    assert found["rate_click"] == pytest.approx(0.5, abs=0.05)
  else:
    # 480 sessions: a standard error is .025.
    assert found["auc_vtr"] > 0.66
    assert found["auc_swt"] > 0.66
    assert found["auc_ltr"] > 0.6
  assert found["auc"] > 0.6
  lines = metrics_writer.read(folder / "models" / name / "metrics.jsonl")
  kinds = {kind: [r for r in lines if r["kind"] == kind]
           for kind in ("train", "validation")}  # fmt: skip
  assert kinds["train"][-1]["loss"] < kinds["train"][0]["loss"]
  assert len(kinds["validation"]) == 2
  assert {"auc", "user_auc", "loss"} < set(kinds["validation"][-1])


@pytest.mark.slow
def test_figures_are_those_of_the_answers_one_by_one(folder):
  """Another path: a row for each event, of what came before its request."""
  reward = reward_models.load(folder, "p_score")
  system = workflow.assembled(config_of(folder / "raw", "p_score"), folder)
  prepared, config = system.prepared, system.config.pipeline
  histories, items, clicked = [], [], []
  for user in range(len(prepared)):
    record = prepared.user(user)
    clicks = rows_lib.labels(prepared, record, config)["click"]
    for event in np.flatnonzero(record.split == splits.TEST):
      first = np.flatnonzero(record.request == record.request[event])[0]
      histories.append(rows_lib.before(prepared, record, int(first)))
      items.append(record.items[event])
      clicked.append(clicks[event] > 0)
  names, earned = sorted(rows_lib.feature_sizes(prepared)), []
  for start in range(0, len(items), 64):
    part = histories[start : start + 64]
    batch = jax.device_put(rows_lib.request_batch(part, names, config, 64))
    asked = np.zeros((64, 1), np.int32)
    asked[: len(part), 0] = items[start : start + 64]
    earned += np.asarray(earn(reward, batch, asked))[: len(part), 0].tolist()
  found = rewards.evaluate(folder, "p_score", "test")
  expected = rewards.auc(np.asarray(earned), np.asarray(clicked))
  # Nearly equal rewards may change places by rounding.
  assert found["auc_click"] == pytest.approx(expected, abs=1e-4)


earn = jax.jit(lambda reward, batch, candidates: reward(batch, candidates))


def asked(folder, count):
  """Whom the candidates are for: users of the log, at its end."""
  config = config_of(folder / "raw", "p_score")
  prepared = workflow.assembled(config, folder).prepared
  records = [prepared.user(u) for u in range(count)]
  histories = [rows_lib.before(prepared, r, len(r.items)) for r in records]
  names = sorted(rows_lib.feature_sizes(prepared))
  batch = rows_lib.request_batch(histories, names, config.pipeline, count)
  users = [int(prepared.users["raw_id"][u].as_py()[1:]) for u in range(count)]
  items = [int(i[3:]) for i in prepared.items["raw_id"].to_pylist()]
  return jax.device_put(batch), np.asarray(users), np.asarray([-1, *items])


@pytest.mark.slow
def test_a_reward_prefers_what_the_user_likes(folder):
  batch, users, items = asked(folder, 24)
  candidates = np.tile(np.arange(1, ITEMS + 1, dtype=np.int32), (24, 1))
  right = liked(users[:, None], items[candidates])
  reward = reward_models.load(folder, "p_score")
  earned = np.asarray(earn(reward, batch, jnp.asarray(candidates)))
  assert ((earned > 0) & (earned < 1)).all()
  share = (earned[:, :, None] > earned[:, None, :]) & right[:, :, None]
  pairs = right[:, :, None] & ~right[:, None, :]
  assert (share & pairs).sum() / pairs.sum() > 0.9
  # Sessions of two right items earn more than of two wrong ones.
  sessions = jnp.asarray(
    [[np.flatnonzero(of)[:2] + 1, np.flatnonzero(~of)[:2] + 1] for of in right],
    jnp.int32,
  )
  whole = reward_models.load(folder, "session_reward")
  earned = np.asarray(earn(whole, batch, sessions))
  assert earned.shape == (24, 2)
  assert (earned[:, 0] > earned[:, 1]).mean() > 0.9
  # As items they are sessions of one.
  assert earn(whole, batch, sessions[:, 0]).shape == (24, 2)


@pytest.mark.slow
def test_a_reward_is_an_argument_of_a_program_that_is_compiled_once(folder):
  batch, _, _ = asked(folder, 8)
  traces = []

  @jax.jit
  def best(reward, batch, candidates):
    traces.append(1)
    return jnp.argmax(reward(batch, candidates), axis=1)

  candidates = jnp.tile(jnp.arange(1, ITEMS + 1, dtype=jnp.int32), (8, 1))
  first = reward_models.load(folder, "p_score")
  found = best(first, batch, candidates)
  again = best(reward_models.load(folder, "p_score"), batch, candidates)
  np.testing.assert_array_equal(found, again)
  # Parameters are arguments: worse ones turn the order round.
  turned = jax.tree_util.tree_map_with_path(
    lambda path, x: -x if "'fused'" in jax.tree_util.keystr(path) else x, first
  )
  assert (np.asarray(best(turned, batch, candidates)) != found).any()
  assert len(traces) == 1


@pytest.mark.slow
def test_weights_choose_the_heads(folder):
  batch, _, _ = asked(folder, 8)
  candidates = jnp.tile(jnp.arange(1, ITEMS + 1, dtype=jnp.int32), (8, 1))

  def of(weights):
    reward = reward_models.load(folder, "p_score", weights=weights)
    return np.asarray(earn(reward, batch, candidates))

  both = of({"click": 1.0, "like": 0.5})
  np.testing.assert_allclose(
    both, of({"click": 1.0}) + 0.5 * of({"like": 1.0}), atol=1e-6
  )
  with pytest.raises(ValueError, match=r"\['follow'\].*\['click', 'like'"):
    of({"follow": 1.0})


@pytest.mark.slow
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"labels": False}, r"pipeline\.labels=True"),
    ({"targets": "session"}, r"targets=session.*targets=exposed"),
    ({"session_items": 1}, r"session_size=2.*multiple of 2"),
  ],
)
def test_a_pipeline_that_does_not_fit_is_refused(folder, changes, message):
  config = config_of(folder / "raw", "session_reward")
  config.name = "other"
  for name, value in changes.items():
    setattr(config.pipeline, name, value)
  with pytest.raises(ValueError, match=message):
    workflow.train(config, folder)


@pytest.mark.slow
def test_what_is_no_reward_model_or_reads_otherwise_is_refused(
  folder, monkeypatch
):
  config = config_of(folder / "raw", "p_score")
  load = functools.partial(reward_models.load, folder)
  load("session_reward", pipeline=config.pipeline, session_items=M)
  # A P-Score judges sessions by their items.
  load("p_score", pipeline=config.pipeline, session_items=M)
  with pytest.raises(ValueError, match=r"sessions of 2 .*answers of 1"):
    load("session_reward", pipeline=config.pipeline, session_items=1)
  other = copy.deepcopy(config.pipeline)
  other.max_history = 19
  with pytest.raises(ValueError, match=r"max_history=20 .*asked about 19"):
    load("p_score", pipeline=other)
  other.pathways = config_lib.PathwaysConfig(short=3)
  with pytest.raises(ValueError, match=r"short=3.*pipeline\.pathways"):
    load("p_score", pipeline=other)
  config.model = model_configs.SASRecConfig()
  system = workflow.assembled(config, folder)
  monkeypatch.setattr(assemble, "load", lambda *_: (system, None))
  with pytest.raises(ValueError, match="other is a sasrec.*session_reward"):
    reward_models.load(folder, "other")


@pytest.mark.parametrize(
  ("lifelong", "every", "ids", "refused"),
  [
    (8, 100, "a", False),
    (9, 100, "a", True),
    (8, 99, "a", True),
    (8, 100, "b", True),
    (0, 99, "b", False),
  ],
)
def test_other_compressed_histories_are_refused(
  tmp_path, lifelong, every, ids, refused
):
  """Than those of at most 8, at every 100 events, by the semantic IDs a."""

  def config(lifelong, every):
    c = config_lib.Config(model=MODELS["p_score"])
    c.pipeline.pathways = config_lib.PathwaysConfig(short=3, lifelong=lifelong)
    c.lifelong.every = every
    return c

  asking = mock.Mock(spec=assemble.System)
  asking.config = config(8, 100)
  asking.prepared = mock.Mock(spec=shards.PreparedData)
  asking.prepared.manifest = {"fingerprint": "data"}
  asking.semantic_ids = mock.Mock(spec=semantic_ids.SemanticIds)
  asking.semantic_ids.fingerprint = "a"
  record = {
    "config": config_lib.to_dict(config(lifelong, every)),
    "prepared": "data",
    "semantic_ids": ids,
  }
  files.write_json(tmp_path / "models/judge/config.json", record)
  check = functools.partial(reward_models.check_lifelong, tmp_path)
  if refused:
    with pytest.raises(ValueError, match="judge was trained on other compr"):
      check("judge", asking)
  else:
    check("judge", asking)  # without any, `load` compares the pathways
