r"""A training step of three architectures at equal block parameters.

  python -m benchmarks.architectures [--contexts=16] [--output=a.json]
  python -m benchmarks.architectures --models=0.05B,0.5B,1B --dtype=bfloat16 \
    --contexts=512

V2's comparison (arXiv 2508.20900, Tables 1 and 2) in time and memory: lazy
decoder, with all key/value heads and (grouped) with a quarter of them, as its
Table 4, encoder-decoder (1 : 1) and naive decoder-only at about 50M block
parameters, contexts of 512 positions with 5 targets each, three levels of
8,192 codes, AdamW included. Times are medians of whole steps; temporaries are
the compiler's; GFLOP/s count the model's matrix products, beside a matmul of
the same type measured before each of the steps: a shared machine's rate
wanders. A size of V2's table is its lazy decoder, as experiments/scaling has
it.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import rich
import rich.table
from absl import app, flags

from experiments.scaling import lazy_decoder
from onerec_jax import config as config_lib
from onerec_jax import files, model_configs, partitioning
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.models import registry
from onerec_jax.scaling import sizes
from onerec_jax.training import losses, optimizer, state, step, throughput

_CONTEXTS = flags.DEFINE_integer("contexts", 16, "Rows of a batch.")
_POSITIONS = flags.DEFINE_integer("positions", 512, "Of a context.")
_TARGETS = flags.DEFINE_integer("targets", 5, "Of a context.")
_MODELS = flags.DEFINE_list(
  "models",
  ["lazy_decoder", "lazy_decoder_grouped", "encoder_decoder", "decoder_only"],
  "Architectures at about 50M, or sizes, such as 1B.",
)  # fmt: skip
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["float32", "bfloat16"], "Of matrix products."
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Timed steps of each.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON to write.")

LEVELS, CODES, ITEMS = 3, 8192, 100_000
COMMON = dict(
  d_model=512,
  num_heads=8,
  d_ff=2048,
  sid_embed_dim=26,
  item_embedding=False,
  dropout=0.0,
  constrained_softmax=False,
)
CONFIGS = {
  # 18·d²·11 = 51.9M; (16·6 + 20·5)·d² = 51.4M; 16·d²·12 = 50.3M.
  "lazy_decoder": model_configs.LazyDecoderConfig(
    num_layers=11, num_kv_heads=8, **COMMON
  ),
  "lazy_decoder_grouped": model_configs.LazyDecoderConfig(
    num_layers=11, num_kv_heads=2, **COMMON
  ),
  "encoder_decoder": model_configs.EncoderDecoderConfig(
    encoder_layers=6, decoder_layers=5, causal_encoder=False, **COMMON
  ),
  "decoder_only": model_configs.DecoderOnlyConfig(num_layers=12, **COMMON),
}


def make_model(name: str, **changes: Any) -> registry.Model:
  """An architecture, or a size of V2's table, in the type asked for.

  Raises:
    UsageError: neither.
  """
  if name in CONFIGS:
    config = CONFIGS[name]
  elif name in sizes.SIZES:
    config = lazy_decoder.get_config(name).model
  else:
    known = ", ".join([*CONFIGS, *sizes.SIZES])
    raise app.UsageError(f"--models has {name!r}: want some of {known}")
  config = dataclasses.replace(config, compute_dtype=_DTYPE.value, **changes)
  return registry.create(config, ITEMS, (CODES,) * LEVELS, {}, {})


def matmul_rate() -> float:
  """FLOP/s of a matmul of the type asked for."""
  return throughput.measure_matmul(_DTYPE.value)


def beside_matmul(run: Callable[[], Any], repeats: int) -> tuple[float, float]:
  """Medians of runs: seconds, and FLOP/s of a matmul before each.

  Args:
    run: gives arrays, which are waited for; once more first, uncounted.
    repeats: counted runs.
  """
  times, rates = [], []
  for _ in range(repeats + 1):
    rates.append(matmul_rate())
    start = time.perf_counter()
    jax.block_until_ready(run())
    times.append(time.perf_counter() - start)
  return float(np.median(times[1:])), float(np.median(rates[1:]))


@dataclasses.dataclass
class Measurement:
  """One architecture's figures."""

  block_parameters: int
  parameters: int
  seconds: float
  temporary_bytes: int
  gflops: float
  loss: float
  matmul_gflops_per_s: float


