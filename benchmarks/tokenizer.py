"""Speed of the k-means steps, and what balance and collisions cost.

python benchmarks/tokenizer.py --data_dir=<folder of the raw data sets>

Reads amazon_beauty/{sequences.txt,items.jsonl} and movielens_100k/ml-100k.*;
the last two events of each user are left out, as in training.
"""

import itertools
import json
import pathlib
import time

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import rich.console
import rich.table
from absl import app, flags

from onerec_jax import balanced_kmeans, kmeans, semantic_ids
from onerec_jax import config as config_lib
from onerec_jax.tokenizer import item_vectors, residual

_DATA_DIR = flags.DEFINE_string("data_dir", None, "Raw data.", required=True)
_SETS = flags.DEFINE_list("sets", ["beauty", "movielens"], "Which sets.")
_VECTORS = flags.DEFINE_list("vectors", ["content", "fused"], "Item vectors.")
_REPEATS = 10


def beauty(folder: pathlib.Path) -> tuple[pa.Table, list[np.ndarray]]:
  """Items and training histories of Amazon Beauty."""
  folder = folder / "amazon_beauty"
  lines = (folder / "items.jsonl").read_text().splitlines()
  rows = [json.loads(line) for line in lines]
  items = pa.table(
    {
      "title": [row["short_text"] for row in rows],
      "category": [" ".join(row["attributes"]) for row in rows],
    }
  )
  lines = (folder / "sequences.txt").read_text().splitlines()
  return items, [np.array(line.split()[1:-2], np.int32) for line in lines]


def movielens(folder: pathlib.Path) -> tuple[pa.Table, list[np.ndarray]]:
  """Items and training histories of MovieLens 100K."""
  folder = folder / "movielens_100k"

  def read(name: str) -> list[list[str]]:
    lines = (folder / name).read_text(encoding="utf-8").splitlines()[1:]
    return [line.split("\t") for line in lines]

  rows = sorted(read("ml-100k.item"), key=lambda row: int(row[0]))
  items = pa.table(
    {"title": [r[1] for r in rows], "category": [r[3] for r in rows]}
  )
  events = np.array(
    [[int(r[0]), int(r[1]), int(float(r[3]))] for r in read("ml-100k.inter")]
  )
  # (user, time, source row): lexsort is stable.
  events = events[np.lexsort((events[:, 2], events[:, 0]))]
  bounds = np.flatnonzero(np.diff(events[:, 0])) + 1
  users = np.split(events[:, 1].astype(np.int32), bounds)
  return items, [user[:-2] for user in users]


def steps(vectors: np.ndarray, table: rich.table.Table, name: str) -> None:
  """Times one sweep of each kind."""
  x, rows = jnp.asarray(vectors), len(vectors)
  size = residual.num_codes(rows, config_lib.TokenizerConfig())
  valid, key = jnp.ones(rows, bool), jax.random.key(0)
  centroids = kmeans.plus_plus_init(x, size, key, valid)
  order = jnp.arange(size, dtype=jnp.int32)
  capacity = -(-rows * 6 // (5 * size))
  calls = {
    "k-means++ init": lambda: kmeans.plus_plus_init(x, size, key, valid),
    "assign": lambda: kmeans.assign(x, centroids),
    "plain step": lambda: kmeans.plain_step(x, centroids, valid),
    "capped assign": lambda: balanced_kmeans.capped_assign(
      x, centroids, capacity, valid
    ),
    "balanced assign": lambda: balanced_kmeans.balanced_assign(
      x, centroids, order, valid
    ),
  }
  for step, call in calls.items():
    jax.block_until_ready(call())
    start = time.perf_counter()
    for _ in range(_REPEATS):
      jax.block_until_ready(call())
    seconds = (time.perf_counter() - start) / _REPEATS
    table.add_row(
      name, step, f"{1e3 * seconds:.1f}", f"{rows / seconds / 1e3:,.0f}k"
    )


def strategies(vectors: np.ndarray, table: rich.table.Table, name: str) -> None:
  """Fits every balance with every collision strategy."""
  balances, modes = ("none", "equal", "capped"), ("keep", "extra", "assign")
  for balance, mode in itertools.product(balances, modes):
    config = config_lib.TokenizerConfig(balance=balance, collisions=mode)
    start = time.perf_counter()
    coding = residual.fit(vectors, config)
    seconds = time.perf_counter() - start
    report = semantic_ids.quality_report(
      coding.codes,
      coding.codebook_sizes,
      vectors,
      residual.decode(coding.codes, coding.codebooks),
    )
    fitted = coding.codes[:, : config.num_levels]
    groups = np.unique(fitted, axis=0, return_counts=True)[1]
    table.add_row(
      name,
      balance,
      mode,
      f"{seconds:.1f}",
      " ".join(f"{v['entropy_share']:.2f}" for v in report["levels"]),
      f"{report['relative_error']:.3f}",
      f"{groups[groups > 1].sum() / len(fitted):.3f}",
      str(groups.max()),
      f"{report['neighbour_agreement']:.3f}",
    )


def main(argv: list[str]) -> None:
  """Prints two Markdown tables and the seconds of the item vectors."""
  del argv
  speed = rich.table.Table(
    "set", "step", "ms", "points/s", box=rich.box.MARKDOWN
  )
  quality = rich.table.Table(
    *("set", "balance", "collisions", "fit s", "entropy of max"),
    *("error", "colliding", "largest", "neighbours"),
    box=rich.box.MARKDOWN,
  )
  readers = {"beauty": beauty, "movielens": movielens}
  console = rich.console.Console(width=120)
  for name, kind in itertools.product(_SETS.value, _VECTORS.value):
    items, histories = readers[name](pathlib.Path(_DATA_DIR.value))
    offsets = np.cumsum([0, *map(len, histories)])
    start = time.perf_counter()
    vectors, _, line = item_vectors.fit(
      config_lib.TokenizerConfig(vectors=kind),
      items,
      offsets,
      np.concatenate(histories),
    )
    seconds = time.perf_counter() - start
    console.print(f"{name}, {len(vectors)} items: {line}, {seconds:.1f} s")
    strategies(vectors, quality, f"{name} {kind}")
    if kind == _VECTORS.value[-1]:
      steps(vectors, speed, f"{name} {vectors.shape[1]}-d")
  console.print(quality)
  console.print(speed)


if __name__ == "__main__":
  app.run(main)
