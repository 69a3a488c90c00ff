"""Users in, recommendations out, as tables in files and on a screen."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rich.console

from onerec_jax import config as config_lib
from onerec_jax import model_configs, partitioning, workflow
from onerec_jax.inference import ranking, recommendation_tables
from onerec_jax.inference.recommender import Recommender, Request
from tests.inference import random_runs


def test_a_table_of_users(recommenders, tmp_path):
  recommender = recommenders["sasrec"]
  source, target = tmp_path / "users.parquet", tmp_path / "out.parquet"
  pq.write_table(
    pa.table({"user_id": ["u-1", "x"], "history": [None, ["it_4"]]}), source
  )
  users, requests = recommendation_tables.read_requests(source)
  items, scores = recommender.recommend(requests, k=3)
  recommendation_tables.write(target, recommender, users, items, scores)
  found = pq.read_table(target).to_pylist()
  assert [row["user_id"] for row in found] == ["u-1"] * 3 + ["x"] * 3
  assert [row["rank"] for row in found] == [1, 2, 3] * 2
  assert [row["item_id"] for row in found] == items[0] + items[1]
  titles = recommender.titles(items[0] + items[1])
  assert [row["title"] for row in found] == titles
  want = recommender.recommend([Request(user="u-1")], k=3)
  assert [row["score"] for row in found[:3]] == pytest.approx(want[1][0])
  console = rich.console.Console(width=200, record=True, file=io.StringIO())
  console.print(
    recommendation_tables.as_table(
      recommender, requests[1], items[1], scores[1]
    )
  )
  text = console.export_text()
  assert "For user x, after: Thing 4" in text
  assert all(title in text for title in titles[3:])
  nobody = recommendation_tables.as_table(
    recommender, Request(user="nobody"), items[1], scores[1]
  )
  assert str(nobody.title) == "For user nobody, after: nothing yet"
  shop = recommendation_tables.as_table(
    recommender, Request(user="shop:100:"), items[1], scores[1]
  )
  console.print(shop)
  assert "For user shop:100:, after" in console.export_text()
  pq.write_table(pa.table({"user": ["u-1"]}), source)
  with pytest.raises(ValueError, match="no `user_id`"):
    recommendation_tables.read_requests(source)


def test_tables_of_users_as_they_occur(recommenders, tmp_path):
  """CSV in and out; ids that pandas made floats of beside a null."""
  source = tmp_path / "users.csv"
  source.write_text("user_id,age\nu-1,3\n007,4\nNA,\n")
  users, requests = recommendation_tables.read_requests(source)
  assert users == ["u-1", "007", "NA"]
  assert users == [request.user for request in requests]
  source.write_text("")
  with pytest.raises(ValueError, match="users.csv is no CSV file"):
    recommendation_tables.read_requests(source)
  source.write_text("user_id,history\nu-1,it_1\n")
  with pytest.raises(ValueError, match="a CSV file has no lists"):
    recommendation_tables.read_requests(source)
  floats = tmp_path / "users.parquet"
  pq.write_table(pa.table({"user_id": [1.0, 20.0]}), floats)
  assert recommendation_tables.read_requests(floats)[0] == ["1", "20"]
  folder = tmp_path / "users"
  folder.mkdir()
  floats.rename(folder / "0.parquet")
  assert recommendation_tables.read_requests(folder)[0] == ["1", "20"]
  with pytest.raises(FileNotFoundError, match="none.csv: no such file"):
    recommendation_tables.read_requests(tmp_path / "none.csv")
  other = tmp_path / "users.txt"
  other.write_text("u-1")
  with pytest.raises(ValueError, match="read from .parquet or .csv"):
    recommendation_tables.read_requests(other)

  target = tmp_path / "out.csv"
  recommendation_tables.write(
    target, recommenders["sasrec"], ["a"], [["it_3", "it_0"]], [[0.5, 0.25]]
  )
  assert target.read_text().splitlines() == [
    '"user_id","rank","item_id","score","title"',
    '"a",1,"it_3",0.5,"Thing 3"',
    '"a",2,"it_0",0.25,"it_0"',
  ]
  recommendation_tables.check_output(target)
  with pytest.raises(ValueError, match="ends on .parquet or .csv"):
    recommendation_tables.check_output("out.txt")


def test_unknown_users_of_a_file_are_named_by_their_rows(
  recommenders, tmp_path
):
  source = tmp_path / "users.csv"
  source.write_text("user_id\nu-1\nghost\n")
  _, requests = recommendation_tables.read_requests(source)
  told = "users.csv, row 2: user 'ghost' is not in .*--on_unknown=skip"
  with pytest.raises(ValueError, match=told):
    recommenders["sasrec"].recommend(requests)
  with pytest.warns(UserWarning, match="users.csv, row 2: user 'ghost' is not"):
    recommenders["sasrec"].recommend(requests, on_unknown="skip")
  listed = tmp_path / "users.parquet"
  pq.write_table(
    pa.table({"user_id": ["a", None], "history": [["it_1"], None]}), listed
  )
  with pytest.raises(ValueError, match="users.parquet, row 2: user_id None"):
    recommendation_tables.read_requests(listed)


@pytest.mark.parametrize(
  ("model", "judge", "caption"),
  [
    (None, None, "log-probability of the item by mine"),
    (
      model_configs.SessionDecoderConfig(),
      None,
      "log-probability of its session by mine",
    ),
    (model_configs.SASRecConfig(), None, "mine's own, no probability"),
    (model_configs.TwoTowerConfig(), None, "mine's own, no probability"),
    (None, model_configs.PScoreConfig(), "value by judge of what mine found"),
  ],
)
def test_the_caption_says_who_answers_and_what_scores_are(
  workdir, model, judge, caption
):
  mesh = partitioning.make_mesh(config_lib.MeshConfig())

  def system(name, model):
    config = random_runs.config_of(workdir, name)
    config.model = config.model if model is None else model
    return workflow.assembled(config, workdir)

  # Nothing is asked, so no parameters are needed.
  ranker = judge and ranking.Ranker(system("judge", judge), None, mesh)
  shown = recommendation_tables.as_table(
    Recommender(system("mine", model), None, mesh, ranker=ranker),
    Request(history=["it_1"]),
    ["it_2"],
    [-1.5],
  )
  assert str(shown.caption) == f"score: {caption}"
