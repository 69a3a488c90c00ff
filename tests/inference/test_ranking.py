"""Candidates ranked by a reward model, against it asked request by request.

The runs have random weights, and rankers read other histories than the runs
that find the candidates.
"""

import copy
import csv
import dataclasses

import jax
import numpy as np
import pyarrow as pa
import pytest

from onerec_jax import config as config_lib
from onerec_jax import model_configs, partitioning, semantic_ids
from onerec_jax.alignment import reward_models
from onerec_jax.data import features, prepare, shards, snapshots
from onerec_jax.data import rows as rows_lib
from onerec_jax.inference import assemble, ranking
from onerec_jax.inference.recommender import Recommender, Request
from tests import tiny
from tests.inference import random_runs
from tests.inference.random_runs import ITEMS, NAMES

pytestmark = pytest.mark.usefixtures("one_device")

WIDTH, K = 9, 3
PAIRS = {"lazy_decoder": "by_session", "sasrec": "p_score"}
"""Who finds → who ranks."""
REWARD = {
  "d_model": 8, "num_heads": 2, "d_ff": 8, "num_layers": 1,
  "sid_embed_dim": 4, "feature_embed_dim": 4, "lifelong_queries": 2,
  "lifelong_layers": 1,
}  # fmt: skip
SESSION = model_configs.SessionRewardConfig(session_size=2, **REWARD)
P_SCORE = model_configs.PScoreConfig(objectives=("click", "like"), **REWARD)


def config_of(folder, name):
  """Finders read four events, p_score six, by_session pathways."""
  c = random_runs.config_of(folder, name)
  if name == "p_score":
    c.model, c.pipeline.max_history = P_SCORE, 6
  if name == "by_session":
    c.model = SESSION
    c.pipeline.pathways = config_lib.PathwaysConfig(2, 3, 3)
    c.lifelong = config_lib.LifelongConfig(every=2, max_items=2)
  return c


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Name → system and random parameters; nothing is trained or saved."""
  folder = tmp_path_factory.mktemp("ranking")
  random_runs.write_log(folder)
  codes = np.stack(np.divmod(np.arange(-1, ITEMS).clip(0), 5), axis=1)
  coded = semantic_ids.SemanticIds(
    codes.astype(np.int32), (5, 5), [], "by number", {}
  )
  vectors = np.random.default_rng(0).normal(size=(ITEMS, 4))
  found = {}
  for seed, name in enumerate([*PAIRS, *PAIRS.values()]):
    c = config_of(folder, name)
    data = shards.PreparedData.open(prepare.prepare(c.prepare, folder))
    if name == "by_session":
      data.snapshots = snapshots.compress(
        c.lifelong, 3, data, vectors.astype(np.float32), "random", folder
      )
    system = assemble.assemble(c, data, None if name == "sasrec" else coded)
    found[name] = tiny.with_params(system, seed)
  return found


@pytest.fixture(scope="module")
def load(runs):
  """`Recommender.load` of these runs; and what else loads them."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(assemble, "load", lambda _, name, mesh: runs[name])
    patch.setattr(assemble, "choose", lambda _, name, ranker: name)
    yield lambda name, ranker="": Recommender.load("", name, 8, ranker)


@pytest.fixture(scope="module")
def both(load):
  """Finder → the recommender of it and its ranker."""
  return {name: load(name, ranker) for name, ranker in PAIRS.items()}


@pytest.fixture(scope="module")
def finders(both):
  """The same without a ranker: what searches is compiled once."""
  found = {name: copy.copy(recommender) for name, recommender in both.items()}
  for recommender in found.values():
    recommender.ranker = None
  return found


@pytest.fixture(scope="module")
def best(runs, load):
  """(ranker, history, raw items, k) → the k best of them, their rewards.

  The history is a stored user's, by name, or given.
  """
  rewards = {
    name: jax.jit(reward_models.load("", name)) for name in PAIRS.values()
  }

  def ask(name, history, raw, k=K):
    prepared = runs[name][0].prepared
    if isinstance(history, str):
      users = prepared.users["raw_id"].to_pylist()
      record = prepared.user(users.index(history))
      history = rows_lib.before(prepared, record, len(record.items))
    # Always as many: one compilation.
    given = [prepared.item_index[i] for i in raw] + [0] * (ITEMS - len(raw))
    batch = tiny.asking(runs[name][0], [history])
    earned = rewards[name](batch, np.asarray([given], np.int32))[0]
    order = np.argsort(-np.asarray(earned[: len(raw)]), kind="stable")[:k]
    return [raw[i] for i in order], [float(earned[i]) for i in order]

  return ask


def agree(found, want):
  """Items, and values but for rounding."""
  assert found[0] == want[0]
  np.testing.assert_allclose(found[1], want[1], rtol=1e-5, atol=1e-6)


EVERYBODY = [Request(user=user) for user in NAMES]


