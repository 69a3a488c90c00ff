"""KuaiRand: rows of the standard log that the user liked or hated.

Not an exposure log: every row has a strong signal, so rates are not natural.
`label` 1 is a like, 0 a dislike. A duration of 0 is unknown; an item's is the
most frequent known one among its rows. Authors and tags are known for the few
videos that stand in `video_features_basic.csv`.
"""

import collections
import pathlib

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from onerec_jax.config import PrepareConfig
from onerec_jax.data import schema
from onerec_jax.data.datasets import download

_FILES = (
  "liked_or_hated.tsv",
  "user_features.csv",
  "video_features_basic.csv",
)
SOURCE = download.Source(
  name="kuairand",
  files=_FILES,
  licence=(
    "KuaiRand: CC BY-SA 4.0, cite Gao et al. 2022 (https://kuairand.com)"
  ),
)
_FLAGS = {
  "is_click": "click",
  "is_follow": "follow",
  "is_comment": "comment",
  "is_forward": "forward",
  "is_profile_enter": "profile_enter",
  "long_view": "long_view",
}
# The counts themselves stand there too; their ranges are enough to embed.
_USER_COLUMNS = (
  "user_active_degree",
  "is_lowactive_period",
  "is_live_streamer",
  "is_video_author",
  "follow_user_num_range",
  "fans_user_num_range",
  "friend_user_num_range",
  "register_days_range",
  *(f"onehot_feat{i}" for i in range(18)),
)


def load(config: PrepareConfig) -> schema.Tables:
  """Interactions, videos and users."""
  folder = download.find(SOURCE, config.data_dir)
  log = pacsv.read_csv(
    folder / _FILES[0], parse_options=pacsv.ParseOptions(delimiter="\t")
  )
  users = _strings(folder / _FILES[1])
  videos = _strings(folder / _FILES[2])
  like = pc.equal(log["label"], 1)
  events = pa.table(
    {
      "user_id": log["user_id"],
      "item_id": log["video_id"],
      "timestamp_ms": log["time_ms"],
      "play_time_ms": log["play_time_ms"],
      **{ours: log[theirs] for theirs, ours in _FLAGS.items()},
      "like": like,
      "dislike": pc.invert(like),
      # For conditions in prepare.where.
      "log_date": log["date"],
      "comment_stay_time": log["comment_stay_time"],
    }
  )
  items, joined = _items(log, videos)
  source = {
    "events": str(folder / _FILES[0]),
    "users": str(folder / _FILES[1]),
    "items": str(folder / _FILES[2]),
    "files": download.sha256s(folder, _FILES),
    "notes": [
      "not an exposure log: rates are not natural",
      f"{joined} of {items.num_rows} videos have author and tag",
    ],
  }
  users = users.select(["user_id", *_USER_COLUMNS])
  return schema.Tables(events, items, users, source)


def _items(log: pa.Table, videos: pa.Table) -> tuple[pa.Table, int]:
  """Videos of the log by first appearance, and how many are described."""
  durations: dict[int, collections.Counter[int]] = {}
  for video, duration in zip(
    log["video_id"].to_pylist(), log["duration_ms"].to_pylist()
  ):
    counts = durations.setdefault(video, collections.Counter())
    if duration > 0:
      counts[duration] += 1
  ids = pa.array(durations, pa.int64()).cast(pa.string())
  # Of equally frequent durations the larger, so that row order is no matter.
  best = [
    max(c, key=lambda d, c=c: (c[d], d)) if c else None
    for c in durations.values()
  ]
  rows = pc.index_in(ids, value_set=videos["video_id"].combine_chunks())
  items = pa.table(
    {
      "item_id": ids,
      "duration_ms": pa.array(best, pa.int64()),
      "author_id": videos["author_id"].take(rows),
      "category": videos["tag"].take(rows),
    }
  )
  return items, len(rows) - rows.null_count


def _strings(path: pathlib.Path) -> pa.Table:
  """A CSV file with every column as strings; empty is null."""
  with open(path, encoding="utf-8") as file:
    names = file.readline().rstrip("\n").split(",")
  types = dict.fromkeys(names, pa.string())
  options = pacsv.ConvertOptions(
    column_types=types, strings_can_be_null=True, null_values=[""]
  )
  return pacsv.read_csv(path, convert_options=options)
