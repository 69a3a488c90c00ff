"""What came of showing a target, in the batches."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax.data import pipeline, prepare, shards, splits
from onerec_jax.simulation.policies import LoggingPolicy
from onerec_jax.simulation.step import run
from onerec_jax.simulation.world import World
from onerec_jax.training import losses
from tests import tiny
from tests.data import test_organisation, test_pipeline

_config = test_organisation._config
world = test_organisation.world


def _rows(prepared, config):
  packed = pipeline.training_rows(prepared, config)
  return [packed[i] for i in range(len(packed))]


def _event(users, item):
  """(record, index) of an item: each event has an item of its own."""
  record = users[item // 1000 - 1]
  return record, int(np.flatnonzero(record.items == item)[0])


@pytest.mark.parametrize("targets", ["next_item", "request", "exposed"])
def test_labels_are_those_of_the_events(world, targets):
  prepared, users = world
  config = _config(targets=targets, labels=True, session_items=1)
  names = {"click", "positive", "play_time_ms"}
  seen = set()
  for row in _rows(prepared, config):
    assert set(row["labels"]) == names
    for slot, item in enumerate(row["targets"].tolist()):
      found = {name: row["labels"][name][slot] for name in names}
      if not item:
        assert found == dict.fromkeys(names, 0.0)
        continue
      record, event = _event(users, item)
      click = {0: np.nan, 1: 0.0, 2: 1.0}[item % 3]
      np.testing.assert_equal(found["click"], np.float32(click))
      assert found["play_time_ms"] == item / 8
      assert found["positive"] == float(record.positive[event])
      seen.add(item % 3)
  assert seen == {0, 1, 2}


def test_no_labels_unless_asked(world):
  assert all(not row["labels"] for row in _rows(world[0], _config()))


def test_exposed_is_session_of_unmarked_requests_too(tmp_path):
  rng = np.random.default_rng(0)
  users = [test_organisation._user(user, rng) for user in range(1, 10)]
  marked = [u._replace(session=u.request % 2 == 0) for u in users]
  everything = test_pipeline.write(tmp_path / "all", users)
  some = test_pipeline.write(tmp_path / "some", marked)

  def targets(prepared, kind):
    config = _config(targets=kind, session_items=3)
    rows = _rows(prepared, config)
    return sorted(t for row in rows for t in row["targets"].tolist() if t)

  assert targets(some, "exposed") == targets(everything, "session")
  assert set(targets(some, "session")) < set(targets(some, "exposed"))


def test_imitating_positive_events_alone(tmp_path):
  rng = np.random.default_rng(1)
  users = [
    u._replace(positive=u.items % 2 == 0)
    for u in (test_organisation._user(user, rng) for user in range(1, 10))
  ]
  prepared = test_pipeline.write(tmp_path / "prepared", users)
  config = _config(imitate="positive")
  for row in _rows(prepared, config):
    real = row["targets"] > 0
    np.testing.assert_array_equal(
      row["labels"]["weight"], real & (row["targets"] % 2 == 0)
    )
  asked = _asked(prepared, config)
  held_out = [
    item
    for u in users
    for item in u.items[(u.split == splits.TEST)].tolist()
    if item % 2 == 0
  ]
  assert asked == held_out


def _asked(prepared, config):
  """The held-out items of the test split, in the order they are asked."""
  return [
    int(target)
    for _, queries in pipeline.evaluation_batches(
      prepared, splits.TEST, config, 4
    )
    for target in queries.target
    if target
  ]


def _with_plays(seed):
  """Users whose events have play times, some unknown."""
  rng, users = np.random.default_rng(seed), []
  for number in range(1, 10):
    user = test_organisation._user(number, rng)
    plays = rng.choice([0.0, 500.0, 1000.0, np.nan], len(user.items))
    signals = {"play_time_ms": plays.astype(np.float32)}
    users.append(user._replace(signals=signals))
  return users


@pytest.mark.parametrize("targets", ["next_item", "request"])
def test_imitating_the_requests_that_were_played_longest(tmp_path, targets):
  """Against sums over (user, request) by hand."""
  users = _with_plays(3)
  total, part_of, training = {}, {}, set()
  for user in users:
    for i, item in enumerate(user.items.tolist()):
      part = user.user, int(user.request[i]), bool(user.split[i] == 0)
      play = user.signals["play_time_ms"][i]
      known = 0.0 if np.isnan(play) else float(play)
      total[part] = total.get(part, 0.0) + known
      part_of[item] = part
      if part[2]:
        training.add(part)
  middle = np.median([total[part] for part in training])
  kept = lambda item: total[part_of[item]] >= middle

  prepared = test_pipeline.write(tmp_path / "prepared", users)
  config = _config(imitate="rsft", targets=targets)
  weights = {}
  for row in _rows(prepared, config):
    assert not row["labels"]["weight"][row["targets"] == 0].any()
    for item, weight in zip(row["targets"].tolist(), row["labels"]["weight"]):
      if item:
        weights[item] = float(weight)
  assert set(weights.values()) == {0.0, 1.0}
  assert weights == {item: float(kept(item)) for item in weights}
  asked = _asked(prepared, config)
  held_out = [i for u in users for i in u.items[u.split == 2].tolist()]
  assert asked == [item for item in held_out if kept(item)]
  assert 0 < len(asked) < len(held_out)


def test_play_times_are_needed_to_imitate_by_them(tmp_path):
  prepared = test_pipeline.write(tmp_path / "prepared", _with_plays(3))
  prepared.manifest["signals"] = []
  with pytest.raises(ValueError, match="imitate=rsft .*no play_time_ms"):
    pipeline.training_rows(prepared, _config(imitate="rsft"))


def test_a_wrong_choice_is_refused(world):
  with pytest.raises(ValueError, match="imitate='liked'.*all, positive or"):
    pipeline.training_rows(world[0], _config(imitate="liked"))


def test_weight_zero_is_no_target():
  """The loss over weighted targets: as if the others were padding."""
  model, batch = tiny.lazy_decoder(constrained_softmax=False), tiny.batch()
  known = tiny.params(model), tiny.catalogue()
  loss_fn = losses.make_loss(model)
  loss = jax.jit(lambda batch: loss_fn(known[0], batch, known[1], None, None))
  weight = (np.arange(batch.targets.size) % 2).reshape(batch.targets.shape)
  some = loss(batch.replace(labels={"weight": jnp.float32(weight)}))
  others = loss(batch.replace(targets=jnp.asarray(batch.targets * weight)))
  for name in ("loss", "count"):
    np.testing.assert_allclose(some[name], others[name], rtol=1e-5)
  assert 0 < some["count"] < (batch.targets > 0).sum()


def test_signals_of_a_simulated_log(tmp_path):
  """Play times, log-probabilities and quantiles are those of the raw log."""
  config = config_lib.PrepareConfig(dataset="simulator")
  config.simulation = config_lib.SimulationConfig(
    num_users=12, num_items=60, num_days=4, num_topics=4
  )
  prepared = shards.PreparedData.open(prepare.prepare(config, tmp_path))
  world = World.create(config.simulation)
  _, log = run(world, LoggingPolicy.create(world))
  raw = prepared.users["raw_id"].to_pylist()
  durations = world.item_duration / 1000
  judged = 0
  for index in range(len(prepared)):
    record = prepared.user(index)
    own = log.take(log.user == int(raw[index].removeprefix("u")))
    np.testing.assert_array_equal(record.signals["play_time_ms"], own.play_time)
    np.testing.assert_array_equal(
      record.signals["log_probability"], own.log_probability
    )
    bucket = np.floor(np.log2(np.maximum(durations[own.item], 1)))
    for i, quantile in enumerate(record.signals["play_quantile"]):
      past = (own.timestamp < own.timestamp[i]) & (bucket == bucket[i])
      past &= own.request != own.request[i]
      if past.sum() >= 5:
        less = (own.play_time[past] < own.play_time[i]).mean()
        equal = (own.play_time[past] == own.play_time[i]).mean()
        np.testing.assert_allclose(quantile, less + equal / 2, rtol=1e-5)
        judged += 1
  assert judged > 100


def test_labels_travel_with_the_batches(world):
  dataset, _ = pipeline.training_dataset(world[0], _config(labels=True), 0)
  (batch,) = itertools.islice(iter(dataset), 1)
  assert jax.tree.map(np.shape, batch.labels["click"]) == batch.targets.shape
