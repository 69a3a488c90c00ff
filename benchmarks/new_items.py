"""How well new items are placed: 5% of a catalogue taken out, then added.

python benchmarks/new_items.py --data_dir=<folder of the raw data sets>

The items taken out leave the item table and all events before anything is
prepared or fitted. After `tokenize.extend` their codes are compared with
those of their nearest known items, nearest by
  vectors   what was coded; a new item has no events in it, and
  behaviour collaborative vectors of all training events, those of the new
            items included: what the placing never saw.
Beside them as many known items, whose codes were fitted, against the others.
"""

import pathlib
import tempfile

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import rich.box
import rich.console
import rich.table
from absl import app, flags

from onerec_jax import config as config_lib
from onerec_jax.data import datasets, prepare, schema, shards
from onerec_jax.tokenizer import (
  collaborative,
  extension,
  neighbours,
  tokenize,
)

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Raw data.", required=True)
_DATASET = flags.DEFINE_string("dataset", "amazon_beauty", "With item texts.")
_VECTORS = flags.DEFINE_list("vectors", ["content", "fused"], "Item vectors.")
_SEEDS = flags.DEFINE_integer("seeds", 3, "Draws of new items.")
_SHARE = 0.05
_COUNTS = (1, 10)
_LEVELS = (1, 2)

Figures = dict[tuple[str, ...], list[tuple[float, float]]]


def behaviour(tables: schema.Tables, items: list[str]) -> np.ndarray:
  """Collaborative vectors of all items, new ones too, in the order given."""
  dense = {raw: place for place, raw in enumerate(items, start=1)}
  users = tables.events["user_id"].to_numpy()
  events = [dense[i] for i in tables.events["item_id"].to_pylist()]
  starts = np.flatnonzero(users[1:] != users[:-1]) + 1
  # The last two of a user are validation and test.
  kept = [h[:-2] for h in np.split(np.array(events, np.int32), starts)]
  config = config_lib.TokenizerConfig()
  return collaborative.collaborative_vectors(
    np.cumsum([0, *map(len, kept)]),
    np.concatenate(kept),
    len(items),
    config.window,
    config.vector_size,
  )


def hold_out(
  tables: schema.Tables, workdir: pathlib.Path, seed: int
) -> tuple[shards.PreparedData, pa.Table]:
  """Prepares what is left without some items; returns both."""
  count = round(_SHARE * tables.items.num_rows)
  rng = np.random.default_rng(seed)
  rows = rng.choice(tables.items.num_rows, count, replace=False)
  new = tables.items.take(np.sort(rows))
  paths = {}
  for name in ("events", "items"):
    table = getattr(tables, name)
    is_new = pc.is_in(table["item_id"], value_set=new["item_id"])
    paths[name] = str(workdir / f"{name}.parquet")
    pq.write_table(table.filter(pc.invert(is_new)), paths[name])
  config = config_lib.PrepareConfig(dataset="tables", **paths)
  prepared = shards.PreparedData.open(prepare.prepare(config, workdir))
  return prepared, new


def measure(
  codes: np.ndarray, spaces: dict[str, np.ndarray], first: int, seed: int
) -> Figures:
  """Agreement of new items, and of as many known ones, with known items.

  Args:
    codes: [I, L] of known items, then of new ones.
    spaces: name → [I, D] in which neighbours are sought; rows of zeros have
      none.
    first: row of the first new item.
    seed: draws the known items.
  """
  rows = np.arange(len(codes))
  drawn = np.random.default_rng(seed).choice(
    first, len(codes) - first, replace=False
  )
  asked = {"new": rows[first:], "known": drawn}
  rest = np.setdiff1d(rows[:first], drawn)
  figures: Figures = {}
  for space, vectors in spaces.items():
    candidates = rest[vectors[rest].any(axis=1)]
    for who, items in asked.items():
      items = items[vectors[items].any(axis=1)]
      for count in _COUNTS:
        near = neighbours.nearest(vectors[items], vectors[candidates], count)
        figures[space, who, str(count)] = [
          neighbours.agreement(
            codes[items, :level], near, codes[candidates, :level]
          )
          for level in _LEVELS
        ]
  return figures


def one_draw(tables: schema.Tables, seed: int) -> dict[str, Figures]:
  """Figures of each kind of vectors."""
  found = {}
  with tempfile.TemporaryDirectory() as name:
    workdir = pathlib.Path(name)
    prepared, new = hold_out(tables, workdir, seed)
    raw = prepared.items["raw_id"].to_pylist() + new["item_id"].to_pylist()
    seen = behaviour(tables, raw)
    for kind in _VECTORS.value:
      config = config_lib.TokenizerConfig(vectors=kind)
      known = tokenize.tokenize(config, prepared, workdir)
      ids = tokenize.extend(workdir, known.fingerprint, new)
      coded = extension.Known.load(workdir, ids.fingerprint).vectors
      spaces = {"vectors": coded, "behaviour": seen}
      found[kind] = measure(ids.codes[1:], spaces, known.num_items, seed)
  return found


def main(argv: list[str]) -> None:
  """Prints a Markdown table, means over the draws."""
  del argv
  folder = pathlib.Path(_DATA_DIR.value)
  tables = datasets.load(
    config_lib.PrepareConfig(dataset=_DATASET.value, data_dir=str(folder))
  )
  draws = [one_draw(tables, seed) for seed in range(_SEEDS.value)]
  shown = rich.table.Table(
    *("item vectors", "nearest by", "items", "neighbours"),
    *("first code", "by chance", "first two", "by chance"),
    box=rich.box.MARKDOWN,
  )
  for kind in _VECTORS.value:
    for key in draws[0][kind]:
      values = np.array([draw[kind][key] for draw in draws])
      mean, spread = values.mean(axis=0), values.std(axis=0)
      cells = []
      for level in range(len(_LEVELS)):
        share, error = mean[level, 0], spread[level, 0]
        cells += [f"{share:.3f} ± {error:.3f}", f"{mean[level, 1]:.4f}"]
      shown.add_row(kind, *key, *cells)
  rich.console.Console(width=120).print(shown)


if __name__ == "__main__":
  app.run(main)
