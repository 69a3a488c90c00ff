"""Sessions by hand: what is asked, what counts, and how two are compared."""

import jax
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax.data import batch as batch_lib
from onerec_jax.data import shards, splits
from onerec_jax.evaluation import held_out, result, sessions
from tests.data import test_pipeline as worlds


@pytest.fixture(scope="module")
def world(tmp_path_factory):
  """(prepared data, its records): requests of three, some across splits."""
  rng = np.random.default_rng(1)
  users = [worlds._user(u, rng, 30) for u in range(1, 13)]
  users = [
    u._replace(
      request=np.arange(len(u.items), dtype=np.int32) // 3,
      session=np.arange(len(u.items)) // 3 % 2 == 0,
      split=np.repeat(
        np.asarray([0, 1, 2], np.int8), [len(u.items) - 8, 4, 4]
      ) if len(u.items) > 8 else np.zeros(len(u.items), np.int8),
    )
    for u in users
  ]  # fmt: skip
  return worlds.write(tmp_path_factory.mktemp("prepared"), users), users


def test_requests_held_out_as_a_whole(world):
  prepared, records = world
  for split in (splits.VALIDATION, splits.TEST):
    expected = []
    for record in records:
      for number in range(-(-len(record.items) // 3)):
        events = [i for i, r in enumerate(record.request) if r == number]
        whole = all(record.split[i] == split for i in events)
        if whole and len(events) >= 2:
          items = [int(record.items[i]) for i in events]
          expected.append(
            (record.user, number, events[0], number % 2 == 0, items)
          )
    asked = held_out.requests(prepared, split, 2)
    found = zip(
      asked.user.tolist(), asked.number.tolist(), asked.first.tolist(),
      asked.good.tolist(), [items.tolist() for items in asked.items],
    )  # fmt: skip
    assert list(found) == expected
    assert len(expected) > 4


def test_a_sample_of_requests_is_fixed(world):
  whole = held_out.requests(world[0], splits.TEST, 2)
  some = held_out.requests(world[0], splits.TEST, 2, limit=4)
  again = held_out.requests(world[0], splits.TEST, 2, limit=4)
  assert len(some) == 4
  np.testing.assert_array_equal(some.first, again.first)
  pairs = set(zip(whole.user.tolist(), whole.first.tolist()))
  assert set(zip(some.user.tolist(), some.first.tolist())) <= pairs
  with pytest.raises(ValueError, match="no held-out request of 9 items"):
    held_out.requests(world[0], splits.TEST, 9)


def test_a_row_shows_what_came_before_the_request(world):
  prepared, records = world
  config = config_lib.PipelineConfig(max_history=5)
  asked = held_out.requests(prepared, splits.TEST, 2)
  seen = 0
  for batch, rows in held_out.batches(prepared, asked, config, 2, 4):
    assert batch.targets.shape == batch.visible_until.shape == (4, 2)
    mask = np.asarray(batch_lib.visible(jax.tree.map(np.asarray, batch)))
    for place, i in enumerate(rows):
      record, first = records[asked.user[i] - 1], asked.first[i]
      np.testing.assert_array_equal(
        batch.targets[place], record.items[first : first + 2]
      )
      for target in range(2):
        shown = batch.items[place][mask[place, target]]
        np.testing.assert_array_equal(
          shown[shown > 0], record.items[max(0, first - 5) : first]
        )
      seen += 1
    assert not batch.targets[len(rows) :].any()
  assert seen == len(asked)


def test_figures_by_hand():
  shown = np.asarray([[1, 2, 3], [4, 0, 1], [0, 0, 0]], np.int32)
  held = [np.asarray(x) for x in ([2, 3, 9], [5, 6, 7, 8], [1, 2, 3])]
  category = np.asarray([0, 1, 1, 2, 1, 1, 1, 1, 1, 1])
  found = sessions.measure(shown, held, category)
  full = 1 + 1 / np.log2(3) + 1 / 2
  np.testing.assert_allclose(found["precision"], [2 / 3, 0, 0])
  np.testing.assert_allclose(found["hit"], [1, 0, 0])
  np.testing.assert_allclose(
    found["ndcg"], [(1 / np.log2(3) + 1 / 2) / full, 0, 0], rtol=1e-6
  )
  np.testing.assert_allclose(found["full"], [1, 2 / 3, 0])
  # Pairs (1, 1), (1, 2), (1, 2); one pair, alike; no pair.
  np.testing.assert_allclose(found["diversity"], [2 / 3, 0, 0])
  assert "diversity" not in sessions.measure(shown, held, None)


def test_evaluation_asks_for_both_columns(world, monkeypatch):
  """A model that lists the history, newest first, where it may."""
  prepared, records = world
  config = config_lib.Config(name="parrot")
  config.pipeline.session_items = 2
  config.pipeline.max_history = 5
  config.evaluation.batch_size = 4
  asked = held_out.requests(prepared, splits.TEST, 2)
  known = np.arange(prepared.num_items + 1) > 0
  # The toy data have no table of items.
  monkeypatch.setattr(shards.PreparedData, "item_counts", known)
  monkeypatch.setattr(shards.PreparedData, "item_features", lambda self: {})
  calls = []

  def retrieve(batch, allowed):
    assert batch.targets.shape[1] == 1
    items = np.zeros((len(batch.items), 3), np.int32)
    if allowed is None:
      items = batch.items[:, ::-1][:, :3]
    else:
      assert allowed.shape == (len(batch.items), len(known))
      calls.append(allowed)
      # The first three allowed items from 1,000 on.
      for row, mask in enumerate(allowed):
        items[row] = np.flatnonzero(mask & (np.arange(len(mask)) > 1000))[:3]
    return items, np.zeros(items.shape, np.float32)

  found = sessions.evaluate(
    retrieve, prepared, asked, config, split="test", progress=False
  )
  assert found.split == "test_sessions"
  allowed = np.concatenate(calls)
  for i in range(len(asked)):
    record = records[asked.user[i] - 1]
    history = record.items[: asked.first[i]]
    assert not allowed[i, history].any()
    assert allowed[i].sum() == known.sum() - len(history)
    np.testing.assert_array_equal(found.target[i], record.items[asked.first[i]])
    assert not np.isin(found.filtered_items[i], history).any()
  assert found.metrics["queries"] == len(asked)
  assert found.per_query["precision@2"].sum() == 0, "no item comes twice"
  # User 1's first unseen item is its next one.
  mine = asked.user == 1
  assert found.per_query["filtered/hit@2"][mine].all()


def _evaluation(values, good, name="x", target=None):
  values = np.asarray(values, np.float32)
  n = len(values)
  return result.Evaluation(
    name=name, split="test_sessions", metrics={}, facts={},
    user=np.arange(n, dtype=np.int32) // 2,
    target=np.arange(n, dtype=np.int32) if target is None else target,
    items=np.zeros((n, 2), np.int32),
    filtered_items=np.zeros((n, 2), np.int32),
    per_query={
      "hit@2": values, "true/clicks": 2 * values,
      "good": np.asarray(good, np.float32),
    },
  )  # fmt: skip


def test_comparison_by_hand():
  rng = np.random.default_rng(0)
  good = np.arange(40) % 4 == 0
  a = [rng.random(40) for _ in range(2)]
  b = [rng.random(40) + 0.5 for _ in range(2)]
  rows = sessions.compare(
    [_evaluation(x, good) for x in a], [_evaluation(x, good) for x in b]
  )
  by_name = {row["metric"]: row for row in rows}
  assert set(by_name) == {"hit@2", "true/clicks", "good/hit@2"}
  for name, kept, scale in (
    ("hit@2", np.ones(40, bool), 1),
    ("true/clicks", np.ones(40, bool), 2),
    ("good/hit@2", good, 1),
  ):
    row = by_name[name]
    means = [[scale * x[kept].mean() for x in seeds] for seeds in (a, b)]
    assert row["queries"] == kept.sum()
    assert row["mean_a"] == pytest.approx(np.mean(means[0]), rel=1e-5)
    assert row["std_b"] == pytest.approx(np.std(means[1], ddof=1), rel=1e-4)
    difference = np.mean(means[0]) - np.mean(means[1])
    assert row["difference"] == pytest.approx(difference, rel=1e-5)
    assert row["low"] < row["difference"] < row["high"] < 0
  single = sessions.compare(
    [_evaluation(a[0], good)], [_evaluation(b[0], good)]
  )
  # One seed says nothing of the spread, and JSON has no NaN.
  assert {(row["std_a"], row["std_b"]) for row in single} == {(None, None)}
  with pytest.raises(ValueError, match="y were measured on different requests"):
    sessions.compare(
      [_evaluation(a[0], good)],
      [_evaluation(a[0], good, "y", np.zeros(40, np.int32))],
    )


def test_full_slots_alone_are_valued(world):
  found = _evaluation(np.zeros(4), np.ones(4))
  asked = held_out.requests(world[0], splits.TEST, 2)
  with pytest.raises(ValueError, match="empty slot"):
    sessions.with_true_values(
      found, world[0], asked, config_lib.SimulationConfig()
    )
