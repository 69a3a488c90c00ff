"""Lifelong histories compressed in the space of the tokenizer's vectors."""

import rich.console
import rich.progress

from onerec_jax import config as config_lib
from onerec_jax import files, semantic_ids
from onerec_jax.data import shards, snapshots
from onerec_jax.tokenizer import vectorizer


def compress(
  config: config_lib.Config,
  prepared: shards.PreparedData,
  sids: semantic_ids.SemanticIds,
  workdir: files.PathLike,
  output: files.PathLike | None = None,
) -> snapshots.Snapshots:
  """The snapshots that a config's pathways read; made where they are not.

  Args:
    config: the experiment; `lifelong`, and `pipeline.pathways.lifelong` as cap.
    prepared: the data.
    sids: semantic IDs made of the vectors.
    workdir: the work directory, where the semantic IDs lie.
    output: where the snapshots go; None: there too.

  Raises:
    ValueError: a setting that allows no representative, or a broken shard.
  """
  folder = semantic_ids.find(workdir, sids.fingerprint)
  console = rich.console.Console(stderr=True)
  with rich.progress.Progress(
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.MofNCompleteColumn(),
    rich.progress.TimeElapsedColumn(),
    console=console,
  ) as progress:
    task = progress.add_task("compressing histories", total=len(prepared))
    found = snapshots.compress(
      config.lifelong,
      config.pipeline.pathways.lifelong,
      prepared,
      vectorizer.Fitted.load(folder).vectors,
      sids.fingerprint,
      workdir if output is None else output,
      lambda user: progress.update(task, completed=user + 1),
    )
    progress.update(task, completed=len(prepared))
  return found
