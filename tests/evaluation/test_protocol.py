"""The protocol against hand-made and brute-force answers."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax.data import batch as batch_lib
from onerec_jax.data import pipeline
from onerec_jax.evaluation import protocol, result

CONFIG = config_lib.EvaluationConfig(cutoffs=(1, 3))


def make_batch(rows):
  zeros = np.zeros((rows, 1), np.int32)
  return batch_lib.Batch(
    items=zeros,
    segment=zeros,
    features={},
    targets=zeros,
    visible_from=zeros,
    visible_until=zeros,
  )


def make_queries(user, target, seen):
  return pipeline.Queries(
    user=np.array(user, np.int32),
    target=np.array(target, np.int32),
    seen=[np.array(s, np.int32) for s in seen],
  )


def run(batches, lists, catalogue, config=CONFIG, **kwargs):
  """Evaluates fixed lists, one array a batch."""
  answers = iter(lists)

  def retrieve(batch):
    items = np.array(next(answers))
    return items, np.zeros(items.shape, np.float32)

  pairs = [(make_batch(len(q.user)), q) for q in batches]
  return protocol.evaluate(
    retrieve,
    pairs,
    catalogue,
    config,
    **{"name": "m", "split": "test", "progress": False, **kwargs},
  )


# Six items; items 1 and 2 share a semantic ID. Training events 0 4 5 5 9 20.
COUNTS = np.array([0, 0, 4, 5, 5, 9, 20])
CODES = np.array([[0, 0], [1, 1], [1, 1], [1, 2], [2, 1], [2, 2], [0, 0]])
QUERIES = [
  make_queries([1, 2], [2, 5], [[6, 4], [3]]),
  make_queries([2, 0], [1, 0], [[3, 5, 1], []]),
]
LISTS = [[[6, 2, 4, 3], [5, 3, 6, 1]], [[3, 4, 2, 0], [0, 0, 0, 0]]]


def test_golden_example():
  found = run(
    QUERIES,
    LISTS,
    protocol.CatalogueInfo.from_codes(COUNTS, CODES),
    config_fingerprint="abc",
  )
  third, half = 1 / math.log2(4), 1 / math.log2(3)
  want = {
    "queries": 3,
    "users": 2,
    "seen_target_rate": 1 / 3,
    "shared_sid_rate": 2 / 3,
    # Query 1: target 2 at rank 2, ID shared by two. Query 2: first. Query 3:
    # target 1, and item 2 of the same ID at rank 3.
    "recall@1": 1 / 3,
    "recall@3": (0.5 + 1 + 0.5) / 3,
    "ndcg@3": (0.5 * half + 1 + 0.5 * third) / 3,
    "mrr@3": (0.25 + 1 + 1 / 6) / 3,
    "strict/recall@3": 2 / 3,
    "strict/ndcg@3": (half + 1) / 3,
    "sid/recall@3": 1.0,
    "sid/mrr@3": (0.5 + 1 + 1 / 3) / 3,
    # Filtered lists: [2 3], [5 6 1], [4 2 0].
    "filtered/recall@1": (0.5 + 1) / 3,
    "filtered/recall@3": 2 / 3,
    "filtered/ndcg@3": (0.5 + 1 + 0.5 * half) / 3,
    "valid_rate@3": 1.0,
    "filtered/valid_rate@3": (2 / 3 + 1 + 2 / 3) / 3,
    "coverage@1": 0.5,
    "coverage@3": 5 / 6,
    "cold/queries": 1,
    "cold/recall@3": 0.5,
    "cold/ndcg@3": 0.5 * third,
    "rare/queries": 2,
    "rare/recall@3": 0.5,
    "filtered/rare/recall@1": 0.25,
    # First slots: items 6, 5 and 3, once each: 3 of 6 items.
    "gini@1": 0.5,
    "popularity@1": (5.5 + 4.5 + 3) / 6 / 3,
    "beam_width": 4,
  }
  summary = found.summary()
  assert {k: summary[k] for k in want} == pytest.approx(want, abs=1e-6)
  assert summary["config_fingerprint"] == "abc"
  assert "cpu" in summary["device"]
  assert found.filtered_items.tolist() == [[2, 3, 0], [5, 6, 1], [4, 2, 0]]


def test_models_that_rank_items_share_no_credit():
  catalogue = protocol.CatalogueInfo.from_codes(COUNTS)
  summary = run(QUERIES, LISTS, catalogue).summary()
  assert summary["recall@3"] == pytest.approx(2 / 3)
  for metric in ("recall@3", "ndcg@3", "filtered/mrr@1"):
    column, _, name = metric.rpartition("/")
    prefix = f"{column}/" if column else ""
    assert summary[f"{prefix}strict/{name}"] == summary[metric]
    assert summary[f"{prefix}sid/{name}"] == summary[metric]
  assert summary["shared_sid_rate"] == 0.0


def test_batching_and_padding_do_not_change_the_figures():
  rng = np.random.default_rng(0)
  lists = np.stack([rng.permutation(6)[:4] + 1 for _ in range(7)])
  user = np.arange(1, 8)
  target = rng.integers(1, 7, size=7)
  seen = [rng.integers(1, 7, size=n) for n in range(7)]
  catalogue = protocol.CatalogueInfo.from_codes(COUNTS, CODES)
  whole = run([make_queries(user, target, seen)], [lists], catalogue)
  empty = np.zeros((1, 4), int)
  pieces = run(
    [
      make_queries(user[:4], target[:4], seen[:4]),
      make_queries([*user[4:], 0], [*target[4:], 0], [*seen[4:], []]),
    ],
    [lists[:4], np.concatenate([lists[4:], empty])],
    catalogue,
  )
  assert pieces.metrics == whole.metrics
  np.testing.assert_array_equal(pieces.items, whole.items)


@pytest.mark.parametrize(
  ("queries", "lists", "message"),
  [
    ([], [], "no queries"),
    ([make_queries([0], [0], [[]])], [[[0, 0, 0]]], "no queries"),
    ([make_queries([1], [1], [[]])], [[[1, 2]]], "beam_width"),
    ([make_queries([8], [1], [[]])], [[[1, 2, 7]]], r"user 8\), slot 2: item"),
    ([make_queries([8], [1], [[]])], [[[1, -1, 2]]], "item -1"),
    ([make_queries([8], [0], [[]])], [[[1, 2, 3]]], "target 0"),
    ([make_queries([8], [1], [[]])], [[[5, 2, 5]]], "item 5 stands twice"),
    ([make_queries([8], [1], [[]])], [[[1, 2, 3]] * 2], "2 lists for 1"),
  ],
)
def test_refuses_what_it_cannot_measure(queries, lists, message):
  catalogue = protocol.CatalogueInfo.from_codes(COUNTS)
  with pytest.raises(ValueError, match=message):
    run(queries, lists, catalogue)


def test_refuses_nan_scores_bad_cutoffs_and_mismatched_codes():
  catalogue = protocol.CatalogueInfo.from_codes(COUNTS)
  pairs = [(make_batch(1), make_queries([1], [1], [[]]))]
  with pytest.raises(ValueError, match="NaN"):
    protocol.evaluate(
      lambda batch: (np.array([[1, 2, 3]]), np.full((1, 3), np.nan)),
      pairs,
      catalogue,
      CONFIG,
      name="m",
      split="test",
      progress=False,
    )
  with pytest.raises(ValueError, match="cutoffs"):
    run(QUERIES, LISTS, catalogue, config_lib.EvaluationConfig(cutoffs=(0,)))
  with pytest.raises(ValueError, match="5 items have codes"):
    protocol.CatalogueInfo.from_codes(COUNTS, CODES[:-1])


def test_a_model_that_recommends_nothing_is_measured_not_crashed():
  catalogue = protocol.CatalogueInfo.from_codes(COUNTS)
  summary = run(QUERIES[:1], [np.zeros((2, 3), int)], catalogue).summary()
  assert summary["valid_rate@3"] == 0.0
  assert summary["recall@3"] == 0.0
  assert "gini@3" not in summary


def test_popularity_breaks_ties_by_the_lower_id():
  retrieve = protocol.popularity_retrieve(COUNTS, 4)
  items, scores = retrieve(make_batch(2))
  assert items.tolist() == [[6, 5, 3, 4]] * 2
  assert scores[0].tolist() == [20, 9, 5, 5]
  with pytest.raises(ValueError, match="1..6"):
    protocol.popularity_retrieve(COUNTS, 7)


def test_rank_from_scores_matches_sorting():
  rng = np.random.default_rng(1)
  # Few distinct values, so that ties are common.
  scores = rng.integers(0, 4, size=(5, 9)).astype(np.float32)
  scores[:, 0] = 99.0
  scores[2, 3:] = -np.inf
  items, values = jax.jit(protocol.rank_from_scores, static_argnums=1)(
    scores, 6
  )
  for row, got, value in zip(scores, np.asarray(items), np.asarray(values)):
    want = sorted(range(1, 9), key=lambda i: (-row[i], i))[:6]
    want = [i if np.isfinite(row[i]) else 0 for i in want]
    assert got.tolist() == want
    assert value.tolist() == [row[i] if i else -np.inf for i in want]
  exact = protocol.exact_retrieve(lambda batch: jnp.asarray(scores), 6)(
    make_batch(5)
  )
  np.testing.assert_array_equal(exact[0], items)


def test_popularity_on_movielens_100k(real_data):
  """Leave-one-out over (timestamp, source row), straight from the file.

  The .086 known for popularity here is the seen-filtered column; unfiltered
  it is .050, because a user's favourites are mostly the popular films.
  """
  path = real_data("movielens_100k") / "ml-100k.inter"
  table = np.loadtxt(path, skiprows=1, dtype=np.int64, usecols=(0, 1, 3))
  user, item, time = table.T
  order = np.lexsort((np.arange(len(user)), time, user))
  user, item = user[order], item[order]
  ends = np.flatnonzero(np.append(user[1:] != user[:-1], True))
  train = np.ones(len(user), bool)
  train[ends] = train[ends - 1] = False
  counts = np.bincount(item[train], minlength=item.max() + 1)
  starts = np.concatenate([[0], ends[:-1] + 1])
  queries = make_queries(
    user[ends], item[ends], [item[s:e] for s, e in zip(starts, ends)]
  )
  found = protocol.evaluate(
    protocol.popularity_retrieve(counts, int(item.max())),
    [(make_batch(len(ends)), queries)],
    protocol.CatalogueInfo.from_codes(counts),
    config_lib.EvaluationConfig(),
    name="popularity",
    split="test",
    progress=False,
  )
  assert found.metrics["queries"] == 943
  assert found.metrics["filtered/recall@10"] == pytest.approx(81 / 943)
  assert found.metrics["recall@10"] == pytest.approx(47 / 943)
  assert found.metrics["filtered/valid_rate@10"] == 1.0
  # One list for all: ten items of the catalogue.
  assert found.metrics["coverage@10"] == pytest.approx(10 / item.max())


def planted(name, hits, user=None, target=None):
  """An evaluation with recall@1 given per query."""
  n = len(hits)
  user = np.arange(1, n + 1) if user is None else np.array(user)
  target = np.full(n, 3) if target is None else np.array(target)
  lists = np.where(np.array(hits)[:, None], target[:, None], 0)
  lists = np.concatenate([lists, np.zeros((n, 2), int)], axis=1)
  return run(
    [make_queries(user, target, [[]] * n)],
    [lists],
    protocol.CatalogueInfo.from_codes(COUNTS),
    name=name,
  )


def test_compare_finds_a_planted_difference():
  rng = np.random.default_rng(0)
  weak = rng.random(2000) < 0.2
  strong = weak | (rng.random(2000) < 0.1)
  a, b = planted("a", strong), planted("b", weak)
  found = result.compare(a, b, "recall@1", resamples=500)
  truth = strong.mean() - weak.mean()
  assert found["difference"] == pytest.approx(truth)
  assert found["low"] < truth < found["high"]
  # Paired: the standard error is that of the differences, about .006.
  assert found["high"] - found["low"] < 0.03
  assert (found["mean_a"], found["mean_b"]) == pytest.approx(
    (strong.mean(), weak.mean())
  )
  assert found["above_zero"] == 1.0
  same = result.compare(a, a, "recall@1", resamples=10)
  assert (same["low"], same["high"], same["above_zero"]) == (0, 0, 0)


def test_compare_pairs_by_query_whatever_the_order():
  user, target = [5, 2, 2, 9], [1, 4, 3, 3]
  a = planted("a", [1, 0, 1, 1], user, target)
  order = [3, 1, 0, 2]
  b = planted(
    "b", [1, 0, 1, 1], [user[i] for i in order], [target[i] for i in order]
  )
  # b's hits by query: (9,3) 1, (2,4) 0, (5,1) 1, (2,3) 1: the same as a's.
  found = result.compare(a, b, "recall@1", resamples=50)
  assert (found["low"], found["high"]) == (0, 0)
  assert (found["queries"], found["users"]) == (4, 3)


def test_compare_refuses_other_queries_and_unknown_metrics():
  a = planted("a", [1, 0])
  with pytest.raises(ValueError, match=r"different queries.*\(2, 1\)"):
    result.compare(a, planted("b", [1, 0], target=[3, 1]), "recall@1")
  with pytest.raises(ValueError, match="3 queries"):
    result.compare(a, planted("b", [1, 0, 1]), "recall@1")
  with pytest.raises(ValueError, match="no per-query metric 'recall@7'"):
    result.compare(a, planted("b", [0, 0]), "recall@7")


def test_joined_seeds_are_the_means_of_their_queries():
  """Against the arithmetic by hand, whatever order a seed's queries have."""
  user, target = [5, 2, 9], [1, 4, 3]
  first = planted("a_seed0", [1, 0, 1], user, target)
  second = planted("a_seed1", [1, 1, 0], user[::-1], target[::-1])
  both = result.joined([first, second])
  assert both.name == "a_seed0+a_seed1"
  # By (user, target): seed 0 hits (5, 1) and (9, 3), seed 1 (9, 3) and (2, 4).
  assert both.per_query["recall@1"].tolist() == [0.5, 0.5, 1.0]
  assert both.metrics["recall@1"] == pytest.approx(2 / 3)
  assert isinstance(both.metrics["queries"], int)
  base = planted("b", [0, 0, 1], user, target)
  found = result.compare(both, base, "recall@1", resamples=50)
  assert found["difference"] == pytest.approx(1 / 3)
  assert result.joined([first]) is first
  with pytest.raises(ValueError, match="not measured alike"):
    result.joined([first, planted("a_seed1", [1, 1])])
  with pytest.raises(ValueError, match="different queries"):
    result.joined([first, planted("a_seed1", [1, 1, 1], user, [1, 4, 4])])


