r"""V2's ways to organise training data (arXiv 2508.20900 §3.1), measured.

  python -m benchmarks.data_organisation --dataset=simulator [--output=a.json]

For `naive_impression`, `user_centric` and `new_impression_only`, and for the
latter with its samples shuffled over time:

  cost     positions and targets encoded for each event of the log, steps and
           seconds of a pass
  leakage  share of events first trained after one of another user that comes
           later, and by how long; then a model trained to the middle of the
           stream, or with half the budget where there is no stream, is asked
           about that middle: how much probability has it for items that are
           unknown until then, and how does its taste follow what will be
           popular, given what was?
  quality  loss and recall on the days after the training events, all at the
           matrix products of one pass of `new_impression_only`

Of a stream whose pass costs more than the budget evenly spaced batches are
left out, so that every model has met the newest events.
"""

import dataclasses
import functools
import importlib
import itertools
import time
from collections.abc import Iterator
from typing import Any

import grain
import jax
import numpy as np
import rich.console
import rich.table
from absl import app, flags

from benchmarks import leakage
from onerec_jax import config as config_lib
from onerec_jax import files, partitioning, workflow
from onerec_jax.data import pipeline, shards, splits
from onerec_jax.inference import assemble
from onerec_jax.models import registry
from onerec_jax.training import losses, optimizer, state, step

_DATASET = flags.DEFINE_enum(
  "dataset", "simulator", ["simulator", "movielens"], "What to train on."
)
_WORKDIR = flags.DEFINE_string("workdir", "runs/data_organisation", "Folder.")
_SEEDS = flags.DEFINE_integer("seeds", 1, "Models of each organisation.")
_USERS = flags.DEFINE_integer("users", 300, "Users that the probe asks for.")
_OUTPUT = flags.DEFINE_string("output", "", "JSON to write.")

HISTORY, POSITIONS = 20, 128
ORGANISATIONS = {
  "naive_impression": ("history", "time", POSITIONS),
  "user_centric": ("next_item", "shuffled", POSITIONS),
  "new_impression_only": ("request", "time", 16),
  "new_impression_shuffled": ("request", "shuffled", 16),
}
"""Name → pipeline.targets, pipeline.order, pipeline.row_targets."""
DAY_MS = 86_400_000


def make_config(dataset: str) -> config_lib.Config:
  """The experiment, split by time, for a single pass: nothing is dropped."""
  module = importlib.import_module(f"experiments.{dataset}.lazy_decoder")
  c = module.get_config()
  c.prepare.split = "time"
  c.pipeline.max_history, c.pipeline.row_positions = HISTORY, POSITIONS
  c.model.dropout = c.model.context_dropout = 0.0
  c.optimizer.schedule, c.optimizer.warmup_steps = "constant", 50
  # The simulator's; a pass over the default thousand users is over too soon.
  c.prepare.simulation.num_users = 2000
  return c


def organised(c: config_lib.Config, name: str) -> config_lib.PipelineConfig:
  """The pipeline of one organisation."""
  targets, order, row_targets = ORGANISATIONS[name]
  return dataclasses.replace(
    c.pipeline, targets=targets, order=order, row_targets=row_targets
  )


@dataclasses.dataclass
class Cost:
  """Of one pass, for each event that is a target at least once."""

  positions: float
  targets: float
  steps: int
  pass_gflop: float


@dataclasses.dataclass
class Order:
  """Of events, at the first time that they are targets.

  Attributes:
    late_share: share trained after a batch that has a later event.
    ahead_days: how far the latest event trained before is ahead, on average.
  """

  late_share: float
  ahead_days: float


