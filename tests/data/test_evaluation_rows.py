"""Rows of evaluation and of requests against brute-force histories."""

import numpy as np
import pytest

from onerec_jax.data import pipeline, splits
from onerec_jax.data import rows as rows_lib
from tests.data import test_pipeline as worlds

world = worlds.world


@pytest.mark.parametrize("split", [splits.VALIDATION, splits.TEST])
@pytest.mark.parametrize("users", [None, [0, 2, 7, 9, 22]])
def test_evaluation_asks_every_event_once(world, split, users):
  prepared, records = world
  config = worlds._config()
  wanted = range(len(records)) if users is None else users
  # (item, history) by definition: all that came before, whatever its split.
  expected = [
    (record.user, int(record.items[event]), record.items[:event])
    for record in (records[u] for u in wanted)
    for event in range(len(record.items))
    if record.split[event] == split
  ]
  found = []
  batches = list(
    pipeline.evaluation_batches(
      prepared, split, config, 4, None if users is None else np.asarray(users)
    )
  )
  for batch, queries in batches:
    assert batch.items.shape == (4, config.max_history + 1)
    assert batch.targets.shape == queries.target.shape + (1,) == (4, 1)
    np.testing.assert_array_equal(batch.targets[:, 0], queries.target)
    assert len(queries.seen) == 4
    shown = {row: (items, ages) for row, _, items, ages in worlds._see(batch)}
    for row in range(4):
      if queries.target[row] == 0:
        assert queries.user[row] == 0
        assert len(queries.seen[row]) == 0
        assert not batch.segment[row].any()
        assert batch.visible_until[row, 0] == 0
        continue
      user, target, seen = (
        int(queries.user[row]), int(queries.target[row]), queries.seen[row],
      )  # fmt: skip
      found.append((user, target, seen))
      items, ages = shown[row]
      np.testing.assert_array_equal(items, seen[-config.max_history :])
      assert ages == [user + 1]
      np.testing.assert_array_equal(
        batch.features["rating"][row][batch.items[row] > 0], items % 7
      )
  assert len(batches) == -(-len(expected) // 4)
  assert [f[:2] for f in found] == [e[:2] for e in expected]
  for (_, _, seen), (_, _, history) in zip(found, expected):
    np.testing.assert_array_equal(seen, history)
  if users is None and split == splits.TEST:
    held = [
      h for user, _, h in expected
      if (records[user - 1].split[: len(h)] == splits.VALIDATION).any()
    ]  # fmt: skip
    assert held, "no test history with a validation event: weak data"
    assert max(len(h) for h in held) > config.max_history


def test_requests_make_the_rows_of_evaluation(world):
  prepared, records = world
  config = worlds._config()
  names = sorted(rows_lib.feature_sizes(prepared))
  for batch, queries in pipeline.evaluation_batches(
    prepared, splits.TEST, config, 5
  ):
    asked = [records[u - 1] for u in queries.user if u]
    histories = queries.seen[: len(asked)]
    made = rows_lib.request_batch(
      [
        rows_lib.History(
          h,
          {k: v[: len(h)] for k, v in r.features.items()},
          r.positive[: len(h)],
          r.user_features,
        )
        for r, h in zip(asked, histories)
      ],
      names,
      config,
      5,
    )
    for name in ("items", "segment", "visible_from", "visible_until"):
      np.testing.assert_array_equal(getattr(made, name), getattr(batch, name))
    for name in names:
      np.testing.assert_array_equal(made.features[name], batch.features[name])
    assert not made.targets.any()


def test_an_empty_history_shows_the_user_token(world):
  config = worlds._config()
  empty = np.zeros(0, np.int32)
  batch = rows_lib.request_batch(
    [
      rows_lib.History(
        empty, {"rating": empty, "click": empty}, empty > 0, {"age": 4}
      )
    ],
    sorted(rows_lib.feature_sizes(world[0])),
    config,
    2,
  )
  (row,) = worlds._see(batch.replace(targets=np.asarray([[7], [0]], np.int32)))
  assert row[0] == 0
  assert len(row[2]) == 0
  assert row[3] == [4]


def test_sampled_users_are_fixed_and_sorted(world):
  prepared, _ = world
  asked = splits.VALIDATION, worlds._config()
  sample = pipeline.sample_users(prepared, 7, *asked)
  assert len(set(sample.tolist())) == 7
  np.testing.assert_array_equal(sample, np.sort(sample))
  again = pipeline.sample_users(prepared, 7, *asked)
  np.testing.assert_array_equal(sample, again)
  assert pipeline.sample_users(prepared, 0, *asked) is None
  assert pipeline.sample_users(prepared, len(prepared), *asked) is None


def _six_events(user, split, **changes):
  """A user with so many events of these splits."""
  rng = np.random.default_rng(user)
  longer = (worlds._user(user, rng, 25) for _ in range(99))
  record = next(r for r in longer if len(r.items) >= 6)
  fields = ("items", "timestamps", "request", "positive", "session")
  cut = {name: getattr(record, name)[:6] for name in fields}
  for name in ("features", "signals"):
    cut[name] = {k: v[:6] for k, v in getattr(record, name).items()}
  return record._replace(split=np.asarray(split, np.int8), **(cut | changes))


@pytest.mark.parametrize("split", [splits.VALIDATION, splits.TEST])
def test_users_are_sampled_among_those_who_are_asked(tmp_path, split):
  """Two of forty hold out an event for each; of a third the test alone asks."""
  held = {4: [0, 0, 0, 0, 1, 2], 30: [0, 0, 0, 0, 1, 2], 35: [0] * 5 + [2]}
  prepared = worlds.write(
    tmp_path,
    [_six_events(u + 1, held.get(u, [0] * 6)) for u in range(40)],
  )
  expected = [place for place, of in sorted(held.items()) if split in of]
  found = pipeline.sample_users(prepared, 5, split, worlds._config())
  assert found.tolist() == expected
  one = pipeline.sample_users(prepared, 1, split, worlds._config())
  assert set(one.tolist()) < set(expected)


def test_users_are_sampled_among_those_whose_targets_count(tmp_path):
  split = [0, 0, 0, 0, 1, 2]
  prepared = worlds.write(
    tmp_path,
    [
      _six_events(u + 1, split, positive=np.full(6, u in (7, 9)))
      for u in range(40)
    ],
  )
  config = worlds._config(imitate="positive")
  found = pipeline.sample_users(prepared, 3, splits.TEST, config)
  assert found.tolist() == [7, 9]
