"""What an evaluation found: kept whole, saved, compared, averaged over seeds.

On disk: <workdir>/models/<name>/evaluation_<split>.json holds the figures and
the SHA-256 of evaluation_<split>.npz beside it, which holds one entry a query,
so that any two models can be compared later without running either again.
"""

import dataclasses
import io
import pathlib
import zipfile
from collections.abc import Sequence
from typing import Any

import numpy as np

from onerec_jax import files
from onerec_jax.evaluation import bootstrap

FORMAT_VERSION = 1
_PER_QUERY = "per_query/"
# Seeds may be averaged only if these agree: otherwise the protocols differ.
_PROTOCOL_KEYS = ("queries", "users", "beam_width")


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """One model on one split; Q queries, k the largest cutoff.

  Attributes:
    name: of the run.
    split: `validation` or `test`.
    metrics: name → figure over all queries.
    facts: `beam_width`, `wall_s`, `device`, `config_fingerprint`.
    user: [Q] dense user ids.
    target: [Q] held-out items.
    items: [Q, k] unfiltered recommendations, best first, 0 is empty.
    filtered_items: [Q, k] the same without items the user had seen.
    per_query: name → [Q] float32, for each metric that is a mean over queries.
  """

  name: str
  split: str
  metrics: dict[str, float | int]
  facts: dict[str, Any]
  user: np.ndarray
  target: np.ndarray
  items: np.ndarray
  filtered_items: np.ndarray
  per_query: dict[str, np.ndarray]

  def summary(self) -> dict[str, Any]:
    """All figures and facts in one flat dict, JSON-ready."""
    return {**self.metrics, **self.facts}

  def save(self, workdir: files.PathLike) -> pathlib.Path:
    """Writes both files atomically; returns the JSON's path."""
    path = location(workdir, self.name, self.split)
    buffer = io.BytesIO()
    np.savez_compressed(
      buffer,
      user=self.user,
      target=self.target,
      items=self.items,
      filtered_items=self.filtered_items,
      **{_PER_QUERY + key: value for key, value in self.per_query.items()},
    )
    arrays = path.with_suffix(".npz")
    files.write_bytes(arrays, buffer.getvalue())
    # Last, so that a JSON always has its arrays.
    files.write_json(
      path,
      {
        "format_version": FORMAT_VERSION,
        "name": self.name,
        "split": self.split,
        "metrics": self.metrics,
        "facts": self.facts,
        "arrays_sha256": files.sha256(arrays),
      },
    )
    return path

  @classmethod
  def load(cls, workdir: files.PathLike, name: str, split: str) -> "Evaluation":
    """Reads what `save` wrote.

    Raises:
      FileNotFoundError: not evaluated yet.
      ValueError: a newer format, or a broken file, named.
    """
    path = location(workdir, name, split)
    values = files.read_json(path)
    version = values.get("format_version")
    if version != FORMAT_VERSION:
      raise ValueError(
        f"{path} has format version {version!r}, this library reads "
        f"{FORMAT_VERSION}; evaluate again or upgrade"
      )
    arrays = path.with_suffix(".npz")
    if files.sha256(arrays) != values["arrays_sha256"]:
      raise ValueError(
        f"{arrays} is not the file that {path.name} describes; evaluate again"
      )
    try:
      with np.load(arrays, allow_pickle=False) as stored:
        found = {key: stored[key] for key in stored.files}
    except (zipfile.BadZipFile, ValueError) as error:
      raise ValueError(f"{arrays} is broken ({error}); evaluate again") from (
        error
      )
    per_query = {
      key.removeprefix(_PER_QUERY): found.pop(key)
      for key in list(found)
      if key.startswith(_PER_QUERY)
    }
    return cls(
      name=values["name"],
      split=values["split"],
      metrics=values["metrics"],
      facts=values["facts"],
      per_query=per_query,
      **found,
    )


def location(workdir: files.PathLike, name: str, split: str) -> pathlib.Path:
  """Where an evaluation's JSON lies."""
  return pathlib.Path(workdir) / "models" / name / f"evaluation_{split}.json"


def compare(
  a: Evaluation,
  b: Evaluation,
  metric: str,
  *,
  level: float = bootstrap.LEVEL,
  resamples: int = bootstrap.RESAMPLES,
  seed: int = 0,
) -> dict[str, Any]:
  """The difference a - b of a metric, with a paired bootstrap interval.

  Args:
    a: one model.
    b: another, on the same queries (in any order).
    metric: a key of `per_query`, such as `ndcg@10` or `filtered/recall@5`.
    level: of the interval.
    resamples: bootstrap resamples of the users.
    seed: of the resampling.

  Returns:
    `metric`, `a`, `b` (names), `mean_a`, `mean_b`, `difference`, `low`,
    `high`, `above_zero` (share of resamples where a leads), `level`,
    `queries`, `users`.

  Raises:
    ValueError: the queries differ, or the metric is unknown.
  """
  return compare_all(
    a, b, [metric], level=level, resamples=resamples, seed=seed
  )[0]


