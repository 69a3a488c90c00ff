"""The recommender: raw ids in, raw ids out, the model's own ranking between.

The runs have random weights: nothing here depends on what was learned.
"""

import csv
import functools
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import files, model_configs, partitioning, runs
from onerec_jax.data import features
from onerec_jax.data import rows as rows_lib
from onerec_jax.inference import (
  assemble,
  beam_search,
  retrieval,
)
from onerec_jax.inference import request as request_lib
from onerec_jax.inference.recommender import Recommender, Request
from tests.inference import random_runs
from tests.inference.random_runs import ITEMS


def events_of(workdir, user):
  """A user's rows of events.csv."""
  with open(workdir / "events.csv") as file:
    return [row for row in csv.DictReader(file) if row["user_id"] == user]


def ranking(workdir, recommender, rows, city):
  """Raw item → score by the model itself, over the whole catalogue."""
  system = recommender.system
  prepared = system.prepared
  dense = prepared.item_index
  bucketing = prepared.manifest["bucketing"]
  batch = rows_lib.request_batch(
    [
      rows_lib.History(
        np.asarray([dense[row["item_id"]] for row in rows], np.int32),
        features.event_features(
          bucketing,
          {"rating": np.asarray([float(row["rating"]) for row in rows])},
          np.asarray([int(row["timestamp_ms"]) for row in rows], np.int64),
        ),
        np.zeros(len(rows), bool),
        features.user_features(bucketing, {"city": city}),
      )
    ],
    sorted(rows_lib.feature_sizes(prepared)),
    system.config.pipeline,
    1,
  )
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  _, params = assemble.load(workdir, system.config.name, mesh)

  @jax.jit
  def score(params, batch, catalogue, index):
    if index is None:
      return system.model.apply(
        {"params": params}, batch, catalogue, method="item_scores"
      )[0, 0, 1:]
    items = jnp.arange(1, ITEMS + 1)[None]
    return beam_search.exact_scores(
      system.model, params, batch, catalogue, index, items
    )[0]

  scores = score(params, batch, system.catalogue, system.index)
  names = prepared.items["raw_id"].to_pylist()
  return dict(zip(names, np.asarray(scores).tolist()))


@pytest.fixture(scope="module")
def scored(workdir, recommenders):
  """Name of a run → `ranking` for the user u-4."""
  rows = events_of(workdir, "u-4")
  return functools.cache(
    lambda name: ranking(workdir, recommenders[name], rows, "Rome")
  )


@pytest.mark.parametrize("name", ["lazy_decoder", "sasrec"])
def test_a_stored_user_gets_the_models_ranking(
  workdir, recommenders, scored, name
):
  recommender, scores = recommenders[name], scored(name)
  rows = events_of(workdir, "u-4")
  seen = {row["item_id"] for row in rows}
  assert recommender.history("u-4") == [row["item_id"] for row in rows]
  for filter_seen in (True, False):
    items, values = recommender.recommend(
      [Request(user="u-4")], k=ITEMS, filter_seen=filter_seen
    )
    want = sorted(scores, key=scores.get, reverse=True)
    want = [i for i in want if not (filter_seen and i in seen)]
    np.testing.assert_allclose(
      values[0], [scores[i] for i in want], rtol=1e-4, atol=1e-4
    )
    assert items[0] == want


@pytest.mark.parametrize("name", ["lazy_decoder", "sasrec"])
def test_every_way_to_say_the_same_gives_the_same(workdir, recommenders, name):
  rows = events_of(workdir, "u-2")
  history = [row["item_id"] for row in rows]
  told = dict(
    history=history,
    timestamps_ms=[int(row["timestamp_ms"]) for row in rows],
    event_columns={"rating": [float(row["rating"]) for row in rows]},
  )
  same = [
    Request(user="u-2"),
    Request(user="u-2", **told),
    Request(user_columns={"city": "Lima"}, **told),
    Request(user="nobody", user_columns={"city": "Lima"}, **told),
  ]
  others = [Request(history=["it_3"]), Request(history=[])]
  times = np.asarray(told["timestamps_ms"], "datetime64[ms]")
  told["timestamps_ms"] = times.astype("datetime64[ns]")
  same.append(Request(user_columns={"city": "Lima"}, **told))
  recommender = recommenders[name]
  items, scores = recommender.recommend(same + others, k=5)
  for other, value in zip(items[1:5], scores[1:5]):
    assert other == items[0]
    np.testing.assert_allclose(value, scores[0], rtol=1e-5)
  # What is said counts: less said, another answer.
  less = [Request(history=history), Request(user="u-2", history=history[-1:])]
  for value in recommender.recommend(less, k=5)[1]:
    assert not np.allclose(value, scores[0], rtol=1e-4)
  # The company in a batch does not: more requests than a batch of 8 holds.
  many = recommender.recommend((same + others) * 2, k=5)
  assert many[0] == items * 2
  np.testing.assert_allclose(many[1], scores * 2, rtol=1e-4)


