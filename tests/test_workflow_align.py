"""Alignment of a trained run, end to end on a log with a pattern."""

import copy
import dataclasses
import functools
import shutil

import jax
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import files, partitioning, runs, workflow, workflow_align
from onerec_jax.alignment import checks, rewards
from onerec_jax.inference import assemble
from onerec_jax.scaling import sweep
from onerec_jax.training import metrics_writer
from tests import tiny, worlds
from tests.training.test_loop import _arrays, _KilledError

pytestmark = pytest.mark.usefixtures("one_device")

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
  assert "stopped by" not in capsys.readouterr().out
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
  with monkeypatch.context() as patch:
    # What it goes on from is its own checkpoint.
    patch.setattr(assemble, "load_params", None)
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
    ({"constrained": False}, "constrained_softmax=False"),
    ({"constrained": False, "search": "sample"}, "constrained_softmax=False"),
    ({"constrained": False, "group": 10**6}, "more than the"),
    ({"group": 31}, "30 semantic IDs"),
    ({"losers": 2}, "takes one"),
    ({"format_samples": 2}, "constrained=False"),
    ({"feedback": "duration"}, "pipeline.labels"),
    ({"start": "nobody"}, "no run in"),
    ({"start": "self"}, "start from itself"),
    (
      {"feedback": "like", "pipeline.labels": True},
      r"needs the labels \['like'\]",
    ),
    (
      {"feedback": "positive", "pipeline.labels": True, "logged_policy": True},
      r"needs the labels \['log_probability'\]",
    ),
    ({"objective": "s_dpo", "losers": 8}, "below alignment.group=8"),
    ({"format_choice": "best"}, "want random or probable"),
    ({"search": "greedy"}, "want beam or sample"),
    ({"training.microbatches": 3}, "requests=8 is no multiple of training.mic"),
    ({"requests": 0}, "requests=0"),
    ({"rewards": ("p_score=much",)}, "rewards: 'p_score=much'"),
    (
      {"rewards": ("p_score=-1",), "suppressed": "category=red"},
      "weigh by more than 0",
    ),
    *(
      ({name: value}, f"alignment.{name}={value} must be")
      for name, value in [
        ("noise", 0.5),
        ("noise", -0.1),
        ("beta", 0.0),
        ("temperature", 0.0),
        ("sync_every", -1),
        ("gate", -0.1),
        ("gate", np.nan),
        ("share", 1.1),
        ("factor", -0.5),
        ("epsilon", -0.2),
        ("delta", -0.1),
      ]
    ),
  ],
)
def test_what_cannot_be_aligned_is_refused_by_name(trained, settings, told):
  _, folder, _ = trained
  config, system = aligned(trained, "self")
  if settings.get("start") == "self":
    files.write_json(folder / "models/self/config.json", {})
  config = sweep.changed(
    config,
    {
      path if "." in path else f"alignment.{path}": value
      for path, value in settings.items()
    },
  )
  with pytest.raises((ValueError, FileNotFoundError), match=told):
    checks.check(dataclasses.replace(system, config=config), folder)


@pytest.mark.parametrize("requests", [0, 12])
def test_requests_that_cannot_be_laid_out_are_refused(requests):
  mesh = partitioning.make_mesh(config_lib.MeshConfig(), jax.devices())
  assert mesh.size == 8
  checks.check_rows(16, mesh)
  with pytest.raises(ValueError, match=f"requests={requests} .* 8 devices"):
    checks.check_rows(requests, mesh)


