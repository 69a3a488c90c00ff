"""Foursquare: check-ins in New York with places and their categories.

A place that carries several categories gets its most frequent one (of equals
the first met). Coordinates belong to places: those of the user are unknown.
`block` (T0 … T5, in time), `traj_id`, `hour` and `dow` (local time) are kept
for conditions in prepare.where.
"""

import collections

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from onerec_jax.config import PrepareConfig
from onerec_jax.data import schema
from onerec_jax.data.datasets import download

_FILE = "checkins.csv.gz"
SOURCE = download.Source(
  name="foursquare_nyc",
  files=(_FILE,),
  licence=(
    "Foursquare NYC: academic use, cite Yang et al. 2014 "
    "(https://doi.org/10.1109/TSMC.2014.2327053)"
  ),
)


def load(config: PrepareConfig) -> schema.Tables:
  """Check-ins and places."""
  folder = download.find(SOURCE, config.data_dir)
  log = pacsv.read_csv(folder / _FILE)
  events = pa.table(
    {
      "user_id": log["user_idx"],
      "item_id": log["poi_idx"],
      "timestamp_ms": pc.multiply(log["unix_s"].cast(pa.int64()), 1000),
      **{name: log[name] for name in ("block", "traj_id", "hour", "dow")},
    }
  )
  source = {
    "events": str(folder / _FILE),
    "items": str(folder / _FILE),
    "files": download.sha256s(folder, [_FILE]),
  }
  return schema.Tables(events, _places(log), None, source)


def _places(log: pa.Table) -> pa.Table:
  """One row a place, by place number."""
  categories: dict[int, collections.Counter[str]] = {}
  where: dict[int, tuple[float, float]] = {}
  columns = (log[name].to_pylist() for name in ("poi_idx", "cat", "lat", "lon"))
  for place, category, latitude, longitude in zip(*columns):
    categories.setdefault(place, collections.Counter())[category] += 1
    where.setdefault(place, (latitude, longitude))
  places = sorted(categories)
  names = [categories[place].most_common(1)[0][0] for place in places]
  return pa.table(
    {
      "item_id": pa.array(places, pa.int64()),
      "text": names,
      "category": names,
      "latitude": [where[place][0] for place in places],
      "longitude": [where[place][1] for place in places],
    }
  )