@pytest.mark.parametrize("name", PAIRS)
def test_the_best_of_what_a_run_finds(finders, both, best, name):
  beams, _ = finders[name].recommend(EVERYBODY, WIDTH, WIDTH, False)
  answers = both[name].recommend(EVERYBODY, K, WIDTH, False)
  for user, beam, *found in zip(NAMES, beams, *answers, strict=True):
    assert len(beam) == WIDTH
    agree(found, best(PAIRS[name], user, beam))
  # Or the test shows nothing.
  assert any(items != beam[:K] for items, beam in zip(answers[0], beams))


def test_seen_items_are_no_candidates(finders, both, best):
  """A beam has fewer left; an item scorer fills their places."""
  finder = finders["lazy_decoder"]
  beams, _ = finder.recommend(EVERYBODY, WIDTH, WIDTH, False)
  answers = both["lazy_decoder"].recommend(EVERYBODY, K, WIDTH)
  left = []
  for user, beam, *found in zip(NAMES, beams, *answers, strict=True):
    unseen = [item for item in beam if item not in finder.history(user)]
    left.append(len(unseen))
    agree(found, best("by_session", user, unseen))
  assert K <= min(left) < WIDTH, "or the test shows nothing"
  lists, _ = finders["sasrec"].recommend(EVERYBODY, WIDTH)
  answers = both["sasrec"].recommend(EVERYBODY, K, WIDTH)
  for user, items, *found in zip(NAMES, lists, *answers, strict=True):
    agree(found, best("p_score", user, items))


def test_a_beam_with_too_few_unseen_is_searched_anew(finders, both, best):
  """What that finds are then the candidates, all of it."""
  finder, k = finders["lazy_decoder"], WIDTH - 1
  beams, _ = finder.recommend(EVERYBODY, WIDTH, WIDTH, False)
  full, _ = finder.recommend(EVERYBODY, WIDTH, WIDTH)
  answers = both["lazy_decoder"].recommend(EVERYBODY, k, WIDTH)
  again = 0
  for user, beam, items, *found in zip(
    NAMES, beams, full, *answers, strict=True
  ):
    unseen = [item for item in beam if item not in finder.history(user)]
    again += len(unseen) < k
    given = items if len(unseen) < k else unseen
    agree(found, best("by_session", user, given, k))
  assert again


def test_a_given_history_is_read_as_the_ranker_reads(runs, finders, both, best):
  """Positive events and representatives, which the finder has no use for."""
  prepared = runs["by_session"][0].prepared
  recommender, user = both["lazy_decoder"], NAMES[2]
  with open(prepared.directory.parent / "events.csv") as file:
    rows = [row for row in csv.DictReader(file) if row["user_id"] == user]
  told = dict(
    history=[row["item_id"] for row in rows],
    timestamps_ms=[int(row["timestamp_ms"]) for row in rows],
  )
  ratings = {"rating": [float(row["rating"]) for row in rows]}
  assert len({rating >= 4 for rating in ratings["rating"]}) == 2
  k = WIDTH - 2  # all there are: no empty place may come before one
  allowed = finders["lazy_decoder"].recommend(EVERYBODY, k, WIDTH)[0][2]
  requests = [
    Request(user=user, allowed=allowed),
    Request(user=user, allowed=allowed, event_columns=ratings, **told),
    Request(user=user, allowed=allowed, **told),
    Request(history=[], allowed=allowed),
    Request(user="nobody", allowed=allowed),
  ]
  with pytest.warns(UserWarning, match="'nobody' is not known"):
    answers = recommender.recommend(requests, k, WIDTH, on_unknown="skip")
  stored, given, bare, newcomer, nobody = zip(*answers)
  agree(stored, best("by_session", user, allowed, k))
  agree(given, stored)
  assert np.abs(np.subtract(bare[1], stored[1])).max() > 1e-4
  unknown = features.user_features(prepared.manifest["bucketing"], {})
  none = np.zeros(0, np.int32)
  columns = dict.fromkeys(prepared.manifest["event_features"], none)
  empty = rows_lib.History(none, columns, none.astype(bool), unknown)
  agree(newcomer, best("by_session", empty, allowed, k))
  agree(nobody, newcomer)


def test_what_cannot_be_ranked_says_so(runs, both, load):
  with pytest.raises(ValueError, match="k=10 .* raise beam_width .* to 10 or"):
    both["sasrec"].recommend(EVERYBODY, 10, WIDTH)
  with pytest.raises(ValueError, match="sasrec is a sasrec, which ranks no"):
    load("lazy_decoder", "sasrec")
  system, params = runs["sasrec"]
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  ranker = ranking.Ranker(*runs["p_score"], mesh)
  data = system.prepared
  other = shards.PreparedData(
    data.directory, data.manifest | {"fingerprint": "another"}
  )
  one_more = pa.concat_tables([data.items, data.items.slice(0, 1)])
  for prepared, message in (
    (other, "sasrec was trained on the data another, the ranker p_score on"),
    (data.with_items(one_more), "serves 21 items, .* p_score knows 20"),
  ):
    changed = dataclasses.replace(system, prepared=prepared)
    with pytest.raises(ValueError, match=message):
      Recommender(changed, params, mesh, ranker=ranker)
