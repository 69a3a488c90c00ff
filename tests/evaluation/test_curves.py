"""Curves of logged figures, from files written by hand."""

import json

import numpy as np
import pytest

from onerec_jax.evaluation import curves


@pytest.fixture
def workdir(tmp_path):
  def write(name, lines):
    run = tmp_path / "models" / name
    run.mkdir(parents=True)
    run.joinpath("metrics.jsonl").write_text(
      "".join(json.dumps(line) + "\n" for line in lines)
    )

  write(
    "a",
    [
      {"step": 10, "kind": "train", "reward": 1.0},
      {"step": 10, "kind": "validation", "ndcg": 0.5},
      {"step": 20, "kind": "train", "reward": 2.0},
      {"step": 30, "kind": "train", "reward": 4.0},
    ],
  )
  write(
    "a_s1",
    [
      {"step": 10, "kind": "train", "reward": 3.0},
      {"step": 20, "kind": "train", "reward": 6.0},
    ],
  )
  return tmp_path


def test_seeds_share_the_steps_that_all_logged(workdir):
  found = curves.read(workdir, "a+a_s1", "reward")
  np.testing.assert_array_equal(found.steps, [10, 20])
  np.testing.assert_array_equal(found.values, [[1, 2], [3, 6]])


def test_a_figure_that_a_seed_lacks_is_none(workdir):
  assert curves.read(workdir, "a+a_s1", "ndcg") is None
  assert curves.read(workdir, "a", "ndcg").values.tolist() == [[0.5]]


def test_the_loss_of_training_is_not_that_of_validation(tmp_path):
  """What is not finite was logged as null: a gap, in the record too."""
  lines = [
    {"step": 10, "kind": "train", "loss": 2.0, "grad_norm": None},
    {"step": 20, "kind": "train", "loss": 1.0, "grad_norm": 3.0},
    {"step": 20, "kind": "validation", "loss": 5.0},
  ]
  path = tmp_path / "models" / "b" / "metrics.jsonl"
  path.parent.mkdir(parents=True)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  read = lambda name: curves.read(tmp_path, "b", name)
  assert read("loss").values.tolist() == [[2.0, 1.0]]
  assert read("validation/loss").values.tolist() == [[5.0]]
  assert read("validation/grad_norm") is None
  exploded = read("grad_norm")
  np.testing.assert_array_equal(exploded.values, [[np.nan, 3.0]])
  assert curves.as_json([exploded])[0]["values"] == [[None, 3.0]]
  assert curves.draw([exploded], ["grad_norm"]).startswith(b"\x89PNG")


def test_a_run_without_metrics_is_named(workdir):
  with pytest.raises(FileNotFoundError, match="nobody"):
    curves.read(workdir, "a+nobody", "reward")


def test_the_numbers_are_what_was_logged(workdir):
  found = [curves.read(workdir, run, "reward") for run in ("a", "a+a_s1")]
  assert json.loads(json.dumps(curves.as_json(found))) == [
    {
      "model": "a",
      "figure": "reward",
      "steps": [10, 20, 30],
      "values": [[1.0, 2.0, 4.0]],
    },
    {
      "model": "a+a_s1",
      "figure": "reward",
      "steps": [10, 20],
      "values": [[1.0, 2.0], [3.0, 6.0]],
    },
  ]


def test_the_picture_is_a_png(workdir):
  found = [
    curves.read(workdir, run, "reward") for run in ("a", "a_s1", "a+a_s1")
  ]
  assert curves.draw(found, ["reward"]).startswith(b"\x89PNG")
