"""Runs that serve a world and learn from it: a test from end to end."""

import copy
import dataclasses
import json
import shutil
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import (
  files,
  online,
  online_arms,
  online_models,
  partitioning,
  workflow,
)
from onerec_jax.alignment import requests
from onerec_jax.data import shards
from onerec_jax.inference import assemble, retrieval, serving
from onerec_jax.simulation import affinity
from onerec_jax.simulation.policies import LoggingPolicy
from onerec_jax.simulation.state import DAY_MS, DAY_ZERO_MS
from onerec_jax.simulation.step import concatenate, run
from onerec_jax.simulation.world import World
from tests import online_runs
from tests.online_runs import CONFIGS, SLOTS


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  return online_runs.write(tmp_path_factory.mktemp("online"))


@pytest.fixture(scope="module")
def mesh():
  # One device: quicker to compile; `ab_test` itself takes all eight.
  return partitioning.make_mesh(
    config_lib.MeshConfig(), devices=jax.devices()[:1]
  )


@pytest.fixture(scope="module")
def begun():
  """(world, morning after the log, log)."""
  world = World.create(CONFIGS[0].prepare.simulation)
  return world, *run(world, LoggingPolicy.create(world), 3)


def _settings(folder, **changes):
  values = {
    "days": 2, "from_day": 3, "updates": 0, "learning_rate": 0.0,
    "samples": "own",
  }  # fmt: skip
  return online.Settings(**{**values, **changes}, directory=folder)


@pytest.mark.slow
def test_a_frozen_model_against_itself(workdir, tmp_path):
  """Common random numbers: not a single difference; and all is written."""
  arms = "two_tower", "two_tower"  # the quickest to compile
  found = online.ab_test(workdir, *arms, _settings(tmp_path / "aa", from_day=0))
  for row in found:
    assert row["difference"] == row["low"] == row["high"] == 0.0
  record = json.loads((tmp_path / "aa" / "ab_test.json").read_text())
  assert record["figures"][0]["figure"] == "stay_s"
  assert record["settings"]["from_day"] == 3
  assert [day["day"] for day in record["days"]] == [3, 4, 3, 4]
  for name in ("forest.png", "days.png", "requests.png"):
    assert (tmp_path / "aa" / name).stat().st_size > 1000
  with pytest.raises(ValueError, match="holds something already"):
    online.ab_test(workdir, *arms, _settings(tmp_path / "aa"))
  late = _settings(tmp_path / "no", from_day=9)
  with pytest.raises(ValueError, match="from_day=9: the log has .* 0 to 2"):
    online.ab_test(workdir, *arms, late)


def test_what_cannot_train_on_is_told_before_a_day_is_played(workdir, tmp_path):
  shutil.copytree(workdir, tmp_path / "work")
  path = assemble.run_directory(tmp_path / "work", "two_tower") / "config.json"
  record = files.read_json(path)
  record["config"]["pipeline"]["batch_size"] = 12
  files.write_json(path, record)
  settings = _settings(tmp_path / "ab", from_day=0, updates=1)
  with pytest.raises(ValueError, match="batch_size=12 is no multiple of the 8"):
    online.ab_test(tmp_path / "work", "two_tower", "uniform", settings)
  assert not (tmp_path / "ab").exists()


@pytest.mark.slow
def test_models_that_know_what_comes_are_refused(workdir, mesh, begun):
  """The data train on the first day; a test may begin with the second."""
  ask = lambda until: online_arms.make_arm(
    "two_tower", workdir, begun[0], until, mesh
  )
  arm = ask(DAY_ZERO_MS + DAY_MS)
  noon = DAY_ZERO_MS + DAY_MS // 2
  with pytest.raises(ValueError, match="trained on days until 1.0, which"):
    ask(noon)
  prepared = copy.copy(arm.models[0].system.prepared)
  prepared.manifest = prepared.manifest | {"split_boundaries_ms": None}
  with pytest.raises(ValueError, match="not split by time; leave --from_day"):
    online_arms._check_past(prepared, DAY_ZERO_MS + DAY_MS)


