"""What the manifest of prepared data says of how it was made.

format_version fingerprint dataset split inputs notes
prepare              the settings of config.prepare, but for places of files
num_users num_items num_events
split_events         events of train, validation and test
split_boundaries_ms  null unless split by time
short_users          users of fewer than three events: training only
skipped_rows         bad rows left out, by `<table>.<column>: <reason>`
dropped_events       by where, duplicate_event, min_item_events and
                     min_user_events, in this order
dropped_users        users left without events
eventless_users      rows of the user table that no event names
unused_columns       event columns that are in no record
signals              what was measured of exposures, in records' order
positive             condition that marks positive events
marked_events        events marked positive, and those of marked sessions
ordinal_time         true: timestamps are 0, 1, … of the user
event_features user_features item_features   name → vocabulary size
bucketing            see features.py
shards tables        names and checksums
"""

import pathlib
from collections.abc import Mapping
from typing import Any

import pyarrow as pa

from onerec_jax import files
from onerec_jax.data import engine as engine_lib
from onerec_jax.data import entities, features, shards, splits


def counts(
  engine: engine_lib.Engine, skipped: Mapping[str, int]
) -> dict[str, Any]:
  """The counts of events and users in the tables `marked` and `kept`.

  Args:
    engine: holds the tables.
    skipped: bad rows left out before, by reason; for messages.

  Raises:
    ValueError: no events are left, or none to train on.
  """
  dropped = engine.rows(
    "SELECT dropped AS name, count(*) AS events FROM marked "
    "WHERE dropped <> '' GROUP BY dropped ORDER BY dropped"
  ).to_pylist()
  by_split = engine.rows(
    "SELECT split AS name, count(*) AS events FROM kept GROUP BY split"
  ).to_pylist()
  events = {splits.NAMES[row["name"]]: row["events"] for row in by_split}
  users = engine.rows(
    "SELECT count(DISTINCT user_id) - (SELECT count(DISTINCT user_id) "
    "FROM kept) AS dropped FROM marked"
  )
  found = {
    "dropped_users": users["dropped"][0].as_py(),
    "dropped_events": {row["name"]: row["events"] for row in dropped},
    "split_events": {name: events.get(name, 0) for name in splits.NAMES},
  }
  if not events:
    if not (skipped or dropped):
      raise ValueError("no events are left: the input has none; check it")
    raise ValueError(
      f"no events are left: skipped {dict(skipped)}, dropped "
      f"{found['dropped_events']}; check the input, prepare.where, "
      "prepare.min_user_events and prepare.min_item_events"
    )
  if not events.get("train"):
    raise ValueError(
      f"no training events are left ({found['split_events']}); check "
      "prepare.validation_from_ms and prepare.test_from_ms"
    )
  (marked,) = engine.rows(
    "SELECT CAST(sum(is_positive) AS BIGINT) AS positive, "
    "CAST(sum(is_session) AS BIGINT) AS session FROM kept "
    "JOIN sessions ON user_id = run_user AND request = run_number"
  ).to_pylist()
  return found | {"marked_events": marked}


def tables(
  directory: pathlib.Path,
  items: pa.Table,
  users: pa.Table,
  specs: Mapping[str, entities.Specs],
) -> dict[str, Any]:
  """What the manifest says of the item and user tables and of features.

  Args:
    directory: where the tables lie.
    items: as written.
    users: as written.
    specs: bucketing of `event`, `user` and `item` features.
  """
  lengths = users["num_events"].to_numpy()
  return {
    "num_users": users.num_rows,
    "num_items": items.num_rows,
    "num_events": int(lengths.sum()),
    "short_users": int((lengths < splits.SHORT_USER).sum()),
    **{f"{kind}_features": features.vocab_sizes(specs[kind]) for kind in specs},
    "bucketing": dict(specs),
    "tables": [
      {"name": name, "sha256": files.sha256(directory / name)}
      for name in (shards.ITEMS, shards.USERS)
    ],
  }
