"""Beam search over a large random catalogue: time and the trie's share of it.

  python -m benchmarks.beam_search --items=1000000 --codes=8192 --widths=50,512

Prints how long the prefix index takes to build and to restrict, its size, and
for each beam width the time per request of the whole search of a lazy decoder
with random weights beside that of the same search with everything but the
trie left out (constant logits). `codes` near items^(1/2) and above give a
sparse trie as in the papers (3 × 8192).
"""

import time
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from rich.console import Console
from rich.table import Table

from onerec_jax import config as config_lib
from onerec_jax import model_configs
from onerec_jax.data import rows as rows_lib
from onerec_jax.data.batch import Catalogue
from onerec_jax.inference import beam_search, prefix_index
from onerec_jax.models import registry

_ITEMS = flags.DEFINE_integer("items", 1_000_000, "Items of the catalogue.")
_CODES = flags.DEFINE_integer("codes", 8192, "Codes of a level.")
_LEVELS = flags.DEFINE_integer("levels", 3, "Levels of a semantic ID.")
_WIDTHS = flags.DEFINE_list("widths", ["50", "512"], "Beam widths.")
_BATCH = flags.DEFINE_integer("batch", 8, "Requests at once.")
_HISTORY = flags.DEFINE_integer("history", 50, "Events of a request.")
_D_MODEL = flags.DEFINE_integer("d_model", 128, "Width of the model.")
_LAYERS = flags.DEFINE_integer("num_layers", 2, "Depth of the model.")


class TrieOnly(nn.Module):
  """The same logits whatever the prefix, at next to no cost."""

  codebook_sizes: tuple[int, ...]
  constrained_softmax: bool = True

  def encode(self, batch, catalogue):
    """Nothing but the number of requests."""
    return jnp.zeros((batch.items.shape[0], 1))

  def decode_step(self, level, previous, cache, context):
    """A fixed row of logits for every beam, and no cache."""
    beams = 1 if previous is None else previous.shape[1]
    logits = jnp.sin(jnp.arange(self.codebook_sizes[level], dtype=jnp.float32))
    return jnp.broadcast_to(
      logits[None, None], (len(context), beams, logits.shape[0])
    ), {}


def seconds(function: Callable[..., Any], *arguments: Any) -> float:
  """Median of five runs, after one that compiles."""
  jax.block_until_ready(function(*arguments))
  times = []
  for _ in range(5):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    times.append(time.perf_counter() - start)
  return float(np.median(times))


def make_world() -> tuple[nn.Module, Any, Any, Catalogue, np.ndarray]:
  """A random catalogue, random histories, a model with random weights."""
  rng = np.random.default_rng(0)
  sizes = (_CODES.value,) * _LEVELS.value
  codes = rng.integers(0, _CODES.value, (_ITEMS.value + 1, _LEVELS.value))
  codes = codes.astype(np.int32)
  model = registry.create(
    model_configs.LazyDecoderConfig(
      d_model=_D_MODEL.value,
      num_layers=_LAYERS.value,
      d_ff=4 * _D_MODEL.value,
      item_embedding=False,
    ),
    _ITEMS.value, sizes, {}, {},
  )  # fmt: skip
  histories = rng.integers(
    1, _ITEMS.value + 1, (_BATCH.value, _HISTORY.value)
  ).astype(np.int32)
  marks = np.zeros(_HISTORY.value, bool)
  batch = rows_lib.request_batch(
    [rows_lib.History(items, {}, marks, {}) for items in histories],
    [],
    config_lib.PipelineConfig(max_history=_HISTORY.value),
    _BATCH.value,
  )
  catalogue = Catalogue(jnp.asarray(codes), {})
  params = nn.unbox(
    jax.jit(model.init)(jax.random.key(0), batch, catalogue)["params"]
  )
  return model, params, batch, catalogue, codes


def main(argv: list[str]) -> None:
  """Measures and prints."""
  del argv
  model, params, batch, catalogue, codes = make_world()
  start = time.perf_counter()
  index = jax.block_until_ready(prefix_index.build(codes, model.codebook_sizes))
  build = time.perf_counter() - start
  allowed = jnp.asarray(np.random.default_rng(1).random(len(codes)) < 0.5)
  restrict = seconds(jax.jit(prefix_index.restrict), index, allowed)
  size = sum(leaf.nbytes for leaf in jax.tree.leaves(index)) / 2**20
  shapes = ", ".join(
    f"dense {level.child.shape[1]}"
    if isinstance(level, prefix_index.DenseLevel)
    else f"sparse {level.fanout}"
    for level in index.levels
  )
  console = Console()
  console.print(
    f"{jax.devices()[0].device_kind}: {_ITEMS.value:,} items, "
    f"{index.num_leaves:,} semantic IDs; index built in "
    f"{build:.1f} s, {size:.0f} MiB, restricted in {1e3 * restrict:.1f} ms; "
    f"children of a node by level: {shapes}"
  )
  table = Table("beam", "search ms/request", "trie ms/request", "trie share")
  trie = TrieOnly(model.codebook_sizes)
  for width in map(int, _WIDTHS.value):
    times = []
    for searched, weights in ((model, params), (trie, {})):
      search = jax.jit(
        lambda params, *rest, searched=searched, width=width: (
          beam_search.beam_search(searched, params, *rest, width)
        )
      )
      times.append(seconds(search, weights, batch, catalogue, index))
    whole, lookups = (1e3 * t / _BATCH.value for t in times)
    table.add_row(
      str(width), f"{whole:.2f}", f"{lookups:.2f}", f"{lookups / whole:.0%}"
    )
  console.print(table)


if __name__ == "__main__":
  app.run(main)
