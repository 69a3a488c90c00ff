"""Liked against disliked: by search over all items, and by loops over pairs."""

import copy
import dataclasses
import io

import jax
import numpy as np
import pytest
import rich.console
from jax.sharding import Mesh

from onerec_jax import config as config_lib
from onerec_jax import model_configs, partitioning, workflow
from onerec_jax.data import rows as rows_lib
from onerec_jax.data import splits
from onerec_jax.evaluation import feedback_pairs
from onerec_jax.inference import assemble, retrieval
from tests import tiny

ITEMS = 40


@pytest.fixture(scope="module")
def system(tmp_path_factory):
  """Opinions of 60 users on 40 items and 40 late ones, no training."""
  folder = tmp_path_factory.mktemp("feedback")
  rng = np.random.default_rng(0)
  lines = ["user_id,item_id,timestamp_ms,like,dislike"]
  for user in range(60):
    for event in range(20):
      like, dislike = rng.random(2) < 0.5
      time = 1_600_000_000_000 + event * 3_600_000 + user
      item = rng.integers(ITEMS if event < 15 else 2 * ITEMS)
      lines.append(f"u{user},i{item},{time},{int(like)},{int(dislike)}")
  (folder / "events.csv").write_text("\n".join(lines) + "\n")
  c = config_lib.Config(name="opinions")
  c.prepare.dataset = "tables"
  c.prepare.events = str(folder / "events.csv")
  c.prepare.split = "time"
  c.tokenizer.vectors = "collaborative"
  c.tokenizer.num_codes = 16
  c.tokenizer.num_levels = 2
  c.tokenizer.vector_size = 8
  c.pipeline.max_history = 6
  c.model.d_model = 16
  c.model.num_heads = c.model.num_kv_heads = 2
  c.model.d_ff = 16
  c.model.sid_embed_dim = c.model.feature_embed_dim = 4
  return workflow.assembled(c, folder / "work")


@pytest.fixture(scope="module")
def judged(system):
  return feedback_pairs.judged(system.prepared, splits.TEST, "like", "dislike")


@pytest.fixture(scope="module")
def mesh() -> Mesh:
  return partitioning.make_mesh(config_lib.MeshConfig())


def _params(system, seed=0):
  batch = rows_lib.request_batch(
    [], sorted(rows_lib.feature_sizes(system.prepared)),
    system.config.pipeline, 1,
  )  # fmt: skip
  return tiny.random_params(system.model, batch, system.catalogue, seed)


def test_scores_are_those_of_a_search_over_all_items(system, judged, mesh):
  params = _params(system)
  found = feedback_pairs.scores(system, params, judged, mesh, targets=2)
  retrieve = retrieval.make_retrieve(
    system.model, system.index, system.prepared.num_items
  )
  names = sorted(rows_lib.feature_sizes(system.prepared))
  for user, scores in zip(judged, found):
    history = rows_lib.before(system.prepared, user.record, user.start)
    batch = rows_lib.request_batch([history], names, system.config.pipeline, 1)
    items, every = retrieve(params, batch, system.catalogue)
    of_item = dict(zip(np.asarray(items[0]).tolist(), np.asarray(every[0])))
    expected = [of_item[item] for item in user.record.items[user.events]]
    np.testing.assert_allclose(scores, expected, rtol=1e-4, atol=1e-4)


def test_of_sessions_the_first_item_is_judged(system, judged, mesh):
  """Given what came before it, and none of the other judged events."""
  config = copy.deepcopy(system.config)
  config.model = model_configs.SessionDecoderConfig(
    session_items=2, d_model=16, num_heads=2, d_ff=16, encoder_layers=1,
    decoder_layers=1, sid_embed_dim=4, feature_embed_dim=4,
    moe=model_configs.MoEConfig(),
  )  # fmt: skip
  session = assemble.assemble(config, system.prepared, system.semantic_ids)
  params = _params(session)
  whole = feedback_pairs.scores(session, params, judged[:3], mesh)
  one = [dataclasses.replace(u, events=u.events[1:2]) for u in judged[:3]]
  alone = feedback_pairs.scores(session, params, one, mesh)
  for several, single in zip(whole, alone):
    np.testing.assert_allclose(several[1:2], single, rtol=1e-4)


def test_of_a_reward_model_items_are_worth_what_they_are_in_a_ranking(
  system, judged, mesh
):
  """Targets side by side, and every item of the catalogue alone."""
  config = copy.deepcopy(system.config)
  config.model = model_configs.PScoreConfig(
    d_model=16, num_heads=2, d_ff=16, sid_embed_dim=4, feature_embed_dim=4,
    objectives=("like",),
  )  # fmt: skip
  judge = assemble.assemble(config, system.prepared, system.semantic_ids)
  params = _params(judge)
  found = feedback_pairs.scores(judge, params, judged[:4], mesh, targets=2)
  names = sorted(rows_lib.feature_sizes(system.prepared))
  for user, scores in zip(judged, found):
    history = rows_lib.before(system.prepared, user.record, user.start)
    batch = rows_lib.request_batch([history], names, system.config.pipeline, 1)
    batch, catalogue = jax.device_put((batch, system.catalogue))
    every = judge.model.apply(
      {"params": params}, batch, catalogue, method="item_scores"
    )
    expected = np.asarray(every)[0, 0, user.record.items[user.events]]
    assert len(set(expected.tolist())) > 1
    np.testing.assert_allclose(scores, expected, rtol=1e-5)