def cost_and_order(
  system: assemble.System, settings: config_lib.PipelineConfig, seed: int
) -> tuple[Cost, Order]:
  """Counts, without a model."""
  packed = pipeline.training_rows(system.prepared, settings)
  segments, rows = packed.segments, packed.rows
  order = grain.MapDataset.range(len(rows)).seed(seed)
  if settings.order == "shuffled":
    order = order.shuffle()
  trained_rows = [rows[row] for row in order]
  own = np.concatenate(trained_rows)
  sizes = (segments.stop - segments.first_target)[own]
  batch = np.arange(len(rows)) // settings.batch_size
  batch = np.repeat(np.repeat(batch, [len(row) for row in trained_rows]), sizes)
  # Every target's event, numbered over all users.
  records = map(system.prepared.user, range(len(system.prepared)))
  times = [record.timestamps for record in records]
  starts = np.cumsum([0, *map(len, times)])[segments.user[own]]
  starts = starts + segments.first_target[own]
  within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
  event, first = np.unique(np.repeat(starts, sizes) + within, return_index=True)
  when, batch = np.concatenate(times)[event], batch[first]
  newest = np.full(batch.max() + 2, when.min())
  np.maximum.at(newest, batch + 1, when)
  ahead = np.maximum.accumulate(newest)[batch] - when
  steps = max(1, round(len(rows) / settings.batch_size))
  return (
    Cost(
      positions=float(segments.positions.sum()) / len(event),
      targets=float(sizes.sum()) / len(event),
      steps=steps,
      pass_gflop=steps * step_flops(system.model, settings) / 1e9,
    ),
    Order(
      late_share=float((ahead > 0).mean()),
      ahead_days=float(np.maximum(ahead, 0).mean()) / DAY_MS,
    ),
  )


def step_flops(
  model: registry.Model, settings: config_lib.PipelineConfig
) -> float:
  """Of matrix products, forward and backward."""
  return 3.0 * registry.forward_flops(
    model, settings.batch_size, settings.row_positions, settings.row_targets
  )


def evenly_spaced(steps_per_pass: int, steps: int) -> set[int]:
  """Numbers of a pass's batches, its first and last among them."""
  steps = min(steps, steps_per_pass)
  return set(np.linspace(0, steps_per_pass - 1, steps).round().astype(int))


def trained(
  system: assemble.System,
  settings: config_lib.PipelineConfig,
  budget_gflop: float,
  middle: float,
  seed: int,
) -> tuple[Any, Any, float]:
  """Parameters at the share `middle` and at the end, and seconds a step."""
  steps = max(2, round(1e9 * budget_gflop / step_flops(system.model, settings)))
  dataset, steps_per_pass = pipeline.training_dataset(
    system.prepared, settings, seed
  )
  stream = iter(dataset)
  if settings.order == "time":
    kept = evenly_spaced(steps_per_pass, steps)
    steps = len(kept)
    stream = (b for number, b in enumerate(stream) if number in kept)
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  tables = jax.device_put(
    (system.catalogue, system.index), partitioning.replicated(mesh)
  )
  schedule = optimizer.make_schedule(system.config.optimizer, 1, steps)
  tx = optimizer.make_optimizer(system.config.optimizer, schedule)
  first = next(stream)
  with jax.set_mesh(mesh):
    shapes, make = state.plan(system.model, tx, first, tables[0], seed, mesh)
    current = make()
    update = functools.partial(
      step.train_step, loss_fn=losses.make_loss(system.model), tx=tx, seed=seed
    )
    compiled = step.compile_step(update, state.shardings(shapes), mesh, *tables)
    half, start = None, time.perf_counter()
    for number, batch in enumerate(itertools.chain([first], stream), 1):
      current, _ = compiled(current, batch, *tables)
      if number == 1:
        jax.block_until_ready(current)
        start = time.perf_counter()  # the first step compiles
      if number == max(1, round(middle * steps)):
        half = jax.device_get(current.params)
      if number == steps:
        break
    final = jax.device_get(current.params)
  return half, final, (time.perf_counter() - start) / max(1, steps - 1)


