"""MovieLens 100K (RecBole's atomic files) and MovieLens latest-small.

100K also comes from its own site as `ml-100k.zip`; `u.data`, `u.item` and
`u.user` are then rewritten as the atomic files, byte for byte the same, and
checked so: a result is one whichever mirror the files came from.

`movielens_opinions` is 100K with flags for ratings: 4 and 5 are a like, 1 and 2
a dislike, 3 is neither.

The tags of latest-small are left out: users wrote them at some time, many
after the events one would predict, so as item text they would leak.
"""

import pathlib
import re

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from onerec_jax.config import PrepareConfig
from onerec_jax.data import schema
from onerec_jax.data.datasets import download

_CITE = (
  "non-commercial use, cite Harper and Konstan 2015 "
  "(https://doi.org/10.1145/2827872)"
)
_100K = ("ml-100k.inter", "ml-100k.item", "ml-100k.user")
_100K_URL = "https://files.grouplens.org/datasets/movielens/ml-100k.zip"
_100K_MD5 = "0e33842e24a9c977be4e0107933c0723"
_SMALL = ("ratings.csv", "movies.csv")
_SMALL_URL = (
  "https://files.grouplens.org/datasets/movielens/ml-latest-small.zip"
)
_GENRES = (
  "unknown",
  "Action",
  "Adventure",
  "Animation",
  "Children's",
  "Comedy",
  "Crime",
  "Documentary",
  "Drama",
  "Fantasy",
  "Film-Noir",
  "Horror",
  "Musical",
  "Mystery",
  "Romance",
  "Sci-Fi",
  "Thriller",
  "War",
  "Western",
)


def load(config: PrepareConfig) -> schema.Tables:
  """Ratings, movies and (100K) users of one of the sets."""
  if config.dataset == "movielens_small":
    return _load_small(config)
  folder = download.find(SOURCE_100K, config.data_dir)
  events = _atomic(folder / _100K[0])
  items = _atomic(folder / _100K[1])
  users = _atomic(folder / _100K[2])
  seconds = events["timestamp"].cast(pa.float64())
  events = events.drop(["timestamp"]).append_column(
    "timestamp_ms", pc.multiply(seconds, 1000.0).cast(pa.int64())
  )
  if config.dataset == "movielens_opinions":
    rating = events["rating"].cast(pa.float64())
    events = (
      events.drop(["rating"])
      .append_column("like", pc.greater_equal(rating, 4.0))
      .append_column("dislike", pc.less_equal(rating, 2.0))
    )
  title, year, genres = (
    items[name] for name in ("movie_title", "release_year", "class")
  )
  items = pa.table(
    {
      "item_id": items["item_id"],
      "title": title,
      "text": pc.binary_join_element_wise(title, year, genres, " "),
      "category": genres,
      "release_year": year,
    }
  )
  decade = pc.multiply(pc.divide(users["age"].cast(pa.int64()), 10), 10)
  users = pa.table(
    {
      "user_id": users["user_id"],
      "age": decade.cast(pa.string()),
      "gender": users["gender"],
      "occupation": users["occupation"],
    }
  )
  source = {
    "events": str(folder / _100K[0]),
    "items": str(folder / _100K[1]),
    "users": str(folder / _100K[2]),
    "files": download.sha256s(folder, _100K),
    "notes": ["age is its decade; zip codes are left out"],
  }
  return schema.Tables(events, items, users, source)


def _load_small(config: PrepareConfig) -> schema.Tables:
  folder = download.find(SOURCE_SMALL, config.data_dir)
  ratings = pacsv.read_csv(folder / _SMALL[0])
  movies = pacsv.read_csv(folder / _SMALL[1])
  events = pa.table(
    {
      "user_id": ratings["userId"],
      "item_id": ratings["movieId"],
      "rating": ratings["rating"],
      "timestamp_ms": pc.multiply(ratings["timestamp"], 1000),
    }
  )
  genres = pc.replace_substring(movies["genres"], "|", " ")
  items = pa.table(
    {
      "item_id": movies["movieId"],
      "title": movies["title"],
      "text": pc.binary_join_element_wise(movies["title"], genres, " "),
      "category": genres,
    }
  )
  source = {
    "events": str(folder / _SMALL[0]),
    "items": str(folder / _SMALL[1]),
    "files": download.sha256s(folder, _SMALL),
    "notes": ["tags are left out: users wrote them after the fact"],
  }
  return schema.Tables(events, items, None, source)


