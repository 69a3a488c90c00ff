"""Prepared data → semantic IDs in the work directory."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import rich.console
import rich.progress
import rich.table
import rich.text
from jaxtyping import Int

from onerec_jax import config as config_lib
from onerec_jax import files, semantic_ids
from onerec_jax.data import shards, splits
from onerec_jax.tokenizer import (
  extension,
  item_vectors,
  neighbours,
  residual,
  vectorizer,
)

ALGORITHM_VERSION = 1
"""Raised when the same config would give other codes than before."""


ALIGNED_VERSION = 2
"""The same, of `aligned` vectors alone. 2: of positive events."""


def training_events(
  prepared: shards.PreparedData, positive_alone: bool
) -> tuple[Int[np.ndarray, "U1"], Int[np.ndarray, "events"]]:
  """Offsets of users and dense item ids of their training events."""
  kept = []
  for index in range(len(prepared)):
    record = prepared.user(index)
    training = record.split == splits.TRAIN
    if positive_alone:
      training &= record.positive
    kept.append(record.items[training])
  offsets = np.cumsum([0, *map(len, kept)])
  return offsets, np.concatenate([np.zeros(0, np.int32), *kept])


def fingerprint(
  config: config_lib.TokenizerConfig, prepared: shards.PreparedData
) -> str:
  """Names the semantic IDs that `tokenize` makes of these inputs."""
  matrix = ""
  if config.vectors == "embedding" and config.embedding:
    item_vectors.check_file(config.embedding)
    matrix = files.sha256(config.embedding)
  settings = config_lib.to_dict(config)
  if config.vectors == "aligned":
    settings["version"] = ALIGNED_VERSION
  else:
    # Not read: they change nothing.
    del settings["qformer"]
  return files.fingerprint(
    ALGORITHM_VERSION,
    settings,
    prepared.manifest["fingerprint"],
    matrix,
  )


def tokenize(
  config: config_lib.TokenizerConfig,
  prepared: shards.PreparedData,
  workdir: files.PathLike,
  mesh: jax.sharding.Mesh | None = None,
) -> semantic_ids.SemanticIds:
  """Makes semantic IDs, or loads those of the same inputs.

  Fitted on the item table and on training events only. IDs that lack their
  vectorizer (see vectorizer.py) get one and stay as they are.

  Args:
    config: the tokenizer's part of the config tree.
    prepared: the prepared data.
    workdir: IDs go to <workdir>/semantic_ids/<fingerprint>/.
    mesh: shards the k-means over its `data` axis; none: one device.

  Raises:
    CodebookCollapseError: the IDs would tell too few items apart.
    ValueError: a bad setting or matrix, or a broken artefact; named.
  """
  console = rich.console.Console(stderr=True)
  name = fingerprint(config, prepared)
  folder = semantic_ids.root(workdir) / name
  coded = semantic_ids.exists(folder)
  if coded and vectorizer.exists(folder):
    console.print(f"semantic IDs {name} are there already", highlight=False)
    return semantic_ids.SemanticIds.load(folder)
  with _progress(console) as progress:
    task = progress.add_task("reading events", total=config.num_levels + 3)

    def stage(text: str) -> None:
      progress.update(task, description=text, advance=1)

    fitted = _fit_vectors(config, prepared, progress, task)
    if coded:
      fitted.save(folder)
      return semantic_ids.SemanticIds.load(folder)
    coding = residual.fit(
      fitted.vectors, config, mesh, lambda level: stage(f"level {level + 1}")
    )
    stage("quality")
    ids = as_artefact(fitted.vectors, coding, config, name)
    progress.update(task, completed=config.num_levels + 3)
  fitted.save(folder)
  # Last: a folder with semantic IDs is whole.
  ids.save(folder)
  print_report(ids.report, console)
  return ids


def _fit_vectors(
  config: config_lib.TokenizerConfig,
  prepared: shards.PreparedData,
  progress: rich.progress.Progress,
  task: rich.progress.TaskID,
) -> vectorizer.Fitted:
  """Reads the training events and makes the items' vectors of them."""

  def aligning(step: int, steps: int, loss: float) -> None:
    text = f"item vectors: step {step}/{steps}, loss {loss:.3f}"
    progress.update(task, description=text)

  # V1 pairs what was liked: of a log of all that was shown, little else was.
  offsets, events = training_events(prepared, config.vectors == "aligned")
  progress.update(task, description="item vectors", advance=1)
  vectors, frozen, line = item_vectors.fit(
    config, prepared.items, offsets, events, aligning
  )
  progress.console.print(line, highlight=False)
  return vectorizer.Fitted(frozen, vectors, prepared.manifest["fingerprint"])


def _progress(console: rich.console.Console) -> rich.progress.Progress:
  return rich.progress.Progress(
    rich.progress.TextColumn("{task.description}"),
    rich.progress.BarColumn(),
    rich.progress.TimeElapsedColumn(),
    console=console,
  )


