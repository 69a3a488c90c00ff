"""Users in, recommendations out, as tables in files and on a screen."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rich.console

from onerec_jax.inference import recommendation_tables
from onerec_jax.inference.recommender import Request


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