def test_a_users_id_is_known_whatever_else_is_said(tmp_path):
  """Where it is a feature: of a stored history and of one that is given."""
  random_runs.write_log(tmp_path)
  config = random_runs.config_of(tmp_path, "lazy_decoder")
  config.prepare.user_ids = True
  random_runs.write_run(config, tmp_path)
  rows = events_of(tmp_path, "u-2")
  told = dict(
    history=[row["item_id"] for row in rows],
    timestamps_ms=[int(row["timestamp_ms"]) for row in rows],
    event_columns={"rating": [float(row["rating"]) for row in rows]},
  )
  told_of_user = {"user_columns": {"city": "Lima"}, **told}
  _, scores = Recommender.load(tmp_path, batch_size=8).recommend(
    [
      Request(user="u-2"),
      Request(user="u-2", **told),
      Request(user="u-2", **told_of_user),
      Request(**told_of_user),
      Request(user="nobody", **told_of_user),
      Request(user="u-5", **told_of_user),
    ],
    k=5,
  )
  for same in (scores[1], scores[2]):
    np.testing.assert_allclose(same, scores[0], rtol=1e-5)
  np.testing.assert_allclose(scores[4], scores[3], rtol=1e-5)
  for other in (scores[3], scores[5]):
    assert not np.allclose(other, scores[0], rtol=1e-4)


def test_a_beam_full_of_seen_items_still_gives_a_full_list(
  workdir, recommenders, scored
):
  """As many beams as items wanted: every seen item in it costs a place."""
  recommender, scores = recommenders["lazy_decoder"], scored("lazy_decoder")
  seen = {row["item_id"] for row in events_of(workdir, "u-4")}
  width = ITEMS - len(seen)
  in_beam = recommender.recommend(
    [Request(user="u-4")], k=width, beam_width=width, filter_seen=False
  )
  assert seen & set(in_beam[0][0]), "or the test shows nothing"
  others = [Request(history=["it_1"]), Request(user="u-4")]
  items, values = recommender.recommend(others, k=width, beam_width=width)
  want = sorted(set(scores) - seen, key=scores.get, reverse=True)
  assert items[1] == want
  np.testing.assert_allclose(
    values[1], [scores[i] for i in want], rtol=1e-4, atol=1e-4
  )
  assert len(items[0]) == width
  assert "it_1" not in items[0]


def test_allowed_items_are_each_requests_own(recommenders):
  allowed = ["it_7", "it_1", "it_11"]
  for recommender in recommenders.values():
    items, _ = recommender.recommend(
      [
        Request(history=["it_7"], allowed=allowed),
        Request(history=["it_7"], allowed=allowed, user="u-1"),
        Request(history=["it_7"]),
        Request(history=[], allowed=[]),
      ],
      k=10,
      beam_width=20,
    )
    assert sorted(items[0]) == sorted(items[1]) == ["it_1", "it_11"]
    assert len(items[2]) == 10
    assert items[3] == []