def _atomic(path: pathlib.Path) -> pa.Table:
  """A tab-separated file with `name:type` headers, all as strings."""
  with open(path, encoding="utf-8") as file:
    header = file.readline().rstrip("\n").split("\t")
  table = pacsv.read_csv(
    path,
    parse_options=pacsv.ParseOptions(delimiter="\t", quote_char=False),
    convert_options=pacsv.ConvertOptions(
      column_types=dict.fromkeys(header, pa.string())
    ),
  )
  return table.rename_columns([name.split(":")[0] for name in header])


def _fetch_100k_site(folder: pathlib.Path) -> None:
  archive = folder / "ml-100k.zip"
  download.fetch_url(_100K_URL, archive, _100K_MD5)
  names = ("u.data", "u.item", "u.user")
  download.unzip(archive, {f"ml-100k/{n}": n for n in names}, folder)
  to_atomic(folder)
  for name in (archive.name, *names):
    (folder / name).unlink()


def to_atomic(folder: pathlib.Path) -> None:
  """Rewrites u.data, u.item and u.user as the three atomic files."""

  def rows(name: str, separator: str) -> list[list[str]]:
    text = (folder / name).read_text(encoding="latin-1")
    return [line.split(separator) for line in text.splitlines() if line]

  items = []
  for fields in rows("u.item", "|"):
    # "Toy Story (1995)". RecBole takes whatever stands in the last brackets
    # for the year, also the "V" of the one video, "… (1995) (V)", and spells
    # the one item without brackets so.
    match = re.fullmatch(r"(.*?)\s*\(([^()]*)\)\s*", fields[1])
    title, year = match.groups() if match else ("unkonwn", "unkonwn")
    kinds = [g for g, flag in zip(_GENRES, fields[5:]) if flag == "1"]
    items.append([fields[0], title, year, " ".join(kinds)])
  _write_atomic(
    folder / _100K[0],
    "user_id:token item_id:token rating:float timestamp:float",
    rows("u.data", "\t"),
  )
  _write_atomic(
    folder / _100K[1],
    "item_id:token movie_title:token_seq release_year:token class:token_seq",
    items,
  )
  _write_atomic(
    folder / _100K[2],
    "user_id:token age:token gender:token occupation:token zip_code:token",
    rows("u.user", "|"),
  )


def _write_atomic(
  path: pathlib.Path, header: str, rows: list[list[str]]
) -> None:
  lines = ["\t".join(row) for row in [header.split(), *rows]]
  path.write_text("\n".join(lines) + "\n", encoding="utf-8", newline="\n")


def _fetch_100k_wheel(folder: pathlib.Path) -> None:
  wheel = download.fetch_wheel("recbole==1.2.1", folder)
  prefix = "recbole/dataset_example/ml-100k/"
  download.unzip(wheel, {prefix + name: name for name in _100K}, folder)
  wheel.unlink()


def _fetch_small(folder: pathlib.Path) -> None:
  archive = folder / "ml-latest-small.zip"
  download.fetch_url(_SMALL_URL, archive)
  prefix = "ml-latest-small/"
  download.unzip(archive, {prefix + name: name for name in _SMALL}, folder)
  archive.unlink()


SOURCE_100K = download.Source(
  name="movielens_100k",
  files=_100K,
  licence=f"MovieLens 100K: {_CITE}",
  sha256={
    "ml-100k.inter": (
      "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff"
    ),
    "ml-100k.item": (
      "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532"
    ),
    "ml-100k.user": (
      "4f670007d9cfbeb9807e757209af1555b9bcc186bde25e767f67cb67c6dd5972"
    ),
  },
  mirrors={
    _100K_URL: _fetch_100k_site,
    "the copy inside the recbole 1.2.1 wheel": _fetch_100k_wheel,
  },
)
SOURCE_SMALL = download.Source(
  name="movielens_small",
  files=_SMALL,
  licence=f"MovieLens latest-small: {_CITE}",
  sha256={
    "ratings.csv": (
      "aa289ca83157595d0df6aea1be6a4ded676ddc4385472e8313a8ed9805352646"
    ),
    "movies.csv": (
      "5a5f32dd9bb3797b8e728a1b98958789d2b13f294a69fdfbc5727f8a9611aa07"
    ),
  },
  mirrors={_SMALL_URL: _fetch_small},
)
