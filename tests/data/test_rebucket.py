"""A log prepared anew, in the codes of the data a model was trained on."""

import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax.data import prepare, rebucket, shards

CATEGORY = ["red", "red", "blue", "green", "green", "grey"]
CITY = {"a": "x", "b": "y", "c": "z"}


def _prepared(folder, events, items="category"):
  """Events are (user, item); the users' city and items' category are coded."""
  folder.mkdir()
  lines = [
    f"{user},i{item},{10**12 + place * 1000}"
    for place, (user, item) in enumerate(events)
  ]
  head = "user_id,item_id,timestamp_ms\n"
  (folder / "events.csv").write_text(head + "\n".join(lines) + "\n")
  rows = [f"i{i},{name}" for i, name in enumerate(CATEGORY)]
  (folder / "items.csv").write_text(f"item_id,{items}\n" + "\n".join(rows))
  rows = [f"{user},{city}" for user, city in CITY.items()]
  (folder / "users.csv").write_text("user_id,city\n" + "\n".join(rows))
  config = config_lib.PrepareConfig(
    dataset="tables", split="time", num_shards=2,
    validation_from_ms=2 * 10**12, test_from_ms=2 * 10**12,
    **{n: str(folder / f"{n}.csv") for n in ("events", "items", "users")},
  )  # fmt: skip
  return shards.PreparedData.open(prepare.prepare(config, folder))


def test_codes_are_those_of_the_older_data(tmp_path):
  few = [("a", 0), ("a", 1), ("a", 2), ("b", 0)]
  more = [*few, *[("b", 3), ("c", 4)] * 5, ("c", 2), ("a", 5)]
  old = _prepared(tmp_path / "old", few)
  new = _prepared(tmp_path / "new", more)
  spec = lambda data: data.manifest["bucketing"]["item"]["category"]["values"]
  # More events turn the codes round and add some: the case is a real one.
  assert spec(old) == ["red", "blue"]
  assert spec(new)[0] == "green"
  found = shards.PreparedData.open(
    rebucket.rebucket(new, old.manifest, tmp_path / "out")
  )
  known = {"red": 1, "blue": 2}
  expected = [0, *(known.get(name, 0) for name in CATEGORY)]
  assert found.item_features()["category"].tolist() == expected
  cities = old.manifest["bucketing"]["user"]["city"]["values"]
  for place, raw in enumerate(found.users["raw_id"].to_pylist()):
    record, was = found.user(place), new.user(place)
    city = CITY[raw]
    code = cities.index(city) + 1 if city in cities else 0
    assert record.user_features == {"city": code}
    assert found.users["feature_city"][place].as_py() == code
    np.testing.assert_array_equal(record.items, was.items)
    np.testing.assert_array_equal(record.timestamps, was.timestamps)
  assert found.manifest["bucketing"] == old.manifest["bucketing"]
  assert found.manifest["item_features"] == {"category": 3}
  np.testing.assert_array_equal(found.item_counts, new.item_counts)


def test_other_features_are_refused(tmp_path):
  old = _prepared(tmp_path / "old", [("a", 0), ("b", 1)])
  new = _prepared(tmp_path / "new", [("a", 0), ("b", 1)], "kind")
  with pytest.raises(ValueError, match=r"item features \['category'\] of"):
    rebucket.rebucket(new, old.manifest, tmp_path / "out")