def extend(
  workdir: files.PathLike,
  fingerprint: str,
  new_items: pa.Table,
  embedding: str = "",
) -> semantic_ids.SemanticIds:
  """Gives new items semantic IDs; those that exist do not change.

  The result is an artefact of its own, <workdir>/semantic_ids/<its
  fingerprint>/, with the new items (extension.py). It may be extended again.

  Args:
    workdir: holds the prepared data and the semantic IDs.
    fingerprint: of the IDs to extend: `tokenize`'s, or an extension's.
    new_items: `item_id` and what else the item table had: `title`, `text`, …
    embedding: vectors `embedding`: .npy [new items, D]; empty: the table's
      `embedding` column.

  Returns:
    IDs of the known items, then of the new ones in order.

  Raises:
    FileNotFoundError: there are no such IDs.
    ValueError: an item is known already or has no text to go by, a bad row
      or matrix, no free ID near an item, or other data is prepared by now.
  """
  console = rich.console.Console(stderr=True)
  items = extension.check(new_items)
  name = extension.fingerprint(fingerprint, items, embedding)
  folder = semantic_ids.root(workdir) / name
  if semantic_ids.exists(folder):
    console.print(f"semantic IDs {name} are there already", highlight=False)
    return semantic_ids.SemanticIds.load(folder)
  known = extension.Known.load(workdir, fingerprint)
  known.check_new(items)
  with console.status("placing new items"):
    vectors = item_vectors.transform(known.vectorizer, items, embedding)
    extension.check_vectors(known.vectorizer, items, vectors)
    ids = residual.encode_new(vectors, known.ids)
    report = semantic_ids.quality_report(
      ids.codes[1:],
      ids.codebook_sizes,
      np.concatenate([known.vectors, vectors]),
      residual.decode(ids.codes[1:], ids.codebooks),
    ) | neighbours.new_item_report(
      known.vectors, known.ids.codes[1:], vectors, ids.codes[known.rows :]
    )
  ids = dataclasses.replace(ids, fingerprint=name, report=report)
  extension.Extension(fingerprint, known.table(items), vectors).save(folder)
  ids.save(folder)
  return ids


def as_artefact(
  vectors: np.ndarray,
  coding: residual.Coding,
  config: config_lib.TokenizerConfig,
  name: str,
) -> semantic_ids.SemanticIds:
  """Codes with padding and a report.

  Raises:
    CodebookCollapseError: see `semantic_ids.check_collapse`.
  """
  report = semantic_ids.quality_report(
    coding.codes,
    coding.codebook_sizes,
    vectors,
    residual.decode(coding.codes, coding.codebooks),
  )
  semantic_ids.check_collapse(report, len(coding.codebooks))
  return semantic_ids.SemanticIds(
    codes=np.pad(coding.codes, ((1, 0), (0, 0))).astype(np.int32),
    codebook_sizes=coding.codebook_sizes,
    codebooks=coding.codebooks,
    fingerprint=name,
    report=report,
    collisions=config.collisions,
  )


def print_report(report: dict[str, Any], console: rich.console.Console) -> None:
  """Prints a quality report as two tables."""
  levels = rich.table.Table(title="semantic IDs")
  for heading in ("level", "codes", "in use", "entropy", "of maximum"):
    levels.add_column(heading, justify="right")
  for number, level in enumerate(report["levels"], 1):
    levels.add_row(
      str(number),
      str(report["codebook_sizes"][number - 1]),
      f"{level['utilisation']:.1%}",
      f"{level['entropy']:.3f} nats",
      f"{level['entropy_share']:.1%}",
    )
  console.print(levels)
  rest = rich.table.Table(show_header=False)
  for key, value in report.items():
    if isinstance(value, int | float):
      shown = f"{value:.4f}" if isinstance(value, float) else str(value)
      rest.add_row(key.replace("_", " "), shown)
  console.print(rest)


def print_new(
  items: pa.Table, ids: semantic_ids.SemanticIds, console: rich.console.Console
) -> None:
  """Prints the semantic IDs of the items an extension added.

  Args:
    items: `Extension.items`.
    ids: of known and new items.
    console: where to.
  """
  table = rich.table.Table(title=f"new items, semantic IDs {ids.fingerprint}")
  table.add_column("item", overflow="fold")
  table.add_column("semantic ID", no_wrap=True)
  table.add_column("title", no_wrap=True)
  rows = ids.codes[items["item_id"].to_numpy()].tolist()
  for raw, title, codes in zip(
    items["raw_id"].to_pylist(), items["title"].to_pylist(), rows
  ):
    table.add_row(
      rich.text.Text(raw),
      " ".join(map(str, codes)),
      rich.text.Text(title or ""),
    )
  console.print(table)
