"""The item and user tables: dense ids, counts and bucketed features."""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from onerec_jax.data import features, shards

_ITEM_CODES = ("category", "author_id")
_ITEM_NUMBERS = ("duration_ms", "price")
_USER_COUNTS = ("user_id", "num_events", "training_events")

Specs = dict[str, features.Spec]


def item_table(items: pa.Table, counts: np.ndarray) -> tuple[pa.Table, Specs]:
  """What prepared/items.parquet holds, and how its features are bucketed.

  Args:
    items: the item table in dense order.
    counts: int64 [I] training events.
  """
  specs: Specs = {}
  columns: dict[str, np.ndarray] = {}
  for name in _ITEM_CODES:
    if name in items.schema.names:
      specs[name] = features.fit_codes(items[name], counts)
      columns[name] = features.bucket_codes(specs[name], items[name])
  for name in _ITEM_NUMBERS:
    if name in items.schema.names:
      specs[name] = {"kind": "log2"}
      values = items[name].cast(pa.float64()).to_numpy()
      columns[name] = features.bucket_numbers(specs[name], values)
  for name in ("title", "text"):
    if name not in items.schema.names:
      nulls = pa.nulls(items.num_rows, pa.string())
      items = items.append_column(name, nulls)
  items = items.append_column("count", pa.array(counts, pa.int64()))
  return _dense("item_id", items, columns), specs


def user_table(
  users: pa.Table,
) -> tuple[pa.Table, Specs, dict[str, np.ndarray]]:
  """What prepared/users.parquet holds; specs and codes of static features.

  Args:
    users: in dense order: user_id, num_events, training_events and static
      columns. Codes are fitted on users with training events.
  """
  training = (users["training_events"].to_numpy() > 0).astype(np.int64)
  specs: Specs = {}
  columns: dict[str, np.ndarray] = {}
  for name in users.schema.names:
    nested = pa.types.is_nested(users.schema.field(name).type)
    if name not in _USER_COUNTS and not nested:
      specs[name] = features.fit_codes(users[name], training)
      columns[name] = features.bucket_codes(specs[name], users[name])
  return _dense("user_id", users, columns), specs, columns


def _dense(
  id_name: str, table: pa.Table, columns: Mapping[str, np.ndarray]
) -> pa.Table:
  """Adds dense ids and features; the raw id becomes `raw_id`."""
  names = [n for n in table.schema.names if n != id_name]
  dense = pa.array(np.arange(1, table.num_rows + 1, dtype=np.int32))
  built = {id_name: dense, "raw_id": table[id_name]}
  built |= {name: table[name] for name in names}
  built |= {
    shards.FEATURE_PREFIX + name: pa.array(values)
    for name, values in columns.items()
  }
  return pa.table(built)