@pytest.mark.slow
def test_snapshots_of_a_log_lie_beside_it(served, workdir, tmp_path):
  """Made of the vectors of the work directory's semantic IDs."""
  model = copy.copy(served.models[0])
  config = copy.deepcopy(model.system.config)
  config.pipeline.pathways.lifelong, config.lifelong.every = 3, 4
  model.system = dataclasses.replace(model.system, config=config)
  learned = []
  model.learn = lambda *given: learned.append(given)
  mine = tmp_path / "arm_0" / "prepared"
  shutil.copytree(model.system.prepared.directory, mine)
  log = shards.PreparedData.open(mine.parent)
  arm = dataclasses.replace(served, models=(model,))
  online._learn(arm, log, workdir, _settings(tmp_path, updates=1), 0)
  assert len([*(mine.parent / "lifelong").glob("*/manifest.json")]) == 1
  assert not (workdir / "lifelong").exists()
  assert learned[0][0].snapshots.manifest["users"] == len(log)


@pytest.fixture(scope="module")
def served(workdir, mesh, begun):
  """The arm `lazy`; its tests share what is compiled."""
  return online_arms.make_arm("lazy", workdir, begun[0], None, mesh)


def _anew(arm, world):
  """The arm as it was before it saw anything."""
  model = arm.models[0]
  known = serving.Histories(
    model.system.prepared, model.system.config.prepare, world
  )
  policy = dataclasses.replace(arm.policy, histories=known)
  return dataclasses.replace(arm, policy=policy, observe=known.observe)


@pytest.mark.slow
def test_what_is_shown_and_its_log_probability(
  served, mesh, workdir, begun, tmp_path
):
  world, state, events = begun
  arm, seen = _anew(served, world), []
  model = arm.models[0]
  find = retrieval.make_retrieve(model.system.model, model.system.index, 4)

  def observe(now, users, requests, slate, given, shown):
    if not seen:  # by the beam search itself
      histories = arm.policy.histories.of(users)
      allowed = np.ones((16, 33), bool)
      allowed[: len(users), 0] = False
      allowed[: len(users), 1:] = affinity.eligible(world, now, users)
      with jax.set_mesh(mesh):
        found = find(
          model.params, model.batch(histories), model.catalogue, allowed
        )
      items, scores = (np.asarray(x)[: len(users), :SLOTS] for x in found)
      np.testing.assert_array_equal(slate.items + 1, items)
      np.testing.assert_allclose(
        slate.log_probability, scores, rtol=1e-4, atol=1e-5
      )
    seen.append(slate)
    arm.observe(now, users, requests, slate, given, shown)

  watched = dataclasses.replace(arm, observe=observe)
  (days,) = online.play(
    [watched], workdir, world, state, events, _settings(tmp_path)
  )
  assert len(seen) > 2
  shown = concatenate(days)
  assert np.isfinite(shown.log_probability).all()
  assert (world.item_launch[shown.item] <= 4).all()
  # Nobody sees an item again within the window, the log's impressions too.
  window = world.repeat_window
  whole = concatenate([events, shown])
  for user in range(16):
    own = whole.item[whole.user == user].tolist()
    for place, item in enumerate(own):
      assert item not in own[max(0, place - window) : place]
  assert len(whole) > 16 * window / 2


@pytest.fixture(scope="module")
def cascade(workdir, mesh, begun):
  """The arm of that name; its tests share what is compiled."""
  return online_arms.make_arm("cascade", workdir, begun[0], None, mesh)


def _moved(before, params):
  """The largest change of each parameter."""
  return jax.tree.leaves(
    jax.tree.map(lambda a, b: np.abs(a - np.asarray(b)).max(), before, params)
  )


