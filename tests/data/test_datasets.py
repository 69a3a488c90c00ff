import gzip
import http.client
import io
import pathlib
import urllib.error
import urllib.request
import zipfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec_jax.config import PrepareConfig
from onerec_jax.data import datasets, schema
from onerec_jax.data.datasets import download, movielens

COUNTS = {
  # The README of the real data; latest-small lists 18 movies nobody rated.
  "amazon_beauty": (22_363, 12_101, 198_502),
  "kuairand": (529, 8_279, 33_583),
  "foursquare_nyc": (1_082, 4_988, 113_344),
  "movielens_100k": (943, 1_682, 100_000),
  "movielens_small": (610, 9_742, 100_836),
}


@pytest.mark.parametrize("name", COUNTS)
def test_real_counts(real_data, name):
  folder = real_data(name)
  config = PrepareConfig(dataset=name, data_dir=str(folder.parent))
  tables, skipped = schema.validate(datasets.load(config))
  events = tables.events.read_all()
  users, items, rows = COUNTS[name]
  assert len(events["user_id"].unique()) == users
  assert tables.items.num_rows == items
  assert events.num_rows == rows
  assert not skipped
  assert all(len(digest) == 64 for digest in tables.source["files"].values())
  assert bool(tables.source.get("ordinal_time")) == (name == "amazon_beauty")


def load_real(real_data, name):
  folder = real_data(name)
  return datasets.load(PrepareConfig(dataset=name, data_dir=str(folder)))


def test_movielens_100k_columns(real_data):
  tables = load_real(real_data, "movielens_100k")
  first = tables.events.slice(0, 1).to_pylist()[0]
  assert first == {
    "user_id": "196",
    "item_id": "242",
    "rating": "3",
    "timestamp_ms": 881250949000,
  }
  item = tables.items.slice(0, 1).to_pylist()[0]
  assert item["title"] == "Toy Story"
  assert item["text"] == "Toy Story 1995 Animation Children's Comedy"
  assert item["category"] == "Animation Children's Comedy"
  assert tables.users.slice(0, 1).to_pylist()[0] == {
    "user_id": "1",
    "age": "20",
    "gender": "M",
    "occupation": "technician",
  }


def test_opinions_of_movielens_are_its_ratings(real_data):
  """4 and 5 are likes, 1 and 2 dislikes; nothing else changes."""
  folder = real_data("movielens_100k").parent
  rated, flagged = (
    datasets.load(PrepareConfig(dataset=name, data_dir=str(folder)))
    for name in ("movielens_100k", "movielens_opinions")
  )
  of = {"5": "like", "4": "like", "3": "", "2": "dislike", "1": "dislike"}
  want = [of[rating] for rating in rated.events["rating"].to_pylist()]
  for name in ("like", "dislike"):
    found = flagged.events[name].to_pylist()
    assert found == [opinion == name for opinion in want]
  kept = ["user_id", "item_id", "timestamp_ms"]
  assert flagged.events.select(kept).equals(rated.events.select(kept))
  assert flagged.items.equals(rated.items)
  assert set(flagged.events.column_names) == {*kept, "like", "dislike"}


def test_kuairand_feedback_and_durations(real_data):
  tables = load_real(real_data, "kuairand")
  like, dislike = (
    tables.events[name].to_numpy(zero_copy_only=False)
    for name in ("like", "dislike")
  )
  np.testing.assert_array_equal(like, ~dislike)
  lines = (real_data("kuairand") / "liked_or_hated.tsv").read_text()
  assert like.sum() == sum(row.split("\t")[14] == "1" for row in
                           lines.splitlines()[1:])  # fmt: skip
  durations = tables.items["duration_ms"]
  assert 0 not in durations.to_pylist()
  assert durations.null_count > 0


def test_beauty_text(real_data):
  item = load_real(real_data, "amazon_beauty").items.slice(0, 1).to_pylist()[0]
  assert item["author_id"] == "OPI"
  assert item["category"] == "Nail Polish"
  assert item["title"] == "nail lacquer simmer and shimmer"
  assert item["text"] == (
    "nail lacquer simmer and shimmer. OPI. Makeup. Nails. Nail Polish"
  )


