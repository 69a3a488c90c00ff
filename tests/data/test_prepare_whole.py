"""Preparing real data, and the program that prepares."""

import os
import subprocess
import sys

import numpy as np
import pytest

from onerec_jax.config import PrepareConfig
from onerec_jax.data import prepare, shards


def test_popularity_of_movielens_needs_the_rule_for_ties(real_data, tmp_path):
  """Order is (timestamp, source row): .086, where id order gives .050."""
  folder = real_data("movielens_100k")
  config = PrepareConfig(dataset="movielens_100k", data_dir=str(folder))
  prepare.prepare(config, tmp_path)
  data = shards.PreparedData.open(tmp_path)
  assert len(data) == 943
  assert data.num_items == 1682
  assert data.manifest["num_events"] == 100_000
  assert data.manifest["event_features"]["rating"] == 6
  assert set(data.manifest["user_features"]) == {"age", "gender", "occupation"}
  counts = np.concatenate([[-1], data.items["count"].to_numpy()])
  hits = 0
  for i in range(len(data)):
    items = data.user(i).items
    scores = counts.copy()
    scores[items[:-1]] = -1
    hits += (scores > scores[items[-1]]).sum() < 10
  assert hits / len(data) == pytest.approx(0.086, abs=0.0005)


def test_beauty(real_data, tmp_path):
  folder = real_data("amazon_beauty")
  config = PrepareConfig(dataset="amazon_beauty", data_dir=str(folder))
  prepare.prepare(config, tmp_path)
  data = shards.PreparedData.open(tmp_path)
  assert (len(data), data.num_items) == (22_363, 12_101)
  assert data.manifest["num_events"] == 198_502
  lines = (folder / "sequences.txt").read_text().splitlines()
  for i in (0, 1, 12_345, 22_362):
    record, (user, *items) = data.user(i), lines[i].split()
    assert data.users["raw_id"][i].as_py() == user
    raw = data.items["raw_id"]
    assert [raw[j - 1].as_py() for j in record.items.tolist()] == items
    assert record.split.tolist() == [0] * (len(items) - 2) + [1, 2]


EXPERIMENT = """
from onerec_jax.config import Config
def get_config():
  config = Config()
  config.prepare.dataset = "tables"
  return config
"""


def test_launch(tmp_path):
  experiment = tmp_path / "experiment.py"
  experiment.write_text(EXPERIMENT)
  events = tmp_path / "log.csv"
  events.write_text("user_id,item_id\nu,1\nu,2\nu,3\n")
  root = os.path.dirname(os.path.dirname(os.path.dirname(__file__)))
  command = [sys.executable, "-m", "launch.prepare", f"--config={experiment}"]
  command.append(f"--workdir={tmp_path / 'w'}")
  made = subprocess.run(
    [*command, f"--config.prepare.events={events}"],
    cwd=root, capture_output=True, text=True, check=True,
  )  # fmt: skip
  assert "order of rows" in made.stdout
  assert len(shards.PreparedData.open(tmp_path / "w")) == 1
  failed = subprocess.run(
    [*command, "--config.prepare.events=nowhere.csv"],
    cwd=root, capture_output=True, text=True,
  )  # fmt: skip
  assert failed.returncode == 1
  assert "error: nowhere.csv does not exist" in failed.stderr
  assert "Traceback" not in failed.stderr