@pytest.mark.slow
def test_closing_the_loop_trains_on_and_keeps_the_codes(
  served, cascade, workdir, begun, tmp_path
):
  world, state, events = begun
  arms = [_anew(served, world), _anew(cascade, world)]
  model, asked = arms[0].models[0], np.arange(16, dtype=np.int32)
  some = np.tile(np.arange(33) > 0, (16, 1))
  known = _anew(served, world).policy.histories.of(asked)
  ask = lambda: arms[0].policy.answer(known, some)[1]
  copies = lambda: [
    jax.tree.map(np.asarray, m.params) for arm in arms for m in arm.models
  ]
  before, was = copies(), ask()
  codes = np.array(model.catalogue.codes)
  played = online.play(
    arms, workdir, world, state, events,
    _settings(tmp_path, updates=2, days=3, learning_rate=1e-2),
  )  # fmt: skip
  for old, new in zip(before, copies(), strict=True):
    # Two steps at a constant rate, not the first of a hundred of warm-up.
    assert max(_moved(old, new)) > 1e-2
  assert min(_moved(before[0], model.params)) > 0
  # What was learned is served.
  assert np.abs(ask() - was).max() > 1e-3
  np.testing.assert_array_equal(model.catalogue.codes, codes)
  learner = model._learner
  # Two mornings of two steps; both by one compiled program.
  assert int(learner._state.step) == 4
  assert learner._step._cache_size() == 1
  assert not np.array_equal(played[0][0].item, played[1][0].item)
  for place, days in enumerate(played):
    _check_log(tmp_path / f"arm_{place}", [events, *days[:2]])


def test_what_joins_may_be_what_the_logging_policy_would_have_shown(
  served, workdir, begun, tmp_path
):
  """Its days, in a world of its own, and none of the arm's."""
  world, state, events = begun
  arm, learned = _anew(served, world), []
  model = copy.copy(arm.models[0])
  model.learn = lambda *given: learned.append(given)
  online.play(
    [dataclasses.replace(arm, models=(model,))], workdir, world, state, events,
    _settings(tmp_path, updates=1, days=3, samples="logging"),
  )  # fmt: skip
  assert len(learned) == 2
  whole = run(world, LoggingPolicy.create(world), 5)[1]
  _check_log(tmp_path / "arm_0", [whole])


@pytest.mark.slow
def test_own_days_may_be_asked_about_and_not_imitated(
  served, workdir, begun, tmp_path
):
  """Rows are of the log before the test; requests of the arm's days alone."""
  world, state, events = begun
  arm, learned = _anew(served, world), []
  model = copy.copy(arm.models[0])

  def train(*given):
    learned.append(given)
    return model.params

  model._learner = types.SimpleNamespace(train=train)
  (days,) = online.play(
    [dataclasses.replace(arm, models=(model,))], workdir, world, state, events,
    _settings(tmp_path, updates=1, days=3, samples="prompts"),
  )  # fmt: skip
  assert len(learned) == 2
  log, _, seed, prompts = learned[-1]
  _check_log(tmp_path / "arm_0" / "before", [events])
  _check_log(tmp_path / "arm_0", [events, *days[:2]])
  assert log.directory.is_relative_to(tmp_path / "arm_0" / "before")
  config = copy.deepcopy(model.system.config)
  plain = next(online_models.batches(config, log, seed, prompts)[0])
  config.alignment.objective, config.alignment.requests = "ecpo", 8
  batch = next(online_models.batches(config, log, seed, prompts)[0])
  np.testing.assert_array_equal(batch.items, plain.items)
  # Each request has the history of one that the arm was asked on its days.
  asked, own = requests.training_requests(*prompts), concatenate(days[:2])
  assert len(asked) == len(np.unique(own.request))
  histories = {
    tuple(prompts.prepared.user(int(user)).items[:event][-8:].tolist())
    for user, event in asked
  }
  for row in range(8):
    seen = batch.requests.items[row, 1 : batch.requests.visible_until[row, 0]]
    assert tuple(seen.tolist()) in histories


def test_prompts_without_a_model_to_ask_are_refused(workdir, tmp_path):
  settings = _settings(
    tmp_path / "ab", from_day=0, updates=1, samples="prompts"
  )
  with pytest.raises(ValueError, match="aligned on their own answers"):
    online.ab_test(workdir, "two_tower", "uniform", settings)


def _check_log(directory, logged):
  """It holds the world's events and this arm's first days, and no other's."""
  stored, kept = shards.PreparedData.open(directory), concatenate(logged)
  assert int(stored.lengths.sum()) == len(kept)
  for place, raw in enumerate(stored.users["raw_id"].to_pylist()):
    record, mine = stored.user(place), kept.user == int(raw[1:])
    np.testing.assert_array_equal(record.items, kept.item[mine] + 1)
    np.testing.assert_allclose(
      record.signals["log_probability"], kept.log_probability[mine], rtol=1e-6
    )
    assert (record.split == 0).all()


