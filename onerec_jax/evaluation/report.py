"""The report: one self-contained HTML page about the runs of a work directory.

No network, no scripts: style inline, pictures as data URIs. All text passes
through jinja2's autoescape, since titles come from data.
"""

import pathlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jinja2

from onerec_jax import files, semantic_ids
from onerec_jax.evaluation import plots, result, tables
from onerec_jax.training import metrics_writer

_TEMPLATE = pathlib.Path(__file__).with_name("report.html.j2")
# Figures beyond the headline: label, key without cutoff, how to read it.
_BESIDE = (
  ("strict recall", "strict/recall", "the item itself, shared IDs or not"),
  ("sid recall", "sid/recall", "any item of the semantic ID"),
  ("MRR", "mrr", "mean of 1 / rank"),
  ("valid", "valid_rate", "share of slots that hold an item"),
  ("valid, filtered", "filtered/valid_rate", "below 1: lists ran out"),
  ("coverage", "coverage", "share of the catalogue recommended"),
  ("Gini", "gini", "0: all items equally often, 1: one item only"),
  ("popularity", "popularity", "mean percentile of what is recommended"),
  ("cold recall", "cold/recall", "targets never seen in training"),
  ("rare recall", "rare/recall", "targets with fewer than 5 events"),
)
_COUNTS = ("users", "items", "events")


def write_report(
  workdir: files.PathLike,
  evaluations: Sequence[result.Evaluation],
  recommendations: Sequence[tables.Example] = (),
  *,
  title: str = "onerec_jax",
  semantic: semantic_ids.SemanticIds | None = None,
  baselines: Iterable[str] = tables.BASELINES,
) -> pathlib.Path:
  """Writes <workdir>/report.html.

  Reads prepared/manifest.json and models/<name>/metrics.jsonl where they are.

  Args:
    workdir: of the runs.
    evaluations: one a model, on the same queries.
    recommendations: a few users.
    title: of the page.
    semantic: the semantic IDs, for the codebook section.
    baselines: names of runs to compare the others with.

  Returns:
    The page's path.

  Raises:
    ValueError: no evaluations, or they were measured on different queries.
  """
  if not evaluations:
    raise ValueError("there are no evaluations to report; evaluate a model")
  workdir = pathlib.Path(workdir)
  runs = {
    e.name: metrics_writer.read(workdir / "models" / e.name / "metrics.jsonl")
    for e in evaluations
  }
  for other in evaluations[1:]:
    result.same_queries(evaluations[0], other)
  largest = tables.cutoffs(evaluations)[-1]
  environment = jinja2.Environment(
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters |= {"figure": _figure, "signed": "{:+.4f}".format}
  page = environment.from_string(_TEMPLATE.read_text()).render(
    title=title,
    **_facts(workdir, evaluations),
    table=_headline(evaluations),
    intervals=plots.metric_intervals(evaluations, f"ndcg@{largest}"),
    comparisons=[
      {**row, "verdict": tables.verdict(row)}
      for row in tables.comparisons(evaluations, baselines)
    ],
    beside=_beside(evaluations, largest),
    curves=_curves(runs, largest),
    codebooks=_codebooks(semantic),
    recommendations=recommendations,
  )
  path = workdir / "report.html"
  files.write_bytes(path, page.encode())
  return path


def _facts(
  workdir: pathlib.Path, evaluations: Sequence[result.Evaluation]
) -> dict[str, Any]:
  """What was run, on what."""
  path = workdir / "prepared" / "manifest.json"
  manifest = files.read_json(path) if path.exists() else {}
  counts = [(name, manifest.get(f"num_{name}")) for name in _COUNTS]
  first = evaluations[0]
  return {
    "split": first.split,
    "manifest": manifest,
    "counts": [(name, n) for name, n in counts if n is not None],
    "models": [e.name for e in evaluations],
    "facts": [{"name": e.name, **e.facts} for e in evaluations],
    "queries": first.metrics["queries"],
    "slices": {p: first.metrics[f"{p}/queries"] for p in ("cold", "rare")},
    "seen_target_rate": first.metrics["seen_target_rate"],
  }


def _figure(value: Any) -> str:
  """A number as the page shows it; an en dash where there is none."""
  if value is None:
    return "–"
  if isinstance(value, int):
    return f"{value:,}"
  return f"{value:.4f}" if isinstance(value, float) else str(value)


def _headline(evaluations: Sequence[result.Evaluation]) -> dict[str, Any]:
  """Rows of the result table; `best` marks the first of a column."""
  metrics = tables.headline(tables.cutoffs(evaluations))
  keys = [column + m for column in ("", "filtered/") for m in metrics]
  best = {key: max(e.metrics[key] for e in evaluations) for key in keys}
  return {
    "labels": [tables.short(metric) for metric in metrics],
    "rows": [
      {
        "name": e.name,
        "cells": [
          {"value": e.metrics[key], "best": e.metrics[key] == best[key]}
          for key in keys
        ],
      }
      for e in evaluations
    ],
  }


def _beside(
  evaluations: Sequence[result.Evaluation], cutoff: int
) -> list[dict[str, Any]]:
  """One row a figure that at least one model has."""
  rows = []
  for label, key, meaning in _BESIDE:
    values = [e.metrics.get(f"{key}@{cutoff}") for e in evaluations]
    if any(value is not None for value in values):
      rows.append(
        {"label": f"{label} @{cutoff}", "meaning": meaning, "values": values}
      )
  return rows


def _curves(
  runs: Mapping[str, Sequence[Mapping[str, Any]]], cutoff: int
) -> list[plots.Picture]:
  wanted = (
    ("train", "loss"),
    ("validation", "loss"),
    ("validation", f"ndcg@{cutoff}"),
    ("validation", f"recall@{cutoff}"),
    ("train", "targets_per_s"),
  )
  drawn = [plots.curves(runs, kind, key) for kind, key in wanted]
  return [picture for picture in drawn if picture is not None]


def _codebooks(
  semantic: semantic_ids.SemanticIds | None,
) -> dict[str, Any] | None:
  """Each level's usage, and the quality figures that are plain numbers."""
  if semantic is None:
    return None
  codes = semantic.codes[1:]
  levels = [
    {
      **figures,
      "size": size,
      "picture": plots.code_usage(codes[:, level], size, level + 1),
    }
    for level, (size, figures) in enumerate(
      zip(semantic.codebook_sizes, semantic.report["levels"])
    )
  ]
  return {
    "fingerprint": semantic.fingerprint,
    "collisions": semantic.collisions,
    "levels": levels,
    "quality": [
      (key.replace("_", " "), value)
      for key, value in semantic.report.items()
      if isinstance(value, int | float)
    ],
  }
