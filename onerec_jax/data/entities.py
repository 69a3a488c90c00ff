"""The item and user tables: dense ids, counts and bucketed features.

What the source gave is carried along under its own name; where that is one of
the names below, it becomes `given_<name>`, so that nothing replaces anything.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from onerec_jax.data import features, shards

_ITEM_CODES = ("category", "author_id")
_ITEM_NUMBERS = ("duration_ms", "price")
_OWN = ("raw_id", "count", "num_events", "training_events")
_GIVEN_PREFIX = "given_"

Specs = dict[str, features.Spec]
Values = pa.Array | pa.ChunkedArray


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
  kept = {n: items[n] for n in items.schema.names if n != "item_id"}
  for name in ("title", "text"):
    kept.setdefault(name, pa.nulls(items.num_rows, pa.string()))
  kept = _carried(kept) | {"count": pa.array(counts, pa.int64())}
  return _dense("item_id", items["item_id"], kept, columns), specs


def with_new_items(
  items: pa.Table, new: pa.Table, specs: Mapping[str, features.Spec]
) -> pa.Table:
  """An item table that goes on with items nobody was trained on.

  Args:
    items: by `item_table`.
    new: `raw_id`, `title` and columns as the source's item table had them.
    specs: how the features of `items` were bucketed.

  Returns:
    The columns of `items`: of new items their ids, titles, features, and a
    count of 0; of what else was carried along, null.
  """
  count = new.num_rows
  columns = {name: pa.nulls(count) for name in items.schema.names}
  first = 1 + items.num_rows
  columns["item_id"] = pa.array(range(first, first + count))
  columns["count"] = pa.array([0] * count)
  columns |= {name: new[name] for name in ("raw_id", "title")}
  for name, spec in specs.items():
    codes = np.zeros(count, np.int32)
    if name in new.schema.names and spec["kind"] == "codes":
      # A list: however a category is spelt in this file.
      codes = features.bucket_codes(spec, new[name].to_pylist())
    elif name in new.schema.names:
      values = new[name].cast(pa.float64()).to_numpy()
      codes = features.bucket_numbers(spec, values)
    columns[shards.FEATURE_PREFIX + name] = pa.array(codes)
  after = pa.table(columns).cast(items.schema)
  return pa.concat_tables([items, after])


def user_table(
  users: pa.Table,
  statics: Mapping[str, pa.ChunkedArray],
  with_ids: bool = False,
) -> tuple[pa.Table, Specs, dict[str, np.ndarray]]:
  """What prepared/users.parquet holds; specs and codes of static features.

  Args:
    users: in dense order: user_id, num_events and training_events.
    statics: name → column in the same order, whatever its name. Codes are
      fitted on users with training events.
    with_ids: the id is a feature, too; of users without training events it is
      unknown.
  """
  training = (users["training_events"].to_numpy() > 0).astype(np.int64)
  specs: Specs = {}
  columns: dict[str, np.ndarray] = {}
  for name, values in statics.items():
    if not _says_nothing(values.type):
      specs[name] = features.fit_codes(values, training)
      columns[name] = features.bucket_codes(specs[name], values)
  if with_ids:
    ids = users["user_id"]
    spec = features.fit_codes(ids, training, most=None)
    specs[features.USER_ID] = spec
    columns[features.USER_ID] = features.bucket_codes(spec, ids)
  kept = {n: users[n] for n in ("num_events", "training_events")}
  kept |= _carried(statics)
  return _dense("user_id", users["user_id"], kept, columns), specs, columns


def _says_nothing(kind: pa.DataType) -> bool:
  """Whether values are no categories, but lists or bytes."""
  of_bytes = (
    pa.types.is_binary,
    pa.types.is_large_binary,
    pa.types.is_fixed_size_binary,
  )
  return pa.types.is_nested(kind) or any(test(kind) for test in of_bytes)


def _dense(
  id_name: str,
  ids: pa.ChunkedArray,
  kept: Mapping[str, Values],
  columns: Mapping[str, np.ndarray],
) -> pa.Table:
  """Dense ids, raw ids, what is kept as it is, and features."""
  dense = pa.array(np.arange(1, len(ids) + 1, dtype=np.int32))
  built = {id_name: dense, "raw_id": ids}
  built |= kept
  built |= {
    shards.FEATURE_PREFIX + name: pa.array(values)
    for name, values in columns.items()
  }
  return pa.table(built)


def _carried(given: Mapping[str, Values]) -> dict[str, Values]:
  """Given columns by the names they keep; no two of them become one."""
  prefixes = (shards.FEATURE_PREFIX, _GIVEN_PREFIX)
  return {
    _GIVEN_PREFIX + name
    if name in _OWN or name.startswith(prefixes)
    else name: values
    for name, values in given.items()
  }
