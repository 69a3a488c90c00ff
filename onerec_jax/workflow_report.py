"""The last step of the way: evaluations → examples, a page, the ledger."""

import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from onerec_jax import files, semantic_ids
from onerec_jax.data import shards, splits
from onerec_jax.evaluation import report as report_page
from onerec_jax.evaluation import tables
from onerec_jax.evaluation.result import Evaluation
from onerec_jax.inference import assemble


def examples(
  workdir: files.PathLike, evaluations: Sequence[Evaluation], number: int
) -> list[tables.Example]:
  """What the models recommend to a few users, evenly spread over all."""
  prepared = shards.PreparedData.open(workdir, verify=False)
  # A user's first query is shown, which is not of the first test event where
  # `pipeline.imitate` leaves that out.
  asked, first = np.unique(evaluations[0].user, return_index=True)
  places = np.linspace(0, len(asked) - 1, min(number, len(asked)))
  chosen = places.round().astype(int)
  users = asked[chosen].tolist()
  histories = {}
  for user, target in zip(users, evaluations[0].target[first[chosen]]):
    record = prepared.user(user - 1)
    test = (record.split == splits.TEST) & (record.items == target)
    histories[user] = record.items[: np.flatnonzero(test)[0]].tolist()
  raw = prepared.items["raw_id"].to_pylist()
  titles = [""] + [
    title or str(item)
    for title, item in zip(prepared.items["title"].to_pylist(), raw)
  ]
  names = dict(
    zip(users, (f"user {prepared.users['raw_id'][u - 1]}" for u in users))
  )
  return tables.examples(evaluations, histories, titles, names=names)


def report(
  workdir: files.PathLike,
  evaluations: Sequence[Evaluation],
  shown: Sequence[tables.Example],
) -> pathlib.Path:
  """Writes <workdir>/report.html; returns its path."""
  semantic = None
  for evaluation in evaluations:
    path = assemble.run_directory(workdir, evaluation.name) / "config.json"
    name = files.read_json(path)["semantic_ids"] if path.exists() else ""
    if name:
      folder = semantic_ids.find(workdir, name)
      semantic = semantic_ids.SemanticIds.load(folder)
      break
  return report_page.write_report(
    workdir, evaluations, shown, semantic=semantic
  )


def summary(workdir: files.PathLike, evaluation: Evaluation) -> dict[str, Any]:
  """An evaluation's figures with what training took, for the ledger.

  Adds `train_s` (steps alone), `best_step` and the run's `config`; nothing
  for a baseline that is not trained.
  """
  run = assemble.run_directory(workdir, evaluation.name)
  found = evaluation.summary()
  if (run / "finished.json").exists():
    progress = files.read_json(run / "finished.json")
    found |= {
      "train_s": progress["seconds"],
      "best_step": progress["best_step"],
      "config": files.read_json(run / "config.json")["config"],
    }
  return found
