"""Alignment of a trained run, end to end on a log with a pattern."""

import copy
import functools

import jax
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import files, partitioning, runs, workflow, workflow_align
from onerec_jax.alignment import checks
from onerec_jax.inference import assemble
from onerec_jax.training import metrics_writer
from tests import tiny, worlds
from tests.training.test_loop import _arrays, _KilledError

START = "tiny"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(config, work directory, system) of a run to start from."""
  folder = tmp_path_factory.mktemp("align")
  config = worlds.config(worlds.write_csv(folder / "raw"))
  config.training.num_steps = config.training.validate_every = 30
  system = workflow.train(config, folder)
  return config, folder, system


def aligned(trained, name, **settings):
  """(config, system) of a run that likes items 1 to 10."""
  config, _, system = trained
  config = copy.deepcopy(config)
  config.name = name
  config.optimizer.learning_rate = 3e-3
  config.training.num_steps, config.training.validate_every = 10, 5
  settings = dict(
    start=START, objective="ecpo", weight=2.0, requests=8, group=8, gate=0.5,
    sync_every=4, rewards=("tests.alignment.judges:low_ids=1",), **settings,
  )  # fmt: skip
  for field, value in settings.items():
    setattr(config.alignment, field, value)
  return config, assemble.assemble(config, system.prepared, system.semantic_ids)


def best(system, folder, name):
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  run = folder / "models" / name
  return jax.device_get(assemble.load_params(system, run, mesh))


equal = functools.partial(jax.tree.map, np.testing.assert_array_equal)


@pytest.mark.slow
def test_an_aligned_run_is_a_run_and_resumes_bit_equal(
  trained, monkeypatch, capsys
):
  """Cut in its second validation, step 5; its last checkpoint is step 3."""
  _, folder, system = trained
  config, of_run = aligned(trained, "aligned")
  workflow_align.align(config, folder, of_run)
  whole = folder / "models" / "aligned"
  records = metrics_writer.read(whole / "metrics.jsonl")
  validated = [r for r in records if r["kind"] == "validation"]
  assert [r["step"] for r in validated] == [0, 5, 10]
  # The start is what the run it came from was validated at.
  before = metrics_writer.read(folder / "models" / START / "metrics.jsonl")
  assert validated[0]["ndcg@10"] == pytest.approx(before[-1]["ndcg@10"])
  finished = files.read_json(whole / "finished.json")
  assert finished["best_step"] == 10
  assert not finished["stopped"]
  runs.say_if_stopped(folder, "aligned")
  assert not capsys.readouterr().out
  assert finished["start"] == validated[0]["ndcg@10"]
  earned = [r["reward_mean"] for r in records if r["kind"] == "train"]
  assert earned[-1] > earned[0]
  # Everything that takes a run's name takes this one.
  found = workflow.evaluate(folder, "aligned")
  assert found.metrics["queries"] == 40

  config, of_run = aligned(trained, "cut")
  validator, calls = workflow.validator, []

  def cutting(*given):
    validate = validator(*given)

    def cut(params):
      calls.append(1)
      if len(calls) == 2:
        raise _KilledError
      return validate(params)

    return cut

  monkeypatch.setattr(workflow, "validator", cutting)
  with pytest.raises(_KilledError):
    workflow_align.align(config, folder, of_run)
  workflow_align.align(config, folder, of_run)
  cut = folder / "models" / "cut"
  assert len(calls) == 4  # 0, 5 and then 5, 10: the start is not asked again
  equal(_arrays(cut, 10), _arrays(whole, 10))
  lines = lambda run: [
    (r["step"], r["kind"], r.get("loss"), r.get("kl"), r.get("ndcg@10"))
    for r in metrics_writer.read(run / "metrics.jsonl")
  ]
  assert lines(cut) == lines(whole)
  resumed = files.read_json(cut / "finished.json")
  for name in ("start", "best", "best_step", "stopped"):
    assert resumed[name] == finished[name]


@pytest.mark.slow
def test_a_run_that_harms_is_stopped_and_the_start_kept(trained, capsys):
  """And stays stopped."""
  _, folder, system = trained
  config, of_run = aligned(trained, "harmed")
  config.optimizer.learning_rate = 0.3
  config.alignment.weight = 100.0
  for _ in range(2):
    workflow_align.align(config, folder, of_run)
    finished = files.read_json(folder / "models/harmed/finished.json")
    assert finished["best_step"] == 0
    assert "at step 5 is below" in finished["stopped"]
    runs.say_if_stopped(folder, "harmed")
    assert "harmed: stopped by its gate (ndcg@10" in capsys.readouterr().out
    (folder / "models/harmed/finished.json").unlink()
  equal(best(system, folder, "harmed"), best(system, folder, START))


@pytest.mark.parametrize(
  ("settings", "told"),
  [
    ({"objective": "ppo"}, "want one of"),
    ({"objective": "", "rewards": ()}, "nothing to align"),
    ({"constrained": False}, "search=sample"),
    ({"constrained": False, "search": "sample"}, "constrained_softmax=False"),
    ({"group": 31}, "30 semantic IDs"),
    ({"losers": 2}, "takes one"),
    ({"format_samples": 2}, "constrained=False"),
    ({"feedback": "duration"}, "pipeline.labels"),
    ({"start": "nobody"}, "no run in"),
    ({"start": "self"}, "start from itself"),
  ],
)
def test_what_cannot_be_aligned_is_refused_by_name(trained, settings, told):
  _, folder, _ = trained
  config, system = aligned(trained, "self")
  if settings.get("start") == "self":
    files.write_json(folder / "models/self/config.json", {})
  for field, value in settings.items():
    setattr(config.alignment, field, value)
  with pytest.raises((ValueError, FileNotFoundError), match=told):
    checks.check(system, folder)


def test_a_start_of_another_model_is_refused(trained):
  config, folder, system = trained
  config, _ = aligned(trained, "other")
  config.model.dropout = 0.7
  other = assemble.assemble(config, system.prepared, system.semantic_ids)
  with pytest.raises(ValueError, match="another model"):
    checks.check(other, folder)


def test_rewards_are_summed_and_suppressed_by_config(trained):
  _, folder, _ = trained
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  config, system = aligned(trained, "rewarded")
  config.alignment.rewards = (
    "tests.alignment.judges:low_ids=2",
    "tests.alignment.judges:table=-0.5",
  )
  candidates = np.arange(1, 31, dtype=np.int32)[None]
  items = jax.numpy.asarray(candidates)
  want = 2.0 * (candidates <= 10) - 0.5 * np.linspace(-1, 1, 40)[candidates]
  reward = workflow_align.make_reward(system, folder, mesh)
  histories = tiny.batch()  # neither looks at them
  got = np.asarray(reward.func(*reward.args, histories, items))
  np.testing.assert_allclose(got, want, rtol=1e-5)

  # A fifth of the items is red, more than a tenth of the group.
  config.alignment.suppressed = "category=red"
  config.alignment.share, config.alignment.factor = 0.1, 0.25
  limited = workflow_align.make_reward(system, folder, mesh)
  table = system.prepared.items
  red = np.asarray(table["category"].to_pylist()) == "red"
  assert 0 < red.sum() < 30
  got = np.asarray(limited.func(*limited.args, histories, items))
  np.testing.assert_allclose(got, np.where(red, 0.25, 1) * want, rtol=1e-5)

  config.alignment.suppressed = "category=purple"
  with pytest.raises(ValueError, match="names no items"):
    workflow_align.make_reward(system, folder, mesh)
  config.alignment.rewards = ("tests.alignment.judges:nothing=1",)
  with pytest.raises(ValueError, match="cannot import"):
    workflow_align.make_reward(system, folder, mesh)
  config.alignment.rewards = ()
  with pytest.raises(ValueError, match="alignment.rewards is empty"):
    workflow_align.make_reward(system, folder, mesh)