def make_batch(rows: int, positions: int, targets: int) -> Batch:
  """Full contexts, one user a row, all targets after the context."""
  rng = np.random.default_rng(0)
  items = rng.integers(1, ITEMS + 1, (rows, positions)).astype(np.int32)
  items[:, 0] = 0  # the user token
  until = np.full((rows, targets), positions, np.int32)
  return Batch(
    items=items,
    segment=np.ones_like(items),
    features={},
    targets=rng.integers(1, ITEMS + 1, (rows, targets)).astype(np.int32),
    visible_from=np.ones_like(until),
    visible_until=until,
  )


def make_catalogue() -> Catalogue:
  """Random codes."""
  rng = np.random.default_rng(1)
  return Catalogue(
    rng.integers(0, CODES, (ITEMS + 1, LEVELS)).astype(np.int32), {}
  )


def measure(model: registry.Model, batch: Batch, repeats: int) -> Measurement:
  """Compiles and times training steps on the devices there are."""
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  rows = partitioning.batch_sharding(mesh)
  shape = (*batch.items.shape, batch.targets.shape[1])
  batch = jax.device_put(batch, rows)
  catalogue = jax.device_put(make_catalogue(), partitioning.replicated(mesh))
  config = config_lib.OptimizerConfig()
  schedule = optimizer.make_schedule(
    config, registry.block_parameters(model), 1000
  )
  tx = optimizer.make_optimizer(config, schedule)
  with jax.set_mesh(mesh):
    shapes, make = state.plan(model, tx, batch, catalogue, 0, mesh)
    current = make()
    parameters = state.num_parameters(current.params)
    train_step = functools.partial(
      step.train_step, loss_fn=losses.make_loss(model), tx=tx, seed=0
    )
    compiled = step.compile_step(
      train_step, state.shardings(shapes), mesh, catalogue, None
    )
    compiled = compiled.lower(current, batch, catalogue, None).compile()
    sums = {}

    def run():
      nonlocal current, sums
      current, sums = compiled(current, batch, catalogue, None)
      return sums

    seconds, rate = beside_matmul(run, repeats)
  return Measurement(
    registry.block_parameters(model),
    parameters,
    seconds,
    compiled.memory_analysis().temp_size_in_bytes,
    3.0 * registry.forward_flops(model, *shape) / 1e9,
    float(sums["loss"]) / float(sums["count"]),
    rate / 1e9,
  )


def _table(found: dict[str, Measurement]) -> rich.table.Table:
  table = rich.table.Table(box=None)
  for heading in (
    "model", "blocks", "s/step", "× first", "temporaries", "× first", "GFLOP",
    "GFLOP/s", "a matmul",
  ):  # fmt: skip
    table.add_column(heading, justify="right")
  first = next(iter(found.values()))
  for name, m in found.items():
    rate = m.gflops / m.seconds
    table.add_row(
      name,
      f"{m.block_parameters / 1e6:.1f}M",
      f"{m.seconds:.3g}",
      f"{m.seconds / first.seconds:.1f}",
      f"{m.temporary_bytes / 2**30:.2f} GiB",
      f"{m.temporary_bytes / first.temporary_bytes:.1f}",
      f"{m.gflops:.0f}",
      f"{rate:.0f}",
      f"{m.matmul_gflops_per_s:.0f} ({rate / m.matmul_gflops_per_s:.0%})",
    )
  return table


def main(argv: list[str]) -> None:
  """Entry point."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  batch = make_batch(_CONTEXTS.value, _POSITIONS.value, _TARGETS.value)
  found: dict[str, Any] = {}
  for name in _MODELS.value:
    found[name] = measure(make_model(name), batch, _REPEATS.value)
    jax.clear_caches()
    rich.print(_table(found))
  rich.print(
    f"{len(jax.devices())} × {jax.devices()[0].device_kind}, "
    f"jax {jax.__version__}"
  )
  if _OUTPUT.value:
    files.write_json(
      _OUTPUT.value,
      {
        "contexts": _CONTEXTS.value,
        "positions": _POSITIONS.value,
        "targets": _TARGETS.value,
        "dtype": _DTYPE.value,
        "device": jax.devices()[0].device_kind,
        "models": {k: dataclasses.asdict(m) for k, m in found.items()},
      },
    )


if __name__ == "__main__":
  app.run(main)