def test_models_that_neither_generate_nor_judge_are_refused(
  system, judged, mesh
):
  other = dataclasses.replace(system, model=tiny.two_tower())
  with pytest.raises(ValueError, match="'opinions' scores items"):
    feedback_pairs.scores(other, {}, judged, mesh)


def test_who_is_judged(system, judged):
  """Later events with one opinion, of users who have both; none earlier."""
  prepared = system.prepared
  users, known = set(), set()
  for index in range(len(prepared)):
    record = prepared.user(index)
    known.update(record.items[record.split == splits.TRAIN].tolist())
  for index in range(len(prepared)):
    record = prepared.user(index)
    liked = [
      (bool(a == 2), bool(b == 2))
      for a, b, s in zip(
        record.features["like"], record.features["dislike"], record.split
      )
      if s == splits.TEST and a != b
    ]
    if {True, False} == {like for like, _ in liked}:
      users.add(record.user)
  assert {user.record.user for user in judged} == users
  assert 3 < len(users) < 60
  assert {new for user in judged for new in user.new.tolist()} == {True, False}
  for user in judged:
    assert user.record.split[user.start] == splits.TEST
    assert user.start == 0 or user.record.split[user.start - 1] < splits.TEST
    assert (user.record.split[user.events] == splits.TEST).all()
    for item, new in zip(user.record.items[user.events], user.new):
      assert new == (item not in known)


def test_accuracy_by_loops(judged):
  rng = np.random.default_rng(1)
  first = [rng.integers(0, 4, len(u.events)).astype(float) for u in judged]
  second = [rng.integers(0, 4, len(u.events)).astype(float) for u in judged]

  def accuracy(of_run, new_alone=False):
    points = []
    for user, scores in zip(judged, of_run):
      for i in np.flatnonzero(user.liked):
        for j in np.flatnonzero(~user.liked):
          tie = 0.5 * (scores[i] == scores[j])
          if not new_alone or {i, j} <= {*np.flatnonzero(user.new)}:
            points.append(float(scores[i] > scores[j]) + tie)
    return np.mean(points)

  found = feedback_pairs.compare(
    judged, {"a": [first], "b": [second], "a+b": [first, second]}
  )
  assert found["a"]["accuracy"] == pytest.approx(accuracy(first))
  assert found["b"]["difference"] == pytest.approx(
    accuracy(second) - accuracy(first)
  )
  assert found["b"]["new_accuracy"] == pytest.approx(accuracy(second, True))
  assert "difference" not in found["a"]
  both = [accuracy(first), accuracy(second)]
  assert found["a+b"]["accuracy"] == pytest.approx(np.mean(both))
  assert found["a+b"]["accuracy_std"] == pytest.approx(np.std(both, ddof=1))
  assert found["a+b"]["difference"] == pytest.approx(
    found["b"]["difference"] / 2
  )
  assert (
    found["b"]["difference_low"]
    <= found["b"]["difference"]
    <= found["b"]["difference_high"]
  )


def test_the_table_fits_a_terminal_and_cuts_no_figure():
  """Names of many seeds are what is broken over lines."""
  row = {
    "users": 5, "pairs": 70, "accuracy": 0.8125, "accuracy_low": 0.7,
    "accuracy_high": 0.9, "accuracy_std": 0.03, "new_pairs": 9,
    "new_accuracy": 0.5, "difference": 0.0047, "difference_low": -0.0004,
    "difference_high": 0.0127,
  }  # fmt: skip
  first = {k: v for k, v in row.items() if not k.startswith("difference")}
  name = "+".join(f"pairs_s{seed}" for seed in range(3))
  console = rich.console.Console(width=80, record=True, file=io.StringIO())
  console.print(feedback_pairs.table({"start": first, name: row}))
  lines = console.export_text().splitlines()
  figures = next(line for line in lines if "+0.005" in line)
  for told in ("0.812 ± 0.030", "0.700 … 0.900", "-0.000 … +0.013", "0.500"):
    assert told in figures
  width = next(line.index("right") for line in lines if "right" in line)
  assert name in "".join(line[:width].strip() for line in lines)


def test_popularity_is_how_often_training_names_an_item(system, judged):
  counted = np.zeros(2 * ITEMS + 1)
  for index in range(len(system.prepared)):
    record = system.prepared.user(index)
    for item in record.items[record.split == splits.TRAIN]:
      counted[item] += 1
  found = feedback_pairs.popularity(system, judged)
  for user, scores in zip(judged, found):
    np.testing.assert_array_equal(
      scores, counted[user.record.items[user.events]]
    )


@pytest.mark.parametrize(
  ("good", "bad", "wrong"), [("like", "hate", "hate"), ("gap", "like", "gap")]
)
def test_what_is_no_flag_is_named(system, good, bad, wrong):
  """`gap` is a feature of events, and no opinion."""
  assert "gap" in system.prepared.manifest["event_features"]
  told = rf"no flag '{wrong}', only \['dislike', 'like'\].*--bad"
  with pytest.raises(ValueError, match=told):
    feedback_pairs.judged(system.prepared, splits.TEST, good, bad)
