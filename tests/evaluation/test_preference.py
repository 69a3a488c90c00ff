"""True preference of sessions, against the world asked one by one."""

import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax.data import prepare, shards, splits
from onerec_jax.evaluation import held_out, preference
from onerec_jax.simulation import truth
from onerec_jax.simulation.policies import LoggingPolicy
from onerec_jax.simulation.state import DAY_MS, DAY_ZERO_MS
from onerec_jax.simulation.world import World


@pytest.fixture(scope="module")
def system(tmp_path_factory):
  """Data of a small world, and their config."""
  config = config_lib.Config(name="oracle")
  config.prepare.dataset = "simulator"
  world = config.prepare.simulation
  world.num_users, world.num_items, world.num_days, world.slots = 20, 60, 3, 3
  config.prepare.split = "time"
  config.prepare.validation_from_ms = DAY_ZERO_MS + DAY_MS
  config.prepare.test_from_ms = DAY_ZERO_MS + 2 * DAY_MS
  config.pipeline.session_items = 3
  config.evaluation.batch_size = 16
  folder = tmp_path_factory.mktemp("world")
  prepared = shards.PreparedData.open(prepare.prepare(config.prepare, folder))
  return prepared, config


def _answer(seed):
  """Four random sessions of allowed items."""
  rng = np.random.default_rng(seed)

  def answer(batch, allowed):
    assert batch.targets.shape[1] == 1
    found = np.zeros((len(allowed), 4, 3), np.int32)
    for row, mask in enumerate(allowed):
      for w in range(4):
        found[row, w] = rng.choice(np.flatnonzero(mask), 3, replace=False)
    return found

  return answer


def test_figures_are_the_worlds(system):
  found = preference.measure(_answer(0), *system, "test", progress=False)
  requests = held_out.requests(system[0], splits.TEST, 3)
  assert found.sessions.shape == (len(requests), 4, 3)
  world = World.create(system[1].prepare.simulation)
  number = lambda name: int(name[1:])
  users = np.asarray(
    [number(n) for n in system[0].users["raw_id"].to_pylist()], np.int32
  )[requests.user - 1]
  # Items of the world stand in order in the catalogue: dense id = number + 1.
  worth = truth.session_values(
    world, LoggingPolicy.create(world), users,
    requests.number.astype(np.int64), found.sessions - 1,
  )  # fmt: skip
  columns = found.columns()
  for figure, name, scale in (
    ("swt", "watch_s", 1), ("vtr", "long_views", 3), ("wtr", "any_follow", 1),
    ("ltr", "any_like", 1), ("clicks", "clicks", 1),
  ):  # fmt: skip
    value = worth[name] / scale
    np.testing.assert_allclose(
      columns[f"{figure}_mean"], value.mean(axis=1), rtol=1e-5
    )
    np.testing.assert_allclose(columns[f"{figure}_max"], value.max(axis=1))
    np.testing.assert_allclose(
      found.oracle[f"{figure}_mean"], worth[f"oracle_{name}"] / scale, rtol=1e-5
    )
  # The log's own sessions are those of the prepared requests.
  same = np.asarray([items[:3] for items in requests.items]) - 1
  again = truth.session_values(
    world, LoggingPolicy.create(world), users,
    requests.number.astype(np.int64), same.astype(np.int32),
  )  # fmt: skip
  np.testing.assert_allclose(found.log["swt_mean"], again["watch_s"], rtol=1e-5)
  assert found.oracle["clicks_mean"].mean() > found.values["clicks"].mean()


def test_better_sessions_are_told_from_worse(system):
  """The best of a model's sessions, as a model, beats the mean one."""
  base = preference.measure(_answer(0), *system, "test", progress=False)
  best = base.values["clicks"].argmax(axis=1)

  def pick(batch, allowed):
    nonlocal at
    rows = np.arange(at, min(at + len(allowed), len(best)))
    at += len(allowed)
    out = np.ones((len(allowed), 1, 3), np.int32)
    out[: len(rows), 0] = base.sessions[rows, best[rows]]
    return out

  at = 0
  better = preference.measure(pick, *system, "test", progress=False)
  rows = preference.compare([[base], [better, better]])
  by = {(row["model"], row["figure"]): row for row in rows}
  row = by[1, "clicks_mean"]
  expected = base.values["clicks"].max(axis=1).mean()
  assert row["mean"] == pytest.approx(expected, rel=1e-5)
  assert row["difference"] == pytest.approx(
    expected - base.values["clicks"].mean(), rel=1e-4
  )
  assert 0 < row["low"] < row["difference"] < row["high"]
  assert row["std"] == 0.0
  # The best of one is not the best of four.
  assert by[0, "clicks_max"]["sessions"] == 4
  assert by[1, "clicks_max"]["sessions"] == 1
  assert by[1, "clicks_max"]["mean"] == pytest.approx(expected, rel=1e-5)
  assert "difference" not in by[1, "clicks_max"]
  assert "difference" in preference.compare([[base], [base]])[-1]
  preference.print_table(rows, "true preference")
  alone = {row["figure"] for row in preference.compare([[better], [better]])}
  assert alone == {f"{figure}_mean" for figure in preference.FIGURES}
  with pytest.raises(ValueError, match="no seeds of one model"):
    preference.compare([[base, better]])
  assert "low" not in by[0, "clicks_mean"]
  assert by[0, "clicks_mean"]["std"] is None


def test_the_log_and_the_oracle_show_as_many_items(system):
  config = config_lib.from_dict(config_lib.to_dict(system[1]))
  config.pipeline.session_items = 2
  short = lambda batch, allowed: _answer(0)(batch, allowed)[:, :, :2]
  asked = system[0], config, "test", 30
  found = preference.measure(short, *asked, progress=False)
  # A length of two: the log's mean of all three items is another.
  world = World.create(config.prepare.simulation)
  requests = held_out.requests(system[0], splits.TEST, 2, 30)
  lengths = [world.item_duration[i[:2] - 1].mean() for i in requests.items]
  np.testing.assert_allclose(
    found.log["duration_s_mean"], np.asarray(lengths) / 1000, rtol=1e-5
  )


def test_what_cannot_be_valued_is_refused(system, tmp_path):
  empty = lambda batch, allowed: np.zeros((len(allowed), 1, 3), np.int32)
  with pytest.raises(ValueError, match="oracle: .* has an empty slot"):
    preference.measure(empty, *system, "test", progress=False)
  config = config_lib.from_dict(config_lib.to_dict(system[1]))
  config.prepare.where = "click = 1"
  folder = prepare.prepare(config.prepare, tmp_path)
  clicks = shards.PreparedData.open(folder), config
  with pytest.raises(ValueError, match=r"leaves out \d+ of the world's events"):
    preference.measure(_answer(0), *clicks, "validation", progress=False)
  config.prepare.dataset = "movielens_100k"
  with pytest.raises(ValueError, match="trained on movielens_100k"):
    preference.measure(_answer(0), *clicks, "test", progress=False)
  base = preference.measure(_answer(0), *system, "test", 30, progress=False)
  other = preference.measure(_answer(0), *system, "validation", progress=False)
  with pytest.raises(ValueError, match="measured on different requests"):
    preference.compare([[base], [other]])
