"""What is refused or said before anything is compiled, and runs there are."""

import os
import re

import pytest

from onerec_jax import config as config_lib
from onerec_jax import files, model_configs, partitioning, runs, workflow
from onerec_jax.inference import assemble
from tests import worlds

MODELS = {
  "lazy": model_configs.LazyDecoderConfig(),
  "sasrec": model_configs.SASRecConfig(),
  "session": model_configs.SessionDecoderConfig(session_items=5),
  "p_score": model_configs.PScoreConfig(),
}


def refusal(model, **evaluation):
  """Why a config is refused; nothing if it is not."""
  c = config_lib.Config(model=MODELS[model])
  if model == "session":
    c.pipeline.targets, c.pipeline.row_targets = "session", 20
  for name, value in evaluation.items():
    setattr(c.evaluation, name, value)
  try:
    runs.check(c, partitioning.make_mesh(c.mesh), 100)
  except ValueError as error:
    return str(error)
  return ""


@pytest.mark.parametrize(
  ("model", "settings"),
  [
    ("lazy", {"select": "filtered/ndcg@5"}),
    ("lazy", {"select": "coverage@20", "cutoffs": (20,), "beam_width": 20}),
    # Of all items there is always a list that is long enough.
    ("sasrec", {"beam_width": 5}),
    ("session", {"select": "filtered/ndcg@5", "beam_width": 8}),
    ("p_score", {"select": "auc"}),
    ("p_score", {"select": "user_auc_like"}),
  ],
)
def test_what_can_be_judged_is_let_through(model, settings):
  assert refusal(model, **settings) == ""


@pytest.mark.parametrize(
  ("model", "settings", "told"),
  [
    ("lazy", {"beam_width": 8}, "more than the evaluation.beam_width=8 beams"),
    ("lazy", {"cutoffs": (101,)}, "more than the 100 items"),
    ("lazy", {"select": "auc"}, "none of the cutoffs .5, 10."),
    ("lazy", {"select": "loss"}, "select=ndcg@10"),
    ("session", {}, "'ndcg@10' is at none of the cutoffs .5,."),
    ("p_score", {}, "'ndcg@10' is a figure of recommendations.*select=auc"),
    ("p_score", {"select": "loss"}, "best when low.*select=auc"),
  ],
)
def test_what_no_validation_would_have_is_refused(model, settings, told):
  assert re.search(told, refusal(model, **settings))


@pytest.mark.parametrize(
  ("setting", "value", "told"),
  [
    ("training.keep_checkpoints", 0, "keep_checkpoints=0 must be at least 1"),
    ("training.log_every", 0, "log_every=0 must be at least 1"),
    ("training.on_nan", "raise", "on_nan='raise': want error or skip"),
    ("optimizer.clip_norm", 0.0, "clip_norm=0.0 must be above 0"),
    ("optimizer.clip_norm", float("nan"), "clip_norm=nan must be above 0"),
  ],
)
def test_settings_that_would_fail_later_are_refused(setting, value, told):
  c = config_lib.Config()
  part, field = setting.split(".")
  setattr(getattr(c, part), field, value)
  with pytest.raises(ValueError, match=told):
    runs.check(c, partitioning.make_mesh(c.mesh), 100)


@pytest.mark.parametrize(
  "name", ["", "a b", "a+b", "a,b", "a/b", "popularity", "oracle"]
)
def test_names_that_would_be_read_otherwise_are_refused(name):
  c = config_lib.Config(name=name)
  with pytest.raises(ValueError, match="cannot be a run's"):
    runs.check(c, partitioning.make_mesh(c.mesh), 100)


def test_microbatches_would_take_a_two_towers_negatives():
  c = config_lib.Config(model=model_configs.TwoTowerConfig())
  runs.check(c, partitioning.make_mesh(c.mesh), 100)
  c.training.microbatches = 2
  with pytest.raises(ValueError, match="microbatches=2.* negatives"):
    runs.check(c, partitioning.make_mesh(c.mesh), 100)


@pytest.mark.parametrize(
  ("where", "imitate", "targets", "said"),
  [
    ("", "all", "next_item", True),
    ("", "positive", "next_item", False),
    ("click", "all", "next_item", False),
    ("", "all", "session", False),
  ],
)
def test_a_log_of_exposures_is_not_imitated_in_silence(
  tmp_path, capsys, where, imitate, targets, said
):
  lines = ["user_id,item_id,timestamp_ms,click"]
  lines += [f"u{i % 5},i{i % 7},{i},{int(i % 3 == 0)}" for i in range(60)]
  (tmp_path / "events.csv").write_text("\n".join(lines))
  config = worlds.config(tmp_path)
  config.prepare.items, config.prepare.where = "", where
  config.pipeline.imitate = imitate
  config.model = model_configs.SASRecConfig()
  system = workflow.assembled(config, tmp_path / "work")
  system.config.pipeline.targets = targets
  runs.say_if_all_is_imitated(system)
  told = capsys.readouterr().err
  assert (
    "all 60 events are imitated and asked for, 40 of them" in told
  ) == said


def test_runs_are_those_with_parameters_oldest_first(tmp_path):
  for place, name in enumerate(("second", "first", "unborn")):
    run = assemble.run_directory(tmp_path, name)
    files.write_json(run / "config.json", {})
    if name != "unborn":
      files.write_json(run / "best.json", {"step": 1})
      os.utime(run / "best.json", ns=(10 - place, 10 - place))
  assert runs.finished_runs(tmp_path) == ["first", "second"]
  assert runs.finished_runs(tmp_path / "nowhere") == []