@pytest.mark.slow
def test_an_aligned_run_goes_on_aligning(workdir, mesh):
  """Its own config says how: here, GBPO on clicks."""
  system, params = assemble.load(workdir, "lazy", mesh)
  config = copy.deepcopy(system.config)
  config.alignment.feedback = "click"
  system = dataclasses.replace(system, config=config)
  aligned = online_models.Model(system, params, mesh)
  aligned.learn(system.prepared, workdir, 2, 1e-2, 0)
  assert type(aligned._learner._state).__name__ == "AlignState"
  before = jax.tree.map(np.asarray, params)
  assert max(_moved(before, aligned.params)) > 1e-3


@pytest.mark.slow
def test_item_scores_leave_full_lists_when_the_seen_are_out(workdir):
  """However few candidates a generator's beam would have."""
  found = workflow.evaluate(workdir, "two_tower")
  assert found.facts["beam_width"] > CONFIGS[1].evaluation.beam_width
  assert found.metrics["filtered/valid_rate@10"] == 1.0


def test_a_morning_trains_on_the_whole_log(workdir, mesh):
  """In order of time, too; and on the frequencies of that log."""
  system, params = assemble.load(workdir, "two_tower", mesh)
  config = copy.deepcopy(system.config)
  config.pipeline.order = "time"
  model = online_models.Model(
    dataclasses.replace(system, config=config), params, mesh
  )
  log = copy.copy(system.prepared)
  log.item_counts = log.item_counts * np.arange(33)
  model.learn(log, workdir, 1, 1e-2, 0)
  learner, seen = model._learner, []
  for seed in (0, 1):
    prompts = online_models.Prompts(log)
    batch = next(online_models.batches(learner._config, log, seed, prompts)[0])
    seen.append(np.asarray(batch.targets))
  assert not np.array_equal(*seen)
  shares = (log.item_counts[1:] + 1) / (log.item_counts[1:] + 1).sum()
  np.testing.assert_allclose(learner._tables[1:], np.log(shares), rtol=1e-5)


def test_a_ranker_of_other_compressed_histories_is_refused(cascade):
  first, second = cascade.models
  ranker = copy.copy(second)
  config = copy.deepcopy(second.system.config)
  config.pipeline.pathways.lifelong = 3
  ranker.system = dataclasses.replace(second.system, config=config)
  online_arms._check_lifelong([ranker, ranker])
  online_arms._check_lifelong([ranker, second])
  with pytest.raises(ValueError, match="p_score reads compressed histories"):
    online_arms._check_lifelong([first, ranker])


@pytest.mark.slow
def test_a_cascade_retrieves_and_ranks(cascade, workdir, mesh, begun):
  world, _, _ = begun
  arm = cascade
  first, second = arm.models
  histories = arm.policy.histories.of(np.arange(5, dtype=np.int32))
  allowed = np.ones((5, 33), bool)
  allowed[:, ::5] = False
  items, log_probability = arm.policy.answer(histories, allowed)
  assert np.isnan(log_probability).all()
  every = jnp.tile(jnp.arange(1, 33), (16, 1))
  scores, heads = jax.jit(
    lambda p, q, a, b: (
      first.system.model.apply({"params": p}, a, first.catalogue),
      second.system.model.apply(
        {"params": q}, b, second.catalogue, every, method="scores"
      ),
    )
  )(first.params, second.params, first.batch(histories),
    second.batch(histories))  # fmt: skip
  for row in range(5):
    retrieved = np.where(allowed[row], np.asarray(scores)[row, 0], -np.inf)
    best = np.argsort(-retrieved)[:4]
    order = np.argsort(-np.asarray(heads["p"])[row, best - 1])[:SLOTS]
    np.testing.assert_array_equal(items[row], best[order])
  with pytest.raises(ValueError, match="lazy cannot rank given items"):
    online_arms.make_arm("two_tower/lazy", workdir, world, None, mesh)
  with pytest.raises(ValueError, match="want a run, or retrieval/ranker"):
    online_arms.make_arm("a/b/c", workdir, world, None, mesh)