def test_unknown_ids_are_named_or_skipped_with_a_warning(recommenders):
  recommender = recommenders["sasrec"]
  strange = Request(history=["it_2", "nothing", "it_5"])
  fine = Request(history=["it_2", "it_5"])
  with pytest.raises(ValueError, match="request 1, history: item 'nothing'"):
    recommender.recommend([fine, strange])
  with pytest.warns(UserWarning, match="1 unknown item"):
    items, _ = recommender.recommend([strange], on_unknown="skip")
  assert items == recommender.recommend([fine])[0]
  with pytest.raises(ValueError, match="request 0: user 'nobody' is not in"):
    recommender.recommend([Request(user="nobody")])
  with pytest.warns(UserWarning, match="user 'nobody' is not known"):
    items, _ = recommender.recommend(
      [Request(user="nobody")], on_unknown="skip"
    )
  assert items == recommender.recommend([Request(history=[])])[0]
  with pytest.raises(ValueError, match="neither a user nor a history"):
    recommender.recommend([Request()])
  for time in (None, np.nan, np.datetime64("NaT"), "noon"):
    odd = Request(history=["it_2"], timestamps_ms=np.asarray([time]))
    with pytest.raises(ValueError, match="request 0, timestamps_ms: "):
      recommender.recommend([odd])
  for column, told in (
    ({"ratng": [1.0]}, "request 0: unknown event column 'ratng'; .*'rating'"),
    ({"rating": ["good"]}, "request 0: rating of event_columns .*'good'"),
    ({"timestamp": [1.0]}, "request 0: timestamp is no .* as timestamps_ms"),
  ):
    with pytest.raises(ValueError, match=told):
      recommender.recommend([Request(history=["it_2"], event_columns=column)])
  with pytest.raises(ValueError, match="request 0 is 'u': give a list of Req"):
    request_lib.check("u", (), ())
  with pytest.raises(ValueError, match=r"without a list: write \[request\]"):
    request_lib.check(Request(user="u"), (), ())
  likes = Request(history=["it_2"], event_columns={"likes": [1.0]})
  with pytest.raises(ValueError, match="call it 'like'"):
    request_lib.check([likes], (), ())
  request_lib.check([likes], ("likes",), ())
  with pytest.raises(ValueError, match="request 0: .*'citty'; call it 'city'"):
    recommender.recommend([Request(["it_2"], user_columns={"citty": "Oslo"})])
  with pytest.raises(ValueError, match="2 values of rating for 1 events"):
    recommender.recommend(
      [Request(history=["it_2"], event_columns={"rating": [1.0, 2.0]})]
    )


def test_a_guest_is_not_the_user_none(recommenders):
  """Who has a city."""
  recommender = recommenders["sasrec"]
  asked = [Request(["it_2"], user) for user in (None, "nobody", "None")]
  _, (guest, nobody, none) = recommender.recommend(asked)
  np.testing.assert_allclose(guest, nobody, rtol=1e-5)
  assert not np.allclose(guest, none, rtol=1e-4)


@pytest.mark.parametrize(
  "last",
  [
    Request(user="nobody"),
    Request(history=["nothing"]),
    Request(history=[], allowed=["nothing"]),
  ],
)
def test_unknown_ids_are_told_before_any_search(
  recommenders, monkeypatch, last
):
  def search(*_, **__):
    raise AssertionError("searched")

  monkeypatch.setattr(retrieval, "make_retrieve", search)
  requests = [Request(user="u-1")] * 20 + [last]
  # A width that nothing else has compiled.
  with pytest.raises(ValueError, match="request 20.* is not in"):
    recommenders["lazy_decoder"].recommend(requests, beam_width=13)


def test_titles_fall_back_to_ids(recommenders):
  recommender = recommenders["sasrec"]
  assert recommender.titles(["it_3", "it_0"]) == ["Thing 3", "it_0"]
  with pytest.raises(ValueError, match="item 'it_99' is not in"):
    recommender.titles(["it_99"])


def test_the_run_is_chosen_by_name(workdir, recommenders, tmp_path):
  assert recommenders["sasrec"].system.config.name == "sasrec"
  assert Recommender.load(workdir).system.config.name == "lazy_decoder"
  assert assemble.choose(workdir, ranker="lazy_decoder") == "sasrec"
  with pytest.raises(ValueError, match=r"no run 'x' .*\['lazy_decoder', 'sas"):
    Recommender.load(workdir, "x")
  with pytest.raises(ValueError, match="no trained run"):
    Recommender.load(tmp_path)
  with pytest.raises(ValueError, match="no directory .*missing"):
    Recommender.load(tmp_path / "missing")


