"""The steps of the whole way: what is kept, what is made anew, and why."""

import copy
import dataclasses
import os

import jax
import numpy as np
import pytest

from onerec_jax import (
  files,
  model_configs,
  partitioning,
  runs,
  workflow,
  workflow_report,
)
from onerec_jax.data import pipeline, prepare, splits
from onerec_jax.evaluation import protocol, tables
from onerec_jax.evaluation.result import location
from onerec_jax.inference import assemble
from onerec_jax.training import loop
from tests import worlds


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(work directory, system) of a run that went no further than its start."""
  folder = tmp_path_factory.mktemp("workflow")
  config = worlds.config(worlds.write_csv(folder / "raw", users=20))
  config.prepare.positive = "rating >= 4"
  # Without tokenizer and beam search, the quickest to compile.
  config.model = model_configs.SASRecConfig(num_layers=1, d_model=16, d_ff=32)
  config.training.num_steps = config.training.validate_every = 1
  return folder, workflow.train(config, folder)


@pytest.fixture
def count(monkeypatch):
  """How often a split was measured."""
  calls = []
  measure = protocol.evaluate

  def counting(*args, **kwargs):
    calls.append(kwargs["name"])
    return measure(*args, **kwargs)

  monkeypatch.setattr(protocol, "evaluate", counting)
  return calls


def histories(system, split):
  """(dense user, items before, target) of every event of a split, by hand."""
  found = []
  for index in range(len(system.prepared)):
    record = system.prepared.user(index)
    for event in range(len(record.items)):
      if record.split[event] == split:
        before = record.items[:event].tolist()
        found.append((record.user, before, int(record.items[event])))
  return found


def test_an_evaluation_is_kept_until_the_run_is_trained_again(trained, count):
  folder, _ = trained
  first = workflow.evaluate(folder, "tiny")
  again = workflow.evaluate(folder, "tiny")
  assert count == ["tiny"]
  assert again.metrics == first.metrics
  workflow.evaluate(folder, "tiny", "validation")
  assert count == ["tiny", "tiny"]
  finished = folder / "models" / "tiny" / "finished.json"
  later = location(folder, "tiny", "test").stat().st_mtime_ns + 10**9
  os.utime(finished, ns=(later, later))
  workflow.evaluate(folder, "tiny")
  assert count == ["tiny"] * 3


def test_an_unfinished_run_is_measured_each_time(trained, count):
  folder, _ = trained
  finished = folder / "models" / "tiny" / "finished.json"
  content = finished.read_bytes()
  finished.unlink()
  try:
    workflow.evaluate(folder, "tiny", "validation")
    assert count == ["tiny"]
  finally:
    files.write_bytes(finished, content)


def test_an_evaluation_on_other_data_is_not_handed_out(
  trained, monkeypatch, count
):
  folder, _ = trained
  workflow.evaluate(folder, "tiny")
  manifest = folder / "prepared" / "manifest.json"
  values = files.read_json(manifest)
  try:
    files.write_json(manifest, values | {"fingerprint": "0123456789ab"})
    with pytest.raises(ValueError, match=r"tiny was trained on other data"):
      workflow.evaluate(folder, "tiny")
  finally:
    files.write_json(manifest, values)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_popularity_against_numpy(trained, split):
  folder, system = trained
  prepared = system.prepared
  counts = np.zeros(prepared.num_items + 1, np.int64)
  for index in range(len(prepared)):
    record = prepared.user(index)
    np.add.at(counts, record.items[record.split == 0], 1)
  # Most popular first; of equals the one with the lower id.
  order = sorted(range(1, len(counts)), key=lambda i: (-counts[i], i))
  hits = {"recall@10": [], "filtered/recall@10": [], "ndcg@5": []}
  code = splits.HELD_OUT[split]
  for _, before, target in histories(system, code):
    rank = order.index(target)
    hits["recall@10"].append(rank < 10)
    hits["ndcg@5"].append(1 / np.log2(rank + 2) if rank < 5 else 0.0)
    new = [item for item in order if item not in before][:10]
    hits["filtered/recall@10"].append(target in new)
  found = workflow.evaluate(folder, workflow.POPULARITY, split)
  assert found.metrics["queries"] == len(hits["recall@10"]) == 20
  for name, values in hits.items():
    assert found.metrics[name] == pytest.approx(np.mean(values), abs=1e-6)
  # Filtering leaves full lists, however long the histories.
  assert found.metrics["filtered/valid_rate@10"] == 1.0


def test_popularity_of_few_items_alone(tmp_path):
  """Without a run that says how many are asked for."""
  config = worlds.config(worlds.write_csv(tmp_path, items=7))
  prepare.prepare(config.prepare, tmp_path)
  found = workflow.evaluate_popularity(tmp_path)
  assert "recall@5" in found.metrics
  assert "recall@10" not in found.metrics


def test_popularity_is_asked_what_the_latest_run_is(trained):
  folder, system = trained
  path = folder / "models" / "tiny" / "config.json"
  content = path.read_bytes()
  record = files.read_json(path)
  record["config"]["pipeline"]["imitate"] = "positive"
  every = workflow.evaluate(folder, workflow.POPULARITY)
  try:
    files.write_json(path, record)
    found = workflow.evaluate(folder, workflow.POPULARITY)
  finally:
    files.write_bytes(path, content)
  liked = []
  for index in range(len(system.prepared)):
    user = system.prepared.user(index)
    kept = (user.split == splits.TEST) & (user.features["rating"] >= 4)
    liked += [(user.user, item) for item in user.items[kept].tolist()]
  assert sorted(zip(found.user.tolist(), found.target.tolist())) == liked
  assert 0 < len(liked) < len(every.user)
  # Beside a run that is asked for, whichever was trained last.
  own = workflow.evaluate(folder, workflow.POPULARITY, beside="tiny")
  assert own.metrics == every.metrics
  with pytest.raises(ValueError, match="measured on different queries"):
    tables.print_table([every, found])
  with pytest.raises(ValueError, match="measured on different queries"):
    workflow_report.report(folder, [every, found], [])


def test_popularity_is_measured_anew_for_new_data(trained, count):
  folder, _ = trained
  workflow.evaluate(folder, workflow.POPULARITY)
  count.clear()
  workflow.evaluate(folder, workflow.POPULARITY)
  assert not count
  manifest = folder / "prepared" / "manifest.json"
  files.write_bytes(manifest, manifest.read_bytes())
  workflow.evaluate(folder, workflow.POPULARITY)
  assert count == [workflow.POPULARITY]


def test_a_validation_gives_what_the_loop_needs(trained):
  folder, system = trained
  mesh = partitioning.make_mesh(system.config.mesh)
  params = assemble.load_params(system, folder / "models" / "tiny", mesh)
  found = workflow.validator(system, mesh)(params)
  loss = found.pop("loss")
  names = ("recall", "ndcg", "valid_rate", "coverage")
  assert set(found) == {
    f"{column}{name}@{k}"
    for column in ("", "filtered/")
    for name in names
    for k in system.config.evaluation.cutoffs
  }
  # The same figures as a whole evaluation's: this sample is everybody.
  whole = workflow.evaluate(folder, "tiny", "validation").metrics
  assert found == {name: whole[name] for name in found}
  assert whole["valid_rate@10"] == 1.0
  # −log of the target's share of all items' exponentials, by hand.
  expected = []
  for batch, queries in pipeline.evaluation_batches(
    system.prepared, splits.VALIDATION, system.config.pipeline, 16
  ):
    batch = jax.device_put(batch)
    scores = np.asarray(
      system.model.apply({"params": params}, batch, system.catalogue)
    )
    for row in np.flatnonzero(queries.user):
      shares = np.exp(scores[row, 0].astype(np.float64))
      expected.append(-np.log(shares[queries.target[row]] / shares.sum()))
  assert loss == pytest.approx(np.mean(expected), rel=1e-5)


def test_examples_show_what_came_before_the_test_event(trained):
  folder, system = trained
  evaluations = [
    workflow.evaluate(folder, name) for name in ("tiny", workflow.POPULARITY)
  ]
  shown = workflow_report.examples(folder, evaluations, 4)
  by_name = {
    f"user {system.prepared.users['raw_id'][user - 1]}": (before, target)
    for user, before, target in histories(system, splits.TEST)
  }
  titles = system.prepared.items["title"].to_pylist()
  assert len({example.user for example in shown}) == 4
  for example in shown:
    before, target = by_name[example.user]
    assert [item.id for item in example.history] == before
    assert example.target.id == target
    assert example.target.title == titles[target - 1]
    assert set(example.lists) == {"tiny", workflow.POPULARITY}
    for listed in example.lists.values():
      assert not {item.id for item in listed} & set(before)
  # More than there are: everybody, once.
  assert len(workflow_report.examples(folder, evaluations, 99)) == 20


def test_a_finished_run_is_skipped_and_leaves_every_file_alone(trained, capsys):
  folder, system = trained
  before = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
  workflow.train(system.config, folder)
  assert "tiny: trained already, skipped" in capsys.readouterr().out
  after = {p: p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}
  assert after == before


def test_a_run_of_before_a_field_came_is_the_same_run(trained, capsys):
  folder, system = trained
  path = folder / "models" / "tiny" / "config.json"
  content = path.read_bytes()
  record = files.read_json(path)
  del record["config"]["alignment"]["format_weight"]
  try:
    files.write_json(path, record)
    workflow.train(system.config, folder)
  finally:
    files.write_bytes(path, content)
  assert "tiny: trained already, skipped" in capsys.readouterr().out


def test_another_run_under_the_same_name_is_refused(trained):
  folder, system = trained
  other = copy.deepcopy(system.config)
  other.training.seed = 5
  other.optimizer.learning_rate = 0.5
  with pytest.raises(ValueError) as error:  # noqa: PT011
    workflow.train(other, folder)
  for part in (
    "models/tiny", "config.training.seed: 0 → 5",
    "config.optimizer.learning_rate: 0.01 → 0.5", "--config.name",
  ):  # fmt: skip
    assert part in str(error.value)


def test_a_name_of_other_data_is_refused_as_such(trained):
  folder, system = trained
  run = assemble.run_directory(folder, system.config.name)
  found = runs.record(system, folder)
  with pytest.raises(ValueError, match="a run of other data than is prepared"):
    runs.claim(run, found | {"prepared": "0123456789ab"})


def test_other_places_and_devices_are_the_same_run(trained, tmp_path, capsys):
  folder, system = trained
  moved = copy.deepcopy(system.config)
  for name in ("events", "items"):
    path = tmp_path / f"{name}.csv"
    path.write_bytes((folder / "raw" / f"{name}.csv").read_bytes())
    setattr(moved.prepare, name, str(path))
  moved.mesh.fsdp = 2
  workflow.train(moved, folder)
  # The files need not be there any more: what is prepared is used.
  moved.prepare.events = moved.prepare.items = ""
  workflow.train(moved, folder)
  assert capsys.readouterr().out.count("trained already") == 2


def test_a_run_that_failed_at_once_does_not_keep_its_name(
  trained, tmp_path, monkeypatch
):
  folder, system = trained
  config = copy.deepcopy(system.config)
  config.name, config.optimizer.schedule = "failed", "linear"
  own = dataclasses.replace(system, config=config)
  with pytest.raises(ValueError, match="linear"):
    workflow.train(config, folder, own)
  config.optimizer.schedule = "constant"
  monkeypatch.setattr(loop, "train", lambda *_: loop.Progress())
  workflow.train(config, folder, own)
  record = files.read_json(folder / "models" / "failed" / "config.json")
  assert record["config"]["optimizer"]["schedule"] == "constant"


@pytest.mark.parametrize(
  ("change", "match"),
  [
    (("pipeline", "batch_size", 12), r"batch_size=12 .* the 8 devices"),
    (("training", "microbatches", 3), r"batch_size=8 .* training.microbatch"),
    (("mesh", "fsdp", 3), r"mesh .* does not fit 8 device"),
    (("evaluation", "select", "loss"), r"a loss is best when low"),
    (("evaluation", "select", "ndcg@20"), r"none of the cutoffs \(5, 10\)"),
    (("evaluation", "cutoffs", (31,)), r"more than the 30 items"),
  ],
)
def test_what_could_not_train_or_be_judged_is_named_at_once(
  trained, tmp_path, change, match
):
  _, system = trained
  config = copy.deepcopy(system.config)
  section, name, value = change
  setattr(getattr(config, section), name, value)
  with pytest.raises(ValueError, match=match):
    workflow.train(config, tmp_path)


def test_a_batch_of_queries_of_any_size_gives_the_same(trained):
  folder, system = trained
  mesh = partitioning.make_mesh(system.config.mesh)
  params = assemble.load_params(system, folder / "models" / "tiny", mesh)
  config = copy.deepcopy(system.config)
  config.evaluation.batch_size = 5
  odd = workflow.validator(dataclasses.replace(system, config=config), mesh)
  assert odd(params) == workflow.validator(system, mesh)(params)


def test_nothing_to_validate_is_told_before_training(tmp_path):
  worlds.write_csv(tmp_path, events=2)
  config = worlds.config(tmp_path)
  with pytest.raises(ValueError, match="the validation split has nothing to"):
    workflow.train(config, tmp_path)
  run = assemble.run_directory(tmp_path, config.name)
  assert not (run / "metrics.jsonl").exists()


def test_the_report_shows_every_evaluation(trained):
  folder, _ = trained
  evaluations = [
    workflow.evaluate(folder, name) for name in ("tiny", workflow.POPULARITY)
  ]
  path = workflow_report.report(folder, evaluations, [])
  assert path == folder / "report.html"
  page = path.read_text()
  for evaluation in evaluations:
    assert evaluation.name in page
    assert f"{evaluation.metrics['ndcg@10']:.4f}" in page


def test_a_run_that_is_not_there_is_named(trained):
  folder, _ = trained
  with pytest.raises(FileNotFoundError, match=r"'huge'.*'tiny'"):
    workflow.evaluate(folder, "huge")