def test_saves_and_loads_whole(tmp_path):
  saved = planted("a", [1, 0, 1])
  path = saved.save(tmp_path)
  assert path == tmp_path / "models" / "a" / "evaluation_test.json"
  loaded = result.Evaluation.load(tmp_path, "a", "test")
  assert loaded.summary() == saved.summary()
  for name in ("user", "target", "items", "filtered_items"):
    np.testing.assert_array_equal(getattr(loaded, name), getattr(saved, name))
  assert loaded.per_query.keys() == saved.per_query.keys()
  for key, value in saved.per_query.items():
    np.testing.assert_array_equal(loaded.per_query[key], value)


def test_loading_refuses_newer_and_foreign_files(tmp_path):
  planted("a", [1, 0, 1]).save(tmp_path)
  planted("b", [1, 1, 1]).save(tmp_path)
  models = tmp_path / "models"
  arrays = (models / "b" / "evaluation_test.npz").read_bytes()
  (models / "a" / "evaluation_test.npz").write_bytes(arrays)
  with pytest.raises(ValueError, match="not the file"):
    result.Evaluation.load(tmp_path, "a", "test")
  path = models / "b" / "evaluation_test.json"
  path.write_text(path.read_text().replace('version": 1', 'version": 2'))
  with pytest.raises(ValueError, match="format version 2"):
    result.Evaluation.load(tmp_path, "b", "test")
  with pytest.raises(FileNotFoundError):
    result.Evaluation.load(tmp_path, "c", "test")


def test_aggregate_gives_mean_and_sample_deviation():
  protocol_facts = {"queries": 9, "users": 9, "beam_width": 4, "device": "x"}
  runs = [
    {**protocol_facts, "ndcg@10": value, "only": 1.0}
    for value in (0.1, 0.2, 0.6)
  ]
  del runs[1]["only"]
  found = result.aggregate(runs)
  assert found["ndcg@10"] == pytest.approx(
    {"mean": 0.3, "std": math.sqrt(0.07), "seeds": 3}
  )
  assert "only" not in found
  assert "device" not in found
  assert result.aggregate(runs[:1])["ndcg@10"]["std"] is None
  runs[0]["beam_width"] = 5
  with pytest.raises(ValueError, match="beam_width is"):
    result.aggregate(runs)
  with pytest.raises(ValueError, match="no summaries"):
    result.aggregate([])