def share_before(
  prepared: shards.PreparedData, settings: config_lib.PipelineConfig, at: float
) -> float:
  """Share of a pass that is over when the stream reaches a time; ½: none is."""
  if settings.order != "time":
    return 0.5
  packed = pipeline.training_rows(prepared, settings)
  last = [row[-1] for row in packed.rows]
  users, stops = packed.segments.user[last], packed.segments.stop[last]
  ends = [
    prepared.user(int(user)).timestamps[stop - 1]
    for user, stop in zip(users, stops)
  ]
  return float((np.asarray(ends) < at).mean())


def held_out(
  prepared: shards.PreparedData, c: config_lib.Config
) -> list[tuple]:
  """Evenly spaced batches of the validation events, 2,048 at most."""
  batches = list(
    pipeline.evaluation_batches(prepared, splits.VALIDATION, c.pipeline, 32)
  )
  return batches[:: -(-len(batches) // 64)]


def measure(dataset: str, workdir: str) -> Iterator[dict[str, Any]]:
  """A record for each organisation and seed."""
  c = make_config(dataset)
  system = workflow.assembled(c, f"{workdir}/{dataset}")
  ask, batches = leakage.Asker(system), held_out(system.prepared, c)
  where = leakage.middle(system.prepared, c.pipeline, _USERS.value)
  unknown = where.before == 0
  yield {
    "events": int(where.before.sum() + where.after.sum()),
    "items": len(unknown),
    "unknown_items": int(unknown.sum()),
    "unknown_share_after": float(
      where.after[unknown].sum() / where.after.sum()
    ),
  }
  settings = organised(c, "new_impression_only")
  budget = cost_and_order(system, settings, 0)[0].pass_gflop
  for seed in range(_SEEDS.value):
    for name in ORGANISATIONS:
      settings = organised(c, name)
      cost, order = cost_and_order(system, settings, seed)
      share = share_before(system.prepared, settings, where.time)
      half, final, seconds = trained(system, settings, budget, share, seed)
      yield {
        "organisation": name,
        "seed": seed,
        "cost": dataclasses.asdict(cost),
        "order": dataclasses.asdict(order),
        "step_s": seconds,
        "probe": dataclasses.asdict(leakage.probe(ask, half, where)),
        "quality": dataclasses.asdict(leakage.quality(ask, final, batches)),
      }


def table(records: list[dict[str, Any]]) -> rich.table.Table:
  """One line a model."""
  made = rich.table.Table(box=None)
  for heading in (
    "organisation", "seed", "positions", "targets", "pass GFLOP", "pass s",
    "late", "ahead d", "unknown", "future", "loss", "R@10",
  ):  # fmt: skip
    made.add_column(heading, justify="right")
  for r in records:
    cost, order, probed, good = (
      r[key] for key in ("cost", "order", "probe", "quality")
    )
    made.add_row(
      r["organisation"],
      str(r["seed"]),
      f"{cost['positions']:.1f}",
      f"{cost['targets']:.1f}",
      f"{cost['pass_gflop']:,.0f}",
      f"{cost['steps'] * r['step_s']:.0f}",
      f"{order['late_share']:.1%}",
      f"{order['ahead_days']:.2f}",
      f"{probed['unknown_mass']:.3%}",
      f"{probed['future_taste']:+.3f}",
      f"{good['loss']:.4f}",
      f"{good['recall_at_10']:.4f}",
    )
  return made


def main(argv: list[str]) -> None:
  """Entry point."""
  if len(argv) > 1:
    raise app.UsageError(f"unexpected argument {argv[1]!r}")
  stream = measure(_DATASET.value, _WORKDIR.value)
  world, records = next(stream), []
  console = rich.console.Console(width=120)
  console.print(world)
  for record in stream:
    records.append(record)
    console.print(table(records))
    if _OUTPUT.value:
      files.write_json(_OUTPUT.value, {"world": world, "models": records})


if __name__ == "__main__":
  app.run(main)
