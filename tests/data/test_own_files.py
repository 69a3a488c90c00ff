"""Files a user may well give: folders, separators, times of another name."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec_jax.config import PrepareConfig
from onerec_jax.data import datasets, schema


def load(path):
  """Events as they are checked, and the notes on them."""
  tables = datasets.load(PrepareConfig(dataset="tables", events=str(path)))
  checked, _ = schema.validate(tables)
  return checked.events.read_all().to_pydict(), tables.source["notes"]


def write(folder, **files):
  """Parquet files of columns, by name; double underscores are subfolders."""
  for name, columns in files.items():
    path = folder / f"{name.replace('__', '/')}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
  return folder


A = {"user_id": ["u"], "item_id": ["x"], "timestamp_ms": [1]}
B = {"user_id": ["v"], "item_id": ["y"], "timestamp_ms": [2]}


def test_the_columns_of_a_folder_are_those_of_all_its_files(tmp_path):
  files = {
    "a": A,
    "b": B | {"rating": [4], "mood": ["good"]},
    "c": A | {"rating": [2.5], "like": [True]},
  }
  found, notes = load(write(tmp_path, **files))
  assert found == {
    "user_id": ["u", "v", "u"],
    "item_id": ["x", "y", "x"],
    "timestamp_ms": [1, 2, 1],
    "rating": [None, 4.0, 2.5],
    "mood": [None, "good", None],
    "like": [None, None, True],
    "source_row": [1, 2, 3],
  }
  assert notes == []


def test_times_that_one_file_lacks_are_missing_there(tmp_path):
  late = {name: B[name] for name in ("user_id", "item_id")}
  with pytest.raises(schema.TableError, match="row 2, .*_ms': missing"):
    load(write(tmp_path, a=A, b=late))


@pytest.mark.parametrize("first", ["a", "b"])
def test_categories_in_one_file_are_strings_in_another(tmp_path, first):
  mood = {"mood": pa.array(["good"]).dictionary_encode()}
  files = {"a": A | {"mood": ["bad"]}, "b": B | mood}
  other = "b" if first == "a" else "a"
  found, _ = load(write(tmp_path, **{"1": files[first], "2": files[other]}))
  expected = ["bad", "good"]
  assert found["mood"] == (expected if first == "a" else expected[::-1])


@pytest.mark.parametrize(
  ("values", "match"),
  [
    (
      {"item_id": [7.5]},
      "b.parquet: its columns do not go .*item_id.*one type",
    ),
    ({"timestamp_ms": [2.0**60]}, "one type in all files"),
  ],
)
def test_types_that_do_not_go_together(tmp_path, values, match):
  # 2^60 + 1 is no float.
  first = A | {"timestamp_ms": [2**60 + 1]}
  with pytest.raises(schema.TableError, match=match) as error:
    load(write(tmp_path, a=first, b=B | values))
  assert str(tmp_path) in str(error.value)


def test_ids_and_flags_of_several_types_are_what_they_mean(tmp_path):
  """Numbers beside text, and 0 or 1 beside true or false, in either order."""
  text = A | {"user_id": ["u"], "like": [True]}
  number = A | {"user_id": [7], "like": [0]}
  for place, (one, other) in enumerate([(text, number), (number, text)]):
    found, _ = load(write(tmp_path / str(place), a=one, b=other))
    assert sorted(found["user_id"]) == ["7", "u"]
    assert sorted(found["like"]) == [False, True]


@pytest.mark.parametrize(
  "files",
  [
    {"year=2020__part": A},
    {"part": A, "year=2020__part": B},
    {"part": A, "year=2020__month=1__part": B},
  ],
)
def test_subfolders_are_refused(tmp_path, files):
  with pytest.raises(
    schema.TableError, match="subfolders are not read, and year=2020/.*part.pa"
  ):
    load(write(tmp_path, **files))


def test_subfolders_of_other_programs_are_no_matter(tmp_path):
  (tmp_path / "images").mkdir()
  (tmp_path / "images" / "a.png").write_bytes(b"")
  write(tmp_path / "_temporary", a=B)
  found, _ = load(write(tmp_path, a=A))
  assert found["user_id"] == ["u"]


@pytest.mark.parametrize(
  ("name", "header", "match"),
  [
    ("a.csv", "user_id;item_id;timestamp", "separated by semicolons; commas"),
    ("a.csv", "user_id|item_id|timestamp", "separated by bars; commas are"),
    ("a.csv", "user_id\titem_id\ttimestamp", "by tabs; commas.* tabs as .tsv"),
    ("a.tsv", "user_id,item_id,timestamp", "by commas; tabs are read"),
    ("a.tsv", "user_id;item_id;timestamp", "by semicolons; tabs are read"),
  ],
)
def test_another_separator_is_named(tmp_path, name, header, match):
  path = tmp_path / name
  path.write_text(f"{header}\n1,2,3\n")
  with pytest.raises(schema.TableError, match=match) as error:
    load(path)
  assert str(error.value).startswith(f"{path}: its first line is one column")


def test_a_file_of_one_column_is_read(tmp_path):
  events, items = tmp_path / "events.csv", tmp_path / "items.csv"
  events.write_text("user_id,item_id\nu,x\n")
  items.write_text("item_id\nx\n")
  config = PrepareConfig(dataset="tables", events=str(events), items=str(items))
  assert datasets.load(config).items.to_pydict() == {"item_id": ["x"]}


@pytest.mark.parametrize(
  ("columns", "expected"),
  [
    ("", "no column of times: the order of rows is used"),
    (",rating,stage_a", "no column of times: the order of rows is used"),
    (
      ",ts,rating,datetime",
      "no column of times: the order of rows is used; not used: ts, datetime; "
      "if one of these holds times, name it timestamp (dates or seconds) or "
      "timestamp_ms",
    ),
  ],
)
def test_without_times_the_columns_that_are_not_used_are_told(
  tmp_path, columns, expected
):
  path = tmp_path / "events.csv"
  path.write_text(f"user_id,item_id{columns}\nu,x{columns.count(',') * ',1'}\n")
  found, notes = load(path)
  assert notes == [expected]
  assert found["timestamp_ms"] == [1]
