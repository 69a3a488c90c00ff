r"""Where a training step's time goes, part by part.

  python -m benchmarks.train_step --config=experiments/beauty/lazy_decoder.py \
    --workdir=runs/amazon_beauty [--repeats=20]

Each row is a program of its own, timed as the median of the repeats: their
sum is not the step's time, since XLA fuses across parts. `GFLOP/s` counts the
model's matrix products (3 × forward for a gradient), padding included; beside
them a matmul of the same type measured in the same process.
"""

import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import rich
import rich.table
from absl import app
from absl import flags as absl_flags

from launch import flags
from onerec_jax import config as config_lib
from onerec_jax import partitioning, workflow
from onerec_jax.data import pipeline
from onerec_jax.data.batch import Batch
from onerec_jax.models import registry
from onerec_jax.training import loop, losses, optimizer, state, step, throughput

_CONFIG = flags.define_config()
_REPEATS = absl_flags.DEFINE_integer("repeats", 20, "Timed runs of each part.")


def median_seconds(function: Callable[..., Any], *arguments: Any) -> float:
  """Median time of a jitted function, after one call that compiles."""
  jax.block_until_ready(function(*arguments))
  times = []
  for _ in range(_REPEATS.value):
    start = time.perf_counter()
    jax.block_until_ready(function(*arguments))
    times.append(time.perf_counter() - start)
  return float(np.median(times))


def read(stream: Iterator[Batch]) -> tuple[Batch, float]:
  """A batch of the pipeline, and the mean time of one after the first."""
  next(stream)
  start = time.perf_counter()
  for _ in range(_REPEATS.value):
    batch = next(stream)
  return batch, (time.perf_counter() - start) / _REPEATS.value


def main(argv: list[str]) -> None:
  """Entry point."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  flags.start()
  config = _CONFIG.value
  system = workflow.assembled(config, flags.workdir(config))
  model = system.model
  dtype = registry.compute_dtype(config.model.compute_dtype)
  matmul = throughput.measure_matmul(dtype)
  dataset, _ = pipeline.training_dataset(system.prepared, config.pipeline, 0)
  host_batch, seconds = read(iter(dataset))
  rows = [("pipeline, one batch", seconds, 0)]

  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  batch = loop.put_batch(host_batch, partitioning.batch_sharding(mesh))
  tables = jax.device_put((system.catalogue, system.index))
  schedule = optimizer.make_schedule(
    config.optimizer, registry.block_parameters(model), 1000
  )
  tx = optimizer.make_optimizer(config.optimizer, schedule)
  loss_fn = losses.make_loss(model)
  flops = registry.forward_flops(
    model, *batch.items.shape, batch.targets.shape[1]
  )
  with jax.set_mesh(mesh):
    _, make = state.plan(model, tx, batch, tables[0], 0, mesh)
    current = make()

    def loss(params, key):
      return loss_fn(params, batch, *tables, key)["loss"]

    key, params = jax.random.key(0), current.params
    whole = jax.jit(
      functools.partial(step.train_step, loss_fn=loss_fn, tx=tx, seed=0)
    )
    update = jax.jit(lambda grads: tx.update(grads, current.opt_state, params))
    parts = [
      ("loss, no dropout", jax.jit(lambda p: loss(p, None)), (params,), 1),
      ("loss", jax.jit(loss), (params, key), 1),
      ("gradient", jax.jit(jax.grad(loss)), (params, key), 3),
      ("optimizer", update, (params,), 0),
      ("whole step", whole, (current, batch, *tables), 3),
    ]
    for name, function, arguments, passes in parts:
      rows.append((name, median_seconds(function, *arguments), passes * flops))
    memory = whole.lower(current, batch, *tables).compile().memory_analysis()

  table = rich.table.Table("part", "ms", "GFLOP/s", box=None)
  for name, seconds, count in rows:
    rate = f"{count / seconds / 1e9:.1f}" if count else ""
    table.add_row(name, f"{seconds * 1e3:.2f}", rate)
  rich.print(table)
  targets = int((np.asarray(host_batch.targets) > 0).sum())
  rich.print(
    f"{targets} targets in {batch.targets.size} slots; "
    f"{targets / rows[-1][1]:,.0f} targets/s; temporaries "
    f"{memory.temp_size_in_bytes / 2**20:.0f} MiB; a matmul: "
    f"{matmul / 1e9:.0f} GFLOP/s; {jax.devices()[0].device_kind}"
  )


if __name__ == "__main__":
  app.run(main)