def test_foursquare_takes_the_most_frequent_category(tmp_path):
  rows = ["user_idx,poi_idx,cat,lat,lon,unix_s,hour,dow,traj_id,block"]
  for category in ("Bar", "Food", "Food"):
    rows.append(f"0,7,{category},40.5,-73.5,1333909229,14,6,1_2,T0")
  with gzip.open(tmp_path / "checkins.csv.gz", "wt") as file:
    file.write("\n".join(rows) + "\n")
  config = PrepareConfig(dataset="foursquare_nyc", data_dir=str(tmp_path))
  tables = datasets.load(config)
  assert tables.items.to_pylist() == [
    {
      "item_id": 7,
      "text": "Food",
      "category": "Food",
      "latitude": 40.5,
      "longitude": -73.5,
    }
  ]
  assert tables.events["timestamp_ms"].to_pylist() == [1333909229000] * 3


def test_other_amazon_sets_and_a_broken_line(tmp_path):
  folder = tmp_path / "amazon_toys"
  folder.mkdir()
  (folder / "sequences.txt").write_text("u1 2 1\nu2 1\n")
  item = '{"item_id": %d, "short_text": "a ball", "attributes": ["Unknown"]}\n'
  (folder / "items.jsonl").write_text(item % 1 + item % 2)
  config = PrepareConfig(dataset="amazon_toys", data_dir=str(tmp_path))
  tables = datasets.load(config)
  assert tables.events.to_pydict() == {
    "user_id": ["u1", "u1", "u2"],
    "item_id": ["2", "1", "1"],
  }
  assert tables.items["author_id"].to_pylist() == [None, None]
  assert tables.items["category"].to_pylist() == [None, None]
  (folder / "items.jsonl").write_text(item % 1 + "{\n")
  with pytest.raises(schema.TableError, match=r"items.jsonl, row 2"):
    datasets.load(config)


def test_unknown_name():
  with pytest.raises(ValueError, match="unknown data set 'movielens'.*tables"):
    datasets.load(PrepareConfig(dataset="movielens"))


# Where files come from.

SOURCE = download.Source("set", ("a.txt",), "free, cite nobody")


