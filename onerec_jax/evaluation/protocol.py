"""The evaluation: full ranking, both columns, every credit, always.

One evaluator measures every model. It takes a function from a batch to ranked
items, so a generative model, an item-scoring model and a popularity list are
measured by the same code, on the same queries.

Names of figures: `[filtered/][strict/|sid/|cold/|rare/]metric@k`.
  * Without `filtered/` the list is as retrieved; with it, items of the query's
    whole history are taken out (order kept).
  * Without a credit the hit on a shared semantic ID counts 1 / group size
    (metrics.collision_credit); `strict/`: the item itself; `sid/`: any item
    of the ID.
  * `cold/`, `rare/`: only queries whose target has 0, respectively fewer than
    `RARE`, training events. Where there are none, only `cold/queries` stands.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from rich import progress as rich_progress

from onerec_jax import config as config_lib
from onerec_jax import metrics
from onerec_jax.data import batch as batch_lib
from onerec_jax.data import pipeline
from onerec_jax.evaluation import result

RARE = 5
"""Targets with fewer training events than this are the `rare/` slice."""
COLUMNS = ("", "filtered/")
_CREDITS = {"": "expected", "strict/": "strict", "sid/": "sid"}
_LINEAR = {
  "recall": metrics.recall,
  "ndcg": metrics.ndcg,
  "mrr": metrics.mrr,
}
_SLICES = {"cold/": 1, "rare/": RARE}
_LISTS = ("user", "target", "items", "filtered_items")

Retrieve = Callable[[batch_lib.Batch], tuple[Any, Any]]
"""batch → (items [B, W], scores [B, W]), best first, 0 for an empty slot."""


@dataclasses.dataclass(frozen=True)
class CatalogueInfo:
  """What the evaluator knows of the items.

  Attributes:
    counts: [I + 1] training events of each item; entry 0 is padding.
    sid: [I + 1] number of each item's semantic ID, from 1; entry 0 is 0.
  """

  counts: np.ndarray
  sid: np.ndarray

  @classmethod
  def from_codes(
    cls,
    counts: Int[np.ndarray, "I1"],
    codes: Int[np.ndarray, "rows L"] | None = None,
  ) -> "CatalogueInfo":
    """Numbers the semantic IDs.

    Args:
      counts: [I + 1] training events.
      codes: [I + 1, L] for a model that generates semantic IDs. None for one
        that ranks items: it can tell all of them apart, so no credit is
        shared.

    Raises:
      ValueError: the two do not describe the same catalogue.
    """
    if codes is None:
      return cls(counts=counts, sid=np.arange(len(counts)))
    if len(codes) != len(counts):
      raise ValueError(
        f"{len(codes) - 1} items have codes but {len(counts) - 1} have counts; "
        "tokenize the prepared data again"
      )
    _, sid = np.unique(codes[1:], axis=0, return_inverse=True)
    return cls(counts=counts, sid=np.concatenate([[0], sid + 1]))

  @property
  def num_items(self) -> int:
    """I."""
    return len(self.counts) - 1

  @functools.cached_property
  def group_size(self) -> np.ndarray:
    """[N] items of each semantic ID; entry 0 is padding."""
    return np.bincount(self.sid)


def evaluate(
  retrieve: Retrieve,
  batches: Iterable[tuple[batch_lib.Batch, pipeline.Queries]],
  catalogue: CatalogueInfo,
  config: config_lib.EvaluationConfig,
  *,
  name: str,
  split: str,
  config_fingerprint: str = "",
  num_queries: int | None = None,
  progress: bool = True,
) -> result.Evaluation:
  """Measures a model on every query of a split.

  Args:
    retrieve: see `Retrieve`; W must go beyond the largest cutoff by the items
      that filtering takes out.
    batches: of pipeline.evaluation_batches; rows of user 0 are left out.
    catalogue: of the items.
    config: the cutoffs.
    name: of the run.
    split: `validation` or `test`.
    config_fingerprint: of the whole experiment, reported with the figures.
    num_queries: how many to expect, for the progress bar.
    progress: whether to show one.

  Returns:
    The figures and everything per query.

  Raises:
    ValueError: no queries; lists shorter than the largest cutoff; an item not
      in the catalogue, or twice in a list; NaN scores; bad cutoffs.
  """
  start = time.perf_counter()
  cutoffs = _check_cutoffs(config.cutoffs)
  parts, width = [], 0
  with bar_of(progress) as bar:
    task = bar.add_task(f"evaluating {name} ({split})", total=num_queries)
    for index, (batch, queries) in enumerate(batches):
      items, scores = (np.asarray(x) for x in retrieve(batch))
      where = f"{name}, {split} batch {index}"
      _check_lists(items, scores, queries, catalogue, cutoffs, where)
      parts.append(_measure(items, queries, catalogue, cutoffs))
      width = items.shape[1]
      bar.update(task, advance=len(parts[-1]["user"]))
  arrays = _joined(parts, f"{name}: the {split} split")
  found = {key: arrays.pop(key) for key in _LISTS}
  return result.Evaluation(
    name=name,
    split=split,
    metrics=_figures(found, arrays, catalogue, cutoffs),
    facts={
      "beam_width": width,
      "wall_s": round(time.perf_counter() - start, 3),
      "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
      "config_fingerprint": config_fingerprint,
    },
    per_query=arrays,
    **found,
  )


def _joined(
  parts: list[dict[str, np.ndarray]], what: str
) -> dict[str, np.ndarray]:
  if not sum(len(part["user"]) for part in parts):
    raise ValueError(
      f"{what} gave no queries; check the split of the prepared data "
      "(manifest.json counts its events)"
    )
  return {key: np.concatenate([p[key] for p in parts]) for key in parts[0]}


def bar_of(shown: bool) -> rich_progress.Progress:
  """The bar of an evaluation."""
  return rich_progress.Progress(
    rich_progress.TextColumn("{task.description}"),
    rich_progress.BarColumn(),
    rich_progress.TextColumn("{task.completed} queries"),
    rich_progress.TimeElapsedColumn(),
    rich_progress.TimeRemainingColumn(),
    disable=not shown,
  )


def _check_cutoffs(cutoffs: Iterable[int]) -> tuple[int, ...]:
  found = tuple(sorted(set(cutoffs)))
  if not found or found[0] < 1:
    raise ValueError(
      f"evaluation.cutoffs must be positive integers, not {tuple(cutoffs)}"
    )
  return found


def _check_lists(
  items: np.ndarray,
  scores: np.ndarray,
  queries: pipeline.Queries,
  catalogue: CatalogueInfo,
  cutoffs: tuple[int, ...],
  where: str,
) -> None:
  """Refuses lists that could not be what a model meant to recommend."""
  if items.ndim != 2 or scores.shape != items.shape:
    raise ValueError(
      f"{where}: retrieve must give items and scores [B, W], not "
      f"{items.shape} and {scores.shape}"
    )
  if len(items) != len(queries.user):
    raise ValueError(
      f"{where}: {len(items)} lists for {len(queries.user)} queries"
    )
  if items.shape[1] < cutoffs[-1]:
    raise ValueError(
      f"{where}: lists of {items.shape[1]} items cannot be cut at "
      f"{cutoffs[-1]}; raise evaluation.beam_width or lower the cutoffs"
    )
  real = queries.user > 0
  ranges = (("item", items), ("target", queries.target[:, None]))
  for (kind, ids), least in zip(ranges, (0, 1)):
    bad = real[:, None] & ((ids < least) | (ids > catalogue.num_items))
    if bad.any():
      row, slot = np.argwhere(bad)[0]
      raise ValueError(
        f"{where}, row {row} (user {queries.user[row]}), slot {slot}: {kind} "
        f"{ids[row, slot]} is not in {least}..{catalogue.num_items}; model, "
        "semantic IDs and prepared data must describe the same catalogue"
      )
  if np.isnan(scores[real]).any():
    raise ValueError(f"{where}: NaN scores; the parameters are broken")
  ordered = np.sort(items[real], axis=1)
  twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)
  if twice.any():
    row, slot = np.argwhere(twice)[0]
    raise ValueError(
      f"{where}: item {ordered[row, slot]} stands twice in the list of user "
      f"{queries.user[real][row]}; retrieve must not repeat items"
    )


def _measure(
  items: np.ndarray,
  queries: pipeline.Queries,
  catalogue: CatalogueInfo,
  cutoffs: tuple[int, ...],
) -> dict[str, np.ndarray]:
  """Everything per query of one batch, without its padding rows."""
  rows = np.flatnonzero(queries.user > 0)
  depth = cutoffs[-1]
  ranked = items[rows].astype(np.int32)
  target = queries.target[rows].astype(np.int32)
  seen = [np.asarray(queries.seen[row]) for row in rows]
  lists = {
    "": ranked[:, :depth],
    "filtered/": metrics.drop_seen(ranked, seen, depth),
  }
  found = {
    "user": queries.user[rows].astype(np.int32),
    "target": target,
    "items": lists[""],
    "filtered_items": lists["filtered/"],
    "seen_target_rate": np.array(
      [np.any(s == t) for s, t in zip(seen, target)], np.float32
    ),
  }
  for column, shown in lists.items():
    credits = metrics.collision_credit(
      shown,
      target,
      catalogue.sid[shown],
      catalogue.sid[target],
      catalogue.group_size,
    )
    for k in cutoffs:
      for prefix, credit in _CREDITS.items():
        for metric, function in _LINEAR.items():
          value = function(getattr(credits, credit), k)
          found[f"{column}{prefix}{metric}@{k}"] = value.astype(np.float32)
      rate = metrics.valid_rate(shown, k)
      found[f"{column}valid_rate@{k}"] = rate.astype(np.float32)
  return found


def _figures(
  found: dict[str, np.ndarray],
  per_query: dict[str, np.ndarray],
  catalogue: CatalogueInfo,
  cutoffs: tuple[int, ...],
) -> dict[str, float | int]:
  """Means over queries, slices, and what describes all lists together."""
  target = found["target"]
  figures = {
    "queries": len(target),
    "users": len(np.unique(found["user"])),
    **{
      k: float(v.mean(dtype=np.float64)) for k, v in sorted(per_query.items())
    },
  }
  shared = catalogue.group_size[catalogue.sid[target]] > 1
  figures["shared_sid_rate"] = float(shared.mean())
  for part, below in _SLICES.items():
    chosen = metrics.cold(target, catalogue.counts, below)
    figures[f"{part}queries"] = int(chosen.sum())
    if not chosen.any():
      continue
    for column in COLUMNS:
      for metric in [f"{m}@{k}" for k in cutoffs for m in ("recall", "ndcg")]:
        values = per_query[column + metric][chosen]
        figures[f"{column}{part}{metric}"] = float(
          values.mean(dtype=np.float64)
        )
  percentile = metrics.popularity_percentile(catalogue.counts)
  for column, lists in zip(COLUMNS, (found["items"], found["filtered_items"])):
    for k in cutoffs:
      counts = metrics.recommendation_counts(lists, catalogue.num_items, k)
      figures[f"{column}coverage@{k}"] = metrics.coverage(counts)
      # Undefined when a model recommends nothing at all; valid_rate says so.
      if counts.any():
        figures[f"{column}gini@{k}"] = metrics.gini(counts)
        figures[f"{column}popularity@{k}"] = metrics.mean_popularity(
          counts, percentile
        )
  return figures


def popularity_retrieve(counts: Int[np.ndarray, "I1"], width: int) -> Retrieve:
  """The baseline: the same most popular items for everybody.

  Args:
    counts: [I + 1] events of the training part only; ties go to the lower id.
    width: items of a list; the largest cutoff plus the longest history is
      enough for filtering to leave a full list.

  Raises:
    ValueError: more items are asked for than there are.
  """
  if not 1 <= width <= len(counts) - 1:
    raise ValueError(
      f"width {width} is not in 1..{len(counts) - 1}, the catalogue's size"
    )
  # A stable sort keeps the lower id first among equals.
  order = np.argsort(-counts[1:].astype(np.int64), kind="stable")[:width] + 1
  scores = counts[order].astype(np.float32)

  def retrieve(batch: batch_lib.Batch) -> tuple[np.ndarray, np.ndarray]:
    shape = (batch.items.shape[0], width)
    return np.broadcast_to(order, shape), np.broadcast_to(scores, shape)

  return retrieve


def rank_from_scores(
  scores: Float[Array, "B I1"], width: int
) -> tuple[Int[Array, "B W"], Float[Array, "B W"]]:
  """Ranks the whole catalogue by exact scores; ties go to the lower id.

  Args:
    scores: [B, I + 1]; column 0 is padding and not read, -inf is not allowed
      to be recommended.
    width: W.

  Returns:
    items [B, W] (0 where only -inf is left) and their scores.
  """
  # top_k puts the lower index first among equal scores.
  values, index = jax.lax.top_k(scores[:, 1:], width)
  return jnp.where(values > -jnp.inf, index + 1, 0), values


def exact_retrieve(
  scores_fn: Callable[[batch_lib.Batch], Float[Array, "B I1"]], width: int
) -> Retrieve:
  """Full-catalogue scoring as a `Retrieve`: the oracle of beam search."""
  return lambda batch: rank_from_scores(scores_fn(batch), width)
