"""How fast lifelong histories are compressed (OneRec-V1 §2.2).

python -m benchmarks.lifelong [--output=a.json]

Users of 1,000 to 100,000 events, whose items come from topics of item space;
each history is compressed once, as at its last snapshot. What a user costs over
a lifetime is that times the snapshots, `events / lifelong.every` of them at
half the length on average.
"""

import os
import time

import numpy as np
import rich.box
import rich.console
import rich.table
from absl import app, flags

from onerec_jax import config as config_lib
from onerec_jax import files
from onerec_jax.data import lifelong

_EVENTS = flags.DEFINE_list("events", ["1000", "10000", "100000"], "Of a user.")
_ITEMS = flags.DEFINE_integer("items", 200_000, "Items of the catalogue.")
_WIDTH = flags.DEFINE_integer("width", 128, "D of item vectors.")
_TOPICS = flags.DEFINE_integer("topics", 500, "Centres that items lie around.")
_CAP = flags.DEFINE_integer("cap", 2000, "The most representatives.")
_REPEATS = flags.DEFINE_integer("repeats", 3, "Users of each length.")
_SEED = flags.DEFINE_integer("seed", 0, "Of items and users.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON to write.")


def main(argv: list[str]) -> None:
  """Measures and prints."""
  del argv
  rng = np.random.default_rng(_SEED.value)
  centres = rng.normal(size=(_TOPICS.value, _WIDTH.value)).astype(np.float32)
  topic = rng.integers(0, _TOPICS.value, _ITEMS.value)
  noise = rng.normal(size=(_ITEMS.value, _WIDTH.value)).astype(np.float32)
  vectors = centres[topic] + 0.5 * noise
  config = config_lib.LifelongConfig()
  table = rich.table.Table(
    title=f"{_ITEMS.value:,} items, {_WIDTH.value} wide, at most "
    f"{_CAP.value:,} representatives, M = {config.max_items}, "
    f"{os.cpu_count()} cores",
    box=rich.box.SIMPLE,
  )
  for heading in ("events", "representatives", "largest", "seconds",
                  "events/s"):  # fmt: skip
    table.add_column(heading, justify="right")
  rows = []
  for count in map(int, _EVENTS.value):
    seconds, kept, largest = [], [], []
    for _ in range(_REPEATS.value):
      # A user has a few topics.
      own = rng.choice(_TOPICS.value, 20)
      items = rng.choice(np.flatnonzero(np.isin(topic, own)), count) + 1
      play = rng.integers(0, 20, count)
      start = time.perf_counter()
      found = lifelong.compress(
        items.astype(np.int32), {"play_time_ms": play}, vectors, config,
        _CAP.value,
      )  # fmt: skip
      seconds.append(time.perf_counter() - start)
      kept.append(len(found.event))
      largest.append(int(found.size.max()))
    median = float(np.median(seconds))
    row = {
      "events": count,
      "representatives": float(np.mean(kept)),
      "largest": max(largest),
      "seconds": median,
      "events_per_second": count / median,
    }
    rows.append(row)
    table.add_row(
      *(f"{value:,.{3 if name == 'seconds' else 0}f}"
        for name, value in row.items())
    )  # fmt: skip
  rich.console.Console().print(table)
  if _OUTPUT.value:
    files.write_json(_OUTPUT.value, {"cores": os.cpu_count(), "rows": rows})


if __name__ == "__main__":
  app.run(main)