def test_places_in_order(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  monkeypatch.setenv("ONEREC_DATA", str(tmp_path / "env"))
  places = [
    tmp_path / "cache" / "onerec_jax" / "set",
    tmp_path / "env" / "set",
    tmp_path / "dir" / "set",
    tmp_path / "dir",
  ]
  with pytest.raises(FileNotFoundError, match="--config.prepare.data_dir"):
    download.find(SOURCE, str(tmp_path / "dir"))
  for place in places:
    place.mkdir(parents=True, exist_ok=True)
    (place / "a.txt").write_text("a")
    assert download.find(SOURCE, str(tmp_path / "dir")) == place
  printed = capsys.readouterr().err
  assert printed.count("free, cite nobody") == len(places)
  assert f"tried {places[1]}: no such folder" in printed


def test_mirrors_are_checked_and_kept(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.delenv("ONEREC_DATA", raising=False)
  calls = []

  def offline(folder):
    calls.append("offline")
    raise urllib.error.URLError("no route")

  def wrong(folder):
    calls.append("wrong")
    (folder / "a.txt").write_text("b")

  def right(folder):
    calls.append("right")
    (folder / "a.txt").write_text("a")

  digest = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
  mirrors = {"one": offline, "two": wrong}
  source = download.Source("set", ("a.txt",), "", {"a.txt": digest}, mirrors)
  with pytest.raises(FileNotFoundError, match="no route") as error:
    download.find(source)
  assert f"expected {digest}" in str(error.value)
  assert not (tmp_path / "onerec_jax" / "set").exists()
  mirrors["three"] = right
  folder = download.find(source)
  assert (folder / "a.txt").read_text() == "a"
  assert download.find(source) == folder  # from the cache now
  assert calls == ["offline", "wrong", "offline", "wrong", "right"]
  assert "downloading from three" in capsys.readouterr().err


class Torn(io.BytesIO):
  """An answer that stops half-way."""

  def read(self, *args):
    raise http.client.IncompleteRead(b"half", 96)


def test_a_torn_download_tries_the_next_mirror(tmp_path, monkeypatch, capsys):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.delenv("ONEREC_DATA", raising=False)
  answers = {"http://one": Torn(), "http://two": io.BytesIO(b"a")}
  monkeypatch.setattr(
    urllib.request, "urlopen", lambda url, timeout: answers[url]
  )
  mirrors = {
    url: lambda folder, url=url: download.fetch_url(url, folder / "a.txt")
    for url in answers
  }
  source = download.Source("set", ("a.txt",), "", {}, mirrors)
  folder = download.find(source)
  assert (folder / "a.txt").read_text() == "a"
  assert "tried http://one: IncompleteRead" in capsys.readouterr().err


def test_every_file_of_movielens_is_checked(real_data, tmp_path):
  real = real_data("movielens_100k")
  source = movielens.SOURCE_100K
  assert set(source.sha256) == set(source.files)
  assert set(movielens.SOURCE_SMALL.sha256) == set(movielens.SOURCE_SMALL.files)
  for name in source.files:
    (tmp_path / name).write_bytes((real / name).read_bytes())
  assert not download._problem(source, tmp_path)
  for name in source.files:
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content.replace(b"1", b"2", 1))
    assert f"{name} has sha256" in download._problem(source, tmp_path)
    (tmp_path / name).write_bytes(content)


def test_the_sites_files_become_the_same_atomic_files(real_data, tmp_path):
  """Rewrites the atomic files in the site's own format, then back."""
  folder = real_data("movielens_100k")
  events, items, users = (
    (folder / name).read_text(encoding="utf-8").splitlines()[1:]
    for name in movielens.SOURCE_100K.files
  )
  genres = movielens._GENRES

  def site_item(line):
    number, title, year, names = line.split("\t")
    # As they stand there: no year, and a blank after one.
    title = "unknown" if number == "267" else f"{title} ({year})"
    title += " " * (number == "1635")
    flags = "|".join(str(int(g in names.split(" "))) for g in genres)
    return f"{number}|{title}|01-Jan-{year}||http://x|{flags}"

  (tmp_path / "u.data").write_text("\n".join(events) + "\n")
  (tmp_path / "u.user").write_text(
    "\n".join(line.replace("\t", "|") for line in users) + "\n"
  )
  (tmp_path / "u.item").write_text(
    "\n".join(map(site_item, items)) + "\n", encoding="latin-1"
  )
  movielens.to_atomic(tmp_path)
  for name in movielens.SOURCE_100K.files:
    assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()
  assert not download._problem(movielens.SOURCE_100K, tmp_path)


def test_unzip_names_what_is_missing(tmp_path):
  archive = tmp_path / "a.whl"
  with zipfile.ZipFile(archive, "w") as file:
    file.writestr("x/one", "1")
  download.unzip(archive, {"x/one": "1.txt"}, tmp_path)
  assert (tmp_path / "1.txt").read_text() == "1"
  with pytest.raises(ValueError, match="a.whl.*x/two"):
    download.unzip(archive, {"x/two": "2.txt"}, tmp_path)
  archive.write_text("no zip")
  with pytest.raises(ValueError, match="a.whl"):
    download.unzip(archive, {"x/one": "1.txt"}, tmp_path)


# Your own tables.


def own(tmp_path, events, name="log.csv", **fields):
  path = tmp_path / name
  if isinstance(events, str):
    opener = gzip.open if name.endswith(".gz") else open
    with opener(path, "wt") as file:
      file.write(events)
  else:
    pq.write_table(pa.table(events), path)
  config = PrepareConfig(dataset="tables", events=str(path), **fields)
  tables = datasets.load(config)
  checked, skipped = schema.validate(tables, config.on_bad_row)
  return tables, checked.events.read_all().to_pydict(), skipped


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.csv.gz", "a.parquet"])
def test_formats_agree(tmp_path, name):
  events = {
    "user_id": ["u1", "NA"],
    "item_id": ["007", "8"],
    "timestamp_ms": [5, 6],
    "rating": [1.5, None],
  }
  if name != "a.parquet":
    text = "user_id,item_id,timestamp_ms,rating\nu1,007,5,1.5\nNA,8,6,\n"
    events_ = text.replace(",", "\t") if "tsv" in name else text
  else:
    events_ = events
  tables, rows, _ = own(tmp_path, events_, name)
  assert rows == events | {"source_row": [1, 2]}
  assert list(tables.source["files"]) == [f"events/{name}"]


def test_parquet_folder_is_read_in_order_of_names(tmp_path):
  for name, user in (("b", "2"), ("a", "1")):
    pq.write_table(
      pa.table({"user_id": [user], "item_id": ["i"]}),
      tmp_path / f"{name}.parquet",
    )
  config = PrepareConfig(dataset="tables", events=str(tmp_path))
  tables = datasets.load(config)
  assert tables.source["ordinal_time"]
  assert "order of rows" in tables.source["notes"][0]
  assert tables.events.read_all()["user_id"].to_pylist() == ["1", "2"]


def test_a_row_of_the_wrong_width(tmp_path):
  text = "user_id,item_id\nu,1\nu,2,3\nu,4\n"
  with pytest.raises(
    schema.TableError, match="log.csv, row 2: 3 fields.*u,2,3"
  ):
    own(tmp_path, text)
  _, rows, skipped = own(tmp_path, text, on_bad_row="skip")
  assert rows["item_id"] == ["1", "4"]
  assert skipped == {"events: wrong number of fields": 1}


UTF8 = "user_id,item_id,note\nu,1,caf\u00e9\n"
LATE = "user_id,item_id,note\n" + "u,1,a\n" * 20_000 + "u,1,caf\u00e9\n"


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize("kind", ["events", "items"])
@pytest.mark.parametrize(
  ("text", "encoding"),
  [
    (UTF8, "latin-1"),
    (UTF8.replace("note", "caf\u00e9"), "latin-1"),
    (UTF8, "utf-16"),
    (LATE, "latin-1"),  # beyond what is read for the header
  ],
)
def test_text_that_is_not_utf8(tmp_path, text, encoding, kind, suffix):
  good = tmp_path / "good.csv"
  good.write_text("user_id,item_id\nu,1\n")
  path = tmp_path / f"bad.csv{suffix}"
  with (gzip.open if suffix else open)(path, "wb") as file:
    file.write(text.encode(encoding))
  given = {"events": str(good)} | {kind: str(path)}
  with pytest.raises(schema.TableError, match="not UTF-8.*iconv") as error:
    datasets.load(PrepareConfig(dataset="tables", **given)).events.read_all()
  assert str(error.value).startswith(f"{path}: ")


@pytest.mark.parametrize(
  ("name", "text", "error", "match"),
  [
    ("a.xlsx", "", ValueError, "cannot read '.xlsx'"),
    ("a.csv", "", schema.TableError, "a.csv: empty"),
  ],
)
def test_files_that_are_not_tables(tmp_path, name, text, error, match):
  with pytest.raises(error, match=match):
    own(tmp_path, text, name)


def test_missing_files(tmp_path):
  config = PrepareConfig(dataset="tables", events=str(tmp_path / "no.csv"))
  with pytest.raises(FileNotFoundError, match="--config.prepare.events"):
    datasets.load(config)
  with pytest.raises(ValueError, match="--config.prepare.events=FILE"):
    datasets.load(PrepareConfig(dataset="tables"))
  empty = pathlib.Path(tmp_path / "empty")
  empty.mkdir()
  with pytest.raises(FileNotFoundError, match="holds no .parquet"):
    datasets.load(PrepareConfig(dataset="tables", events=str(empty)))