def compare_all(
  a: Evaluation,
  b: Evaluation,
  metrics: Sequence[str],
  *,
  level: float = bootstrap.LEVEL,
  resamples: int = bootstrap.RESAMPLES,
  seed: int = 0,
) -> list[dict[str, Any]]:
  """`compare` for several metrics with the same draws, one dict a metric."""
  order_a, order_b = same_queries(a, b)
  user = a.user[order_a]
  values_a = _columns(a, metrics)[order_a]
  values_b = _columns(b, metrics)[order_b]
  found = bootstrap.intervals(
    values_a - values_b, user, level=level, resamples=resamples, seed=seed
  )
  return [
    {
      "metric": metric,
      "a": a.name,
      "b": b.name,
      "mean_a": float(mean_a),
      "mean_b": float(mean_b),
      "difference": interval.mean,
      "low": interval.low,
      "high": interval.high,
      "above_zero": interval.above_zero,
      "level": level,
      "queries": len(user),
      "users": len(np.unique(user)),
    }
    for metric, mean_a, mean_b, interval in zip(
      metrics, values_a.mean(axis=0), values_b.mean(axis=0), found
    )
  ]


def _columns(evaluation: Evaluation, metrics: Sequence[str]) -> np.ndarray:
  """[Q, M] float64 of the named per-query metrics."""
  for metric in metrics:
    if metric not in evaluation.per_query:
      raise ValueError(
        f"{evaluation.name} has no per-query metric {metric!r}; it has "
        f"{sorted(evaluation.per_query)}"
      )
  columns = [evaluation.per_query[metric] for metric in metrics]
  return np.stack(columns, axis=1).astype(np.float64)


def same_queries(a: Evaluation, b: Evaluation) -> tuple[np.ndarray, np.ndarray]:
  """Orders in which both have the same (user, target) at each place.

  Raises:
    ValueError: the queries differ.
  """
  orders = [np.lexsort((e.target, e.user)) for e in (a, b)]
  keys = [
    np.stack([e.user[order], e.target[order]], axis=1)
    for e, order in zip((a, b), orders)
  ]
  if a.split == b.split and np.array_equal(*keys):
    return orders[0], orders[1]
  sets = [set(map(tuple, key.tolist())) for key in keys]
  only = sorted(sets[0] ^ sets[1])[:3]
  raise ValueError(
    f"{a.name} ({a.split}, {len(a.user)} queries) and {b.name} ({b.split}, "
    f"{len(b.user)} queries) were measured on different queries"
    + (f", such as (user, target) {only}" if only else "")
    + "; evaluate both on the same prepared data, split and pipeline.imitate, "
    "or leave one out of --models"
  )


def joined(seeds: Sequence[Evaluation]) -> Evaluation:
  """Runs of one model as one: each query's figures are the means over seeds.

  Its name is theirs with `+` between, its lists are the first run's, and it has
  no facts.

  Args:
    seeds: evaluations on the same queries, in any order.

  Raises:
    ValueError: none, or they were not measured alike.
  """
  figures = aggregate([seed.summary() for seed in seeds])
  first = seeds[0]
  if len(seeds) == 1:
    return first
  names, values = list(first.per_query), []
  for seed in seeds:
    here, there = same_queries(first, seed)
    found = _columns(seed, names)
    # In the first run's order.
    found[here] = found[there]
    values.append(found)
  return dataclasses.replace(
    first,
    name="+".join(seed.name for seed in seeds),
    metrics={
      # Counts are the queries', which all share.
      key: value if isinstance(value, int) else figures[key]["mean"]
      for key, value in first.metrics.items()
      if key in figures
    },
    facts={},
    per_query=dict(zip(names, np.mean(values, axis=0).T)),
  )


def aggregate(
  summaries: Sequence[dict[str, Any]],
) -> dict[str, dict[str, float | int]]:
  """Mean and standard deviation over seeds of the figures all runs have.

  Args:
    summaries: one `Evaluation.summary()` a seed.

  Returns:
    metric → `mean`, `std` (of a sample: n - 1 in the denominator; None for a
    single seed, which says nothing of the spread) and `seeds`.

  Raises:
    ValueError: no summaries, or they were not measured alike.
  """
  if not summaries:
    raise ValueError("there are no summaries to average")
  for key in _PROTOCOL_KEYS:
    values = {summary.get(key) for summary in summaries}
    if len(values) > 1:
      raise ValueError(
        f"these runs were not measured alike: {key} is "
        f"{sorted(values, key=str)}"
      )
  result = {}
  for key, first in summaries[0].items():
    if not isinstance(first, int | float) or not all(
      key in s for s in summaries
    ):
      continue
    values = np.array([summary[key] for summary in summaries], np.float64)
    std = float(values.std(ddof=1)) if len(values) > 1 else None
    result[key] = {
      "mean": float(values.mean()),
      "std": std,
      "seeds": len(values),
    }
  return result