def test_runs_of_other_data_are_asked_by_name_alone(workdir, tmp_path, capsys):
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  record = assemble.run_directory(copy, "lazy_decoder") / "config.json"
  files.write_json(record, files.read_json(record) | {"prepared": "before"})
  assert Recommender.load(copy).system.config.name == "sasrec"
  with pytest.raises(ValueError, match="trained on other data"):
    Recommender.load(copy, "lazy_decoder")
  assert runs.current_runs(copy) == ["sasrec"]
  assert "lazy_decoder: trained on other data" in capsys.readouterr().err


def test_reward_models_recommend_nothing(workdir, tmp_path, capsys):
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  record = assemble.run_directory(copy, "lazy_decoder") / "config.json"
  values = files.read_json(record)
  scorer = config_lib.Config(model=model_configs.PScoreConfig())
  values["config"]["model"] = config_lib.to_dict(scorer)["model"]
  files.write_json(record, values)
  assert assemble.choose(copy) == "sasrec"
  assert assemble.choose(copy, "lazy_decoder") == "lazy_decoder"
  assert runs.current_runs(copy) == ["sasrec"]
  assert "lazy_decoder: a reward model" in capsys.readouterr().err


def test_runs_asked_for_other_events_are_measured_apart(
  workdir, tmp_path, capsys
):
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  names = ["lazy_decoder", "sasrec"]
  for time, name in enumerate(names):
    run = assemble.run_directory(copy, name)
    os.utime(run / "best.json", (time, time))
    files.write_json(run / "finished.json", {})
  assert runs.current_runs(copy) == names
  assert not capsys.readouterr().err
  record = assemble.run_directory(copy, "lazy_decoder") / "config.json"
  values = files.read_json(record)
  values["config"]["pipeline"]["imitate"] = "positive"
  files.write_json(record, values)
  (assemble.run_directory(copy, "sasrec") / "finished.json").unlink()
  assert runs.current_runs(copy) == ["sasrec"]
  told = capsys.readouterr().err
  assert "imitate=positive; --models=lazy_decoder measures it" in told
  assert "sasrec: not trained to its end" in told


@pytest.mark.slow
def test_the_program_prints_a_table_and_says_what_it_needs(
  workdir, recommenders, tmp_path
):
  copy = tmp_path / "copy"
  shutil.copytree(workdir, copy)
  ranker = random_runs.config_of(workdir, "p_score")
  ranker.model = model_configs.PScoreConfig(d_model=8, d_ff=8, num_layers=1)
  random_runs.write_run(ranker, copy)
  command = [sys.executable, "-m", "launch.recommend", f"--workdir={copy}"]
  options = dict(capture_output=True, text=True)
  asked = ["--history=it_4", "-k", "3", "--model=sasrec", "--ranker=p_score"]
  done = subprocess.run([*command, *asked, "--beam_width=6"], **options)
  assert done.returncode == 0, done.stderr
  (given,), _ = recommenders["sasrec"].recommend([Request(["it_4"])], 6)
  items = re.findall(r"it_\d+", done.stdout)
  assert len(set(items) & set(given)) == len(items) == 3
  # Probabilities, as sasrec's own scores are not.
  values = [float(x) for x in re.findall(r" (0\.\d{3})\b", done.stdout)]
  assert len(values) == 3
  assert values == sorted(values, reverse=True)
  caption = "score: value by p_score of what sasrec found"
  assert caption in " ".join(done.stdout.split())
  users, found = tmp_path / "users.csv", tmp_path / "found.csv"
  users.write_text("user_id\nu-1\nghost\nspirit\n")
  asked = [f"--users_file={users}", f"--output={found}", "--model=sasrec"]
  done = subprocess.run([*command, *asked, "--on_unknown=skip"], **options)
  assert done.returncode == 0, done.stderr
  assert done.stderr.splitlines()[-2:] == [
    f"warning: {users}, row {row}: user {user!r} is not known, a newcomer's "
    "answer"
    for row, user in ((2, "ghost"), (3, "spirit"))
  ]
  asked = ['--history="it_4,5",it_4', "--model=sasrec"]
  done = subprocess.run([*command, *asked], **options)
  assert done.returncode == 1
  assert "item 'it_4,5' is not in" in done.stderr
  wrong = subprocess.run([*command, "--users_file=x.parquet"], **options)
  assert wrong.returncode == 1
  assert "--output" in wrong.stderr + wrong.stdout