def test_a_run_is_bound_to_the_parameters_it_was_made_from(trained, tmp_path):
  """A start or a reward model trained anew makes it another run."""
  _, folder, _ = trained
  shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
  models = tmp_path / "models"
  shutil.copytree(models / START, models / "judge")
  config, system = aligned(trained, "bound")
  config.alignment.rewards = ("judge/head=1", "tests.alignment.judges:low_ids")
  names = [START, *rewards.runs_of(config.alignment.rewards)]
  assert names == [START, "judge"]
  run = models / "bound"
  claim = lambda: runs.claim(run, runs.record(system, tmp_path, names))
  claim()
  files.write_json(run / "best.json", {"step": 0})  # It has kept something.
  claim()
  for name in names:
    # As bad as it gets: the same settings and step, another outcome.
    path = models / name / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before.replace('"ndcg@10": 0.', '"ndcg@10": 0.1'))
    assert path.read_text() != before
    with pytest.raises(ValueError, match=f"made_from.{name}: '.*' → '"):
      claim()
    path.write_text(before)
    best = models / name / "best.json"
    step = files.read_json(best)
    files.write_json(best, {"step": 7})
    with pytest.raises(ValueError, match=f"made_from.{name}"):
      claim()
    files.write_json(best, step)
    # Another place of the same run is the same run.
    record = files.read_json(models / name / "config.json")
    record["config"]["prepare"]["data_dir"] = "/elsewhere"
    files.write_json(models / name / "config.json", record)
    claim()
    record["config"]["training"]["seed"] = 9
    files.write_json(models / name / "config.json", record)
    with pytest.raises(ValueError, match=f"made_from.{name}"):
      claim()
    record["config"]["training"]["seed"] = 0
    files.write_json(models / name / "config.json", record)
  # What a survey of a sweep asks.
  old = files.read_json(run / "config.json")
  runs.claim(run, old | {"config": config_lib.to_dict(config)})
  with pytest.raises(FileNotFoundError, match="no trained run 'nobody'"):
    runs.record(system, tmp_path, ["nobody"])
  # Ordinary runs have nothing of it.
  assert "made_from" not in runs.record(system, tmp_path)


@pytest.mark.parametrize(
  ("sync_every", "said"), [(0, True), (10, True), (9, False)]
)
def test_a_sampler_that_is_never_renewed_is_told(
  trained, capsys, sync_every, said
):
  """Ten steps; 0 is an epoch, here of 30."""
  config, _ = aligned(trained, "stale")
  config.alignment.sync_every = sync_every
  workflow_align._say_if_never_renewed(config, 30)
  assert ("stay the start's" in capsys.readouterr().out) == said


def test_a_start_of_another_model_is_refused(trained):
  config, folder, system = trained
  config, _ = aligned(trained, "other")
  config.model.dropout = 0.7
  other = assemble.assemble(config, system.prepared, system.semantic_ids)
  with pytest.raises(ValueError, match=r"model\.dropout: 0\.2 → 0\.7"):
    checks.check(other, folder)


def test_a_start_that_imitated_other_events_is_refused(trained):
  """They could not be compared: evaluation asks for what is imitated."""
  config, folder, system = trained
  config, _ = aligned(trained, "other")
  config.pipeline.imitate = "positive"
  other = assemble.assemble(config, system.prepared, system.semantic_ids)
  with pytest.raises(ValueError, match="imitate: 'all' → 'positive'"):
    checks.check(other, folder)


def test_a_start_from_before_a_field_is_the_same_model(trained):
  _, folder, _ = trained
  _, system = aligned(trained, "later")
  path = folder / "models" / START / "config.json"
  whole = files.read_json(path)
  older = copy.deepcopy(whole)
  del older["config"]["model"]["lifelong_layers"]
  files.write_json(path, older)
  try:
    checks.check(system, folder)
    older["config"]["model"]["dropout"] = 0.7
    files.write_json(path, older)
    with pytest.raises(ValueError, match="another model"):
      checks.check(system, folder)
  finally:
    files.write_json(path, whole)


def test_rewards_are_summed_and_suppressed_by_config(trained, monkeypatch):
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

  # Numbers are in buckets of powers of two, not named by their values.
  specs = system.prepared.manifest["bucketing"]["item"]
  monkeypatch.setitem(specs, "price", {"kind": "log2"})
  for suppressed in ("category=purple", "price=3"):
    config.alignment.suppressed = suppressed
    told = r"names no items: .* one of \['category'\]"
    with pytest.raises(ValueError, match=told):
      workflow_align.make_reward(system, folder, mesh)
  config.alignment.suppressed = ""
  config.alignment.rewards = (
    "tests.alignment.judges:low_ids=1",
    "tests.alignment.judges:of_each_request=1",
  )
  wrong = workflow_align.make_reward(system, folder, mesh)
  told = r"2, 'tests.alignment.judges:of_each_request=1', gave \(1, 1\)"
  with pytest.raises(ValueError, match=told):
    wrong.func(*wrong.args, histories, items)
  config.alignment.rewards = ("tests.alignment.judges:nothing=1",)
  with pytest.raises(ValueError, match="cannot import"):
    workflow_align.make_reward(system, folder, mesh)
  config.alignment.rewards = ()
  with pytest.raises(ValueError, match="alignment.rewards is empty"):
    workflow_align.make_reward(system, folder, mesh)
