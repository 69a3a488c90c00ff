"""The quickstart on a small simulated world: once, again, changed, cut."""

import copy
import os
import signal
import time
from types import SimpleNamespace

import pytest

import launch.flags
from experiments.simulator import lazy_decoder, sasrec
from launch import quickstart
from onerec_jax import files, workflow
from onerec_jax.evaluation.result import Evaluation
from onerec_jax.training import loop, metrics_writer

# As on a user's machine; what runs on several devices is asked elsewhere.
pytestmark = pytest.mark.usefixtures("one_device")

NAMES = ("lazy_decoder", "sasrec", workflow.POPULARITY)


def small(module):
  """A module of experiments with a world of a hundred users."""

  def get_config():
    c = module.get_config()
    c.prepare.num_shards = 2
    world = c.prepare.simulation
    world.num_users, world.num_items, world.num_days = 100, 80, 3
    c.tokenizer.num_codes, c.tokenizer.num_levels = 9, 2
    c.pipeline.max_history = 15
    c.pipeline.row_positions = c.pipeline.row_targets = 32
    c.model.num_layers, c.model.d_model, c.model.d_ff = 1, 16, 16
    c.optimizer.warmup_steps = 5
    c.training.num_steps, c.training.log_every = 60, 10
    c.training.validate_every = c.training.checkpoint_every = 30
    c.evaluation.beam_width = 20
    return c

  return SimpleNamespace(get_config=get_config)


@pytest.fixture(scope="module")
def once(tmp_path_factory):
  """(work directory, a way to run the quickstart there, its seconds)."""
  folder = tmp_path_factory.mktemp("quickstart")
  patch = pytest.MonkeyPatch()
  patch.setattr(launch.flags, "_WORKDIR", SimpleNamespace(value=str(folder)))
  # The programs' own settings of jax are not for this process.
  patch.setattr(launch.flags, "start", lambda: None)
  for name, value in (("DATASET", "simulator"), ("DATA_DIR", ""), ("USERS", 2)):
    patch.setattr(quickstart, f"_{name}", SimpleNamespace(value=value))
  modules = small(lazy_decoder), small(sasrec)
  patch.setattr(quickstart, "_EXPERIMENTS", {"simulator": modules})

  def run():
    start = time.perf_counter()
    quickstart.main(["launch.quickstart"])
    return time.perf_counter() - start

  yield folder, run, run()
  patch.undo()


@pytest.mark.slow
def test_all_stages_leave_their_results(once):
  folder, _, _ = once
  assert (folder / "prepared" / "manifest.json").exists()
  (semantic,) = (folder / "semantic_ids").iterdir()
  record = files.read_json(folder / "models" / NAMES[0] / "config.json")
  assert record["semantic_ids"] == semantic.name
  page = (folder / "report.html").read_text()
  evaluations = [Evaluation.load(folder, name, "test") for name in NAMES]
  for evaluation in evaluations:
    assert evaluation.name in page
    for metric in ("recall@10", "ndcg@10", "filtered/ndcg@10"):
      assert f"{evaluation.metrics[metric]:.4f}" in page
  for name in NAMES[:2]:
    lines = metrics_writer.read(folder / "models" / name / "metrics.jsonl")
    losses = [r["loss"] for r in lines if r["kind"] == "train"]
    assert losses[-1] < losses[0], f"{name} learned nothing"
    assert sum(r["kind"] == "validation" for r in lines) == 2


@pytest.mark.slow
def test_a_second_call_skips_everything_but_the_page(once, capsys):
  folder, run, first = once
  stamps = lambda: {
    path: path.stat().st_mtime_ns
    for path in folder.rglob("*")
    if path.is_file() and path.name != "report.html"
  }
  before = stamps()
  seconds = run()
  assert stamps() == before
  assert seconds < first / 3
  shown = capsys.readouterr()
  assert "unchanged, skipped" in shown.err
  for name in NAMES[:2]:
    assert f"{name}: trained already, skipped" in shown.out
  assert "held out" in shown.out


@pytest.mark.slow
def test_a_changed_setting_under_the_same_name_is_refused(once):
  folder, _, _ = once
  config = small(lazy_decoder).get_config()
  config.model.dropout = 0.9
  with pytest.raises(ValueError, match=r"config\.model\.dropout: 0\.2 → 0\.9"):
    workflow.train(config, folder)


@pytest.mark.slow
def test_a_run_cut_in_the_middle_goes_on_to_the_same_end(
  once, monkeypatch, capsys
):
  """SIGTERM, as a cluster sends it, at the first validation."""
  folder, _, _ = once
  config = small(sasrec).get_config()
  config.name = "cut"
  made = workflow.validator

  def validator(system, mesh):
    validate = made(system, mesh)

    def preempted(params):
      os.kill(os.getpid(), signal.SIGTERM)
      return validate(params)

    return preempted

  with monkeypatch.context() as patch:
    patch.setattr(workflow, "validator", validator)
    with pytest.raises(SystemExit) as end:
      workflow.train(copy.deepcopy(config), folder)
  assert end.value.code == loop.PREEMPTED
  assert not (folder / "models" / "cut" / "finished.json").exists()
  assert "stopped: saved step 30" in capsys.readouterr().err
  workflow.train(config, folder)
  assert "resumed at step 30" in capsys.readouterr().err
  found = workflow.evaluate(folder, "cut").metrics
  # Under another name, the same run as the one nobody disturbed.
  assert found == Evaluation.load(folder, "sasrec", "test").metrics
