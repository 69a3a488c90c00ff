"""Points of runs whose logs and rows are counted here in plain Python."""

import json

import pytest

from onerec_jax import config as config_lib
from onerec_jax import files, model_configs
from onerec_jax.data import pipeline, prepare, shards, splits
from onerec_jax.scaling import collect, sweep

HISTORY = 6


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """Simulated requests of five events; those with two clicks are sessions."""
  folder = tmp_path_factory.mktemp("collect")
  prepare.prepare(config().prepare, folder)
  return folder


def config(**changes):
  c = config_lib.Config(name="run", model=model_configs.SASRecConfig(d_model=8))
  c.prepare.dataset = "simulator"
  c.prepare.simulation.num_users = c.prepare.simulation.num_items = 40
  c.prepare.simulation.num_days = 2
  c.prepare.session = "count(*) FILTER (WHERE click = 1) >= 2"
  c.prepare.num_shards = 1
  c.pipeline.batch_size = 1
  c.pipeline.row_positions, c.pipeline.row_targets = 16, 12
  c.pipeline.max_history = HISTORY
  return sweep.changed(c, changes)


def point(workdir, c, losses=(3.0, 2.5), best_step=4, steps=4):
  """The point of a run that logged these losses, at even steps."""
  run = workdir / "models" / c.name
  run.mkdir(parents=True, exist_ok=True)
  manifest = files.read_json(workdir / "prepared" / "manifest.json")
  files.write_json(
    run / "config.json",
    {"prepared": manifest["fingerprint"], "semantic_ids": ""},
  )
  files.write_json(run / "finished.json", {"best_step": best_step})
  lines = [
    {"step": 2 * i, "kind": "validation", "loss": loss, "ndcg@10": 1.0}
    for i, loss in enumerate(losses, start=1)
  ]
  # A training loss is never the point's, however low.
  lines += [{"step": steps, "kind": "train", "loss": 0.1, "epoch": 1.0}]
  text = "".join(json.dumps(line) + "\n" for line in lines)
  (run / "metrics.jsonl").write_text(text)
  (found,) = collect.points(sweep.Sweep("x", "x", [c]), workdir)
  return found


@pytest.mark.parametrize(
  ("losses", "best_step", "loss", "loss_step"),
  [((3.0, 2.5), 2, 2.5, 4), ((2.0, 2.5), 4, 2.0, 2), ((None, 2.5), 2, 2.5, 4)],
)
def test_the_loss_is_the_lowest_not_that_of_the_kept_parameters(
  workdir, losses, best_step, loss, loss_step
):
  found = point(workdir, config(), losses, best_step)
  assert (found["loss"], found["loss_step"]) == (loss, loss_step)
  assert found["steps"] == 4


def counted(workdir, c):
  """Targets of one epoch, event by event."""
  prepared = shards.PreparedData.open(workdir)
  total = 0
  for index in range(len(prepared)):
    user = prepared.user(index)
    train = [i for i, s in enumerate(user.split) if s == splits.TRAIN]
    if c.pipeline.targets == "next_item":
      total += sum(1 for i in train if user.positive[i])
      continue
    for request in {user.request[i] for i in train}:
      events = [i for i in train if user.request[i] == request]
      if c.pipeline.targets == "history":
        total += len(events) + min(events[0], HISTORY)
      elif user.session[events[0]]:
        m = c.pipeline.session_items
        total += len(events) // m * m
  return total, int(prepared.train_lengths.sum())


@pytest.mark.parametrize(
  "changes",
  [
    {"pipeline.targets": "session", "pipeline.session_items": 2},
    {"pipeline.targets": "history"},
    {"pipeline.imitate": "positive"},
  ],
)
def test_targets_are_those_that_a_loss_was_on(workdir, changes):
  c = config(**changes)
  prepared = shards.PreparedData.open(workdir)
  # With a row a step: one epoch.
  _, steps = pipeline.training_dataset(prepared, c.pipeline, 0)
  targets, events = counted(workdir, c)
  assert 0 < targets != events
  assert point(workdir, c, steps=steps)["targets"] == targets
  assert point(workdir, c, steps=3 * steps)["targets"] == 3 * targets


def test_an_aligned_run_makes_no_point(workdir):
  c = config(**{"name": "aligned", "alignment.start": "run"})
  with pytest.raises(ValueError, match="aligned was aligned: .* leave it out"):
    point(workdir, c)
