"""The points of a scaling law, collected from the finished runs of a sweep."""

import functools
import pathlib
from typing import Any

import jax
import numpy as np
from flax import linen as nn

from onerec_jax import config as config_lib
from onerec_jax import files, semantic_ids
from onerec_jax.data import pipeline, shards, snapshots
from onerec_jax.data import rows as rows_lib
from onerec_jax.inference import assemble
from onerec_jax.models import registry
from onerec_jax.scaling import sweep as sweeps
from onerec_jax.training import metrics_writer, state


def points(
  sweep: sweeps.Sweep, workdir: files.PathLike
) -> list[dict[str, Any]]:
  """The finished runs as points (points.py reads them).

  A point: `name`, `architecture`, `seed`; `parameters` (active, of the blocks'
  matrices, N of the law), `total_parameters`; `loss` (nats per code of the
  held-out targets), the lowest of all validations, and `loss_step`, where it
  was: a law is of the best loss that N and D allow, while the parameters that
  the run keeps are those that evaluation.select ranks best. `steps`, `targets`
  (D: what the loss was on) and `flops` (three forward passes a step, padding
  included) are of the whole run: its schedule is as long as that, and a
  `loss_step` before `steps` says that the run overfitted.

  Args:
    sweep: the sweep.
    workdir: the work directory; its data is that of the runs.

  Raises:
    ValueError: a run of it was trained on other data, was aligned, or did not
      record what a point needs.
  """
  done = [c for c in sweep.configs if sweeps.is_done(workdir, c.name)]
  if not done:
    return []
  prepared = shards.PreparedData.open(workdir, verify=False)
  return [_point(config, workdir, prepared) for config in done]


def _point(config, workdir, prepared):
  run = assemble.run_directory(workdir, config.name)
  record = files.read_json(run / "config.json")
  if record["prepared"] != prepared.manifest["fingerprint"]:
    raise ValueError(
      f"{run} was trained on other data than {workdir}/prepared now holds; "
      "train it again, or prepare the old data again"
    )
  if config.alignment.start:
    raise ValueError(
      f"{run} was aligned: it goes on from a trained run and learns from "
      "rollouts too, so its targets and FLOPs are no D and C of a scaling law; "
      "leave it out of the sweep"
    )
  lines = metrics_writer.read(run / "metrics.jsonl")
  losses = {
    r["step"]: r["loss"]
    for r in lines
    if r["kind"] == "validation" and r.get("loss") is not None
  }
  logged = [r for r in lines if r["kind"] == "train"]
  if not losses or not logged:
    raise ValueError(
      f"{run}/metrics.jsonl has no validation loss, or no training step; train "
      "the run again"
    )
  sids = None
  if record["semantic_ids"]:
    sids = _load_ids(semantic_ids.find(workdir, record["semantic_ids"]))
  model, total = _sizes(config, prepared, sids)
  if config.pipeline.pathways.lifelong:
    # The rows of an epoch, which are counted below, are made with them.
    prepared.snapshots = snapshots.Snapshots.open(
      workdir, assemble.snapshots_name(config, prepared, sids), config.lifelong
    )
  steps, loss_step = logged[-1]["step"], min(losses, key=losses.get)
  rows = config.pipeline
  step_flops = 3.0 * registry.forward_flops(
    model, rows.batch_size, rows.row_positions, rows.row_targets
  )
  targets = steps * rows.batch_size * _targets_of_a_row(prepared, rows)
  return {
    "name": config.name,
    "architecture": config.model.system,
    "seed": config.training.seed,
    "parameters": registry.block_parameters(model),
    "total_parameters": total,
    "loss": losses[loss_step],
    "loss_step": loss_step,
    "steps": steps,
    "targets": round(targets),
    "flops": steps * step_flops,
  }


def _targets_of_a_row(
  prepared: shards.PreparedData, config: config_lib.PipelineConfig
) -> float:
  """How many targets with a loss a row has on average over an epoch.

  Not every training event is one target: some requests may be left out
  (`session`), and a context's events be targets again (`history`).
  """
  rows = pipeline.training_rows(prepared, config)
  parts = rows.segments
  if config.imitate == "all":
    return float(np.sum(parts.stop - parts.first_target)) / len(rows)
  total = 0
  for user, first, stop in zip(parts.user, parts.first_target, parts.stop):
    record = prepared.user(int(user))
    total += rows_lib.imitated(prepared, record, config)[first:stop].sum()
  return float(total) / len(rows)


@functools.lru_cache(maxsize=1)
def _load_ids(folder: pathlib.Path) -> semantic_ids.SemanticIds:
  """Cached: the runs of a sweep mostly share theirs."""
  return semantic_ids.SemanticIds.load(folder)


def _sizes(config, prepared, sids):
  """A run's model, and how many parameters it has."""
  system = assemble.assemble(config, prepared, sids)
  batch = rows_lib.request_batch(
    [], sorted(rows_lib.feature_sizes(prepared)), config.pipeline, 1
  )
  shapes = jax.eval_shape(
    lambda key, *args: nn.unbox(system.model.init(key, *args)),
    jax.random.key(0), batch, system.catalogue,
  )  # fmt: skip
  return system.model, state.num_parameters(shapes["params"])
