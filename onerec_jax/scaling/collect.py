"""The points of a scaling law, collected from the finished runs of a sweep."""

import functools
import pathlib
from typing import Any

import jax
from flax import linen as nn

from onerec_jax import files, semantic_ids
from onerec_jax.data import rows as rows_lib
from onerec_jax.data import shards
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
  held-out targets) at `best_step`, which evaluation.select picked, and
  `lowest_loss` of all validations; `steps`, `targets` (training targets seen)
  and `flops` (three forward passes a step, padding included), all three of the
  whole run: its schedule is as long as that, wherever the best step was.

  Args:
    sweep: the sweep.
    workdir: the work directory; its data is that of the runs.

  Raises:
    ValueError: a run of it was trained on other data, or did not record what
      a point needs.
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
  best_step = files.read_json(run / "finished.json")["best_step"]
  lines = metrics_writer.read(run / "metrics.jsonl")
  losses = {r["step"]: r.get("loss") for r in lines if r["kind"] != "train"}
  logged = [r for r in lines if r["kind"] == "train"]
  if losses.get(best_step) is None or not logged:
    raise ValueError(
      f"{run}/metrics.jsonl has no validation loss at the best step "
      f"{best_step}; train the run again"
    )
  model, total = _sizes(config, workdir, prepared, record["semantic_ids"])
  steps = logged[-1]["step"]
  rows = config.pipeline
  step_flops = 3.0 * registry.forward_flops(
    model, rows.batch_size, rows.row_positions, rows.row_targets
  )
  # Every training event is a target once an epoch.
  targets = logged[-1]["epoch"] * float(prepared.train_lengths.sum())
  return {
    "name": config.name,
    "architecture": config.model.system,
    "seed": config.training.seed,
    "parameters": registry.block_parameters(model),
    "total_parameters": total,
    "loss": losses[best_step],
    "best_step": best_step,
    "lowest_loss": min(loss for loss in losses.values() if loss is not None),
    "steps": steps,
    "targets": round(targets),
    "flops": steps * step_flops,
  }


@functools.lru_cache(maxsize=1)
def _load_ids(folder: pathlib.Path) -> semantic_ids.SemanticIds:
  """Cached: the runs of a sweep mostly share theirs."""
  return semantic_ids.SemanticIds.load(folder)


def _sizes(config, workdir, prepared, fingerprint):
  """A run's model, and how many parameters it has."""
  sids = None
  if fingerprint:
    sids = _load_ids(semantic_ids.find(workdir, fingerprint))
  system = assemble.assemble(config, prepared, sids)
  batch = rows_lib.request_batch(
    [], sorted(rows_lib.feature_sizes(prepared)), config.pipeline, 1
  )
  shapes = jax.eval_shape(
    lambda key, *args: nn.unbox(system.model.init(key, *args)),
    jax.random.key(0), batch, system.catalogue,
  )  # fmt: skip
  return system.model, state.num_parameters(shapes["params"])
