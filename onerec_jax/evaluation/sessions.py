"""Sessions: a model answers a held-out request with m items at once.

Every model serves this: its session is the first m items of its list, which
for a session model are its best session (inference/session_search.py) and for
a point-wise one its m best items. A query is a held-out request of at least m
items; the model knows what came before the request.

Figures, means over queries, in two columns as elsewhere (protocol.py):
  precision@m   share of the m shown items that the request held
  hit@m         whether there is one
  ndcg@m        gain 1 / log2(j + 2) where the item of slot j, from 0, is one,
                over that of a session of nothing else
  diversity@m   share of the pairs of shown items that differ in category
  full@m        share of the m slots that are filled
Without `filtered/` anything may be shown; with it, neither an item of the
user's history nor one that no training event names (not launched yet, as far
as a model can know). The search itself is restricted, so sessions stay whole.
INFERRED: OneRec measures sessions by its reward model alone.
"""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Int

from onerec_jax import config as config_lib
from onerec_jax.data import shards, splits
from onerec_jax.data.batch import Batch
from onerec_jax.evaluation import bootstrap, held_out, protocol, result
from onerec_jax.simulation import truth
from onerec_jax.simulation.policies import LoggingPolicy
from onerec_jax.simulation.world import World

Retrieve = Callable[[Batch, np.ndarray | None], tuple[Any, Any]]
"""(batch, allowed [B, I + 1] or None) → (items [B, W], scores [B, W])."""


def evaluate(
  retrieve: Retrieve,
  prepared: shards.PreparedData,
  requests: held_out.Requests,
  config: config_lib.Config,
  *,
  split: str,
  progress: bool = True,
) -> result.Evaluation:
  """Measures a model's sessions.

  Args:
    retrieve: see `Retrieve`.
    prepared: the data.
    requests: held_out.requests of it.
    config: the experiment; m is `pipeline.session_items`.
    split: `validation` or `test`.
    progress: whether to show a bar.

  Returns:
    Figures and everything per query, `good` among it; `target` is the first
    item of each request, `split` gets the ending `_sessions`.
  """
  start = time.perf_counter()
  m = config.pipeline.session_items
  shown = _shown(retrieve, prepared, requests, config, progress)
  category = prepared.item_features().get("category")
  per_query = {"good": requests.good.astype(np.float32)}
  for column, sessions in shown.items():
    found = measure(sessions, requests.items, category)
    per_query |= {f"{column}{name}@{m}": v for name, v in found.items()}
  figures = {name: float(v.mean()) for name, v in per_query.items()}
  sizes = {"queries": len(requests), "users": len(np.unique(requests.user))}
  return result.Evaluation(
    name=config.name,
    split=f"{split}_sessions",
    metrics=sizes | figures,
    facts={
      "beam_width": config.evaluation.beam_width,
      "wall_s": round(time.perf_counter() - start, 3),
      "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
      "config_fingerprint": config_lib.fingerprint(config),
    },
    user=requests.user.astype(np.int32),
    target=np.asarray([items[0] for items in requests.items], np.int32),
    items=shown[""],
    filtered_items=shown["filtered/"],
    per_query=per_query,
  )


def _shown(
  retrieve: Retrieve,
  prepared: shards.PreparedData,
  requests: held_out.Requests,
  config: config_lib.Config,
  progress: bool,
) -> dict[str, np.ndarray]:
  """The sessions of each column: int32 [Q, m], 0 for an empty slot."""
  m, size = config.pipeline.session_items, batch_size(config)
  shown = {c: np.zeros((len(requests), m), np.int32) for c in protocol.COLUMNS}
  known = prepared.item_counts > 0
  with protocol.bar_of(progress) as bar:
    task = bar.add_task(f"sessions of {config.name}", total=len(requests))
    for batch, rows in held_out.batches(
      prepared, requests, config.pipeline, m, size
    ):
      one = held_out.first_of_session(batch)
      for column in protocol.COLUMNS:
        allowed = None
        if column:
          allowed = allowed_items(prepared, requests, rows, known, size)
        items = np.asarray(retrieve(one, allowed)[0])[: len(rows), :m]
        shown[column][rows, : items.shape[1]] = items
      bar.update(task, advance=len(rows))
  return shown


def validator(
  config: config_lib.Config,
  prepared: shards.PreparedData,
  retrieve: Callable[..., tuple[Any, Any]],
  mean_loss: Callable[[Any, Iterator], float],
) -> Callable[[Any], dict[str, float]]:
  """Gives params → figures and loss on a fixed sample of requests.

  Args:
    config: the experiment; `evaluation.validation_users` requests are drawn.
    prepared: the data.
    retrieve: as `Retrieve`, after params.
    mean_loss: of params over held_out.batches.
  """
  m, size = config.pipeline.session_items, batch_size(config)
  requests = held_out.requests(
    prepared, splits.VALIDATION, m, config.evaluation.validation_users
  )

  def validate(params: Any) -> dict[str, float]:
    found = evaluate(
      functools.partial(retrieve, params), prepared, requests, config,
      split="validation", progress=False,
    )  # fmt: skip
    drawn = held_out.batches(prepared, requests, config.pipeline, m, size)
    figures = {n: found.metrics[n] for n in found.per_query}
    return figures | {"loss": mean_loss(params, drawn)}

  return validate


def batch_size(config: config_lib.Config) -> int:
  """Rows that divide over the devices; the last batch is filled up anyway."""
  devices = jax.device_count()
  return -(-config.evaluation.batch_size // devices) * devices


def allowed_items(
  prepared: shards.PreparedData,
  requests: held_out.Requests,
  rows: np.ndarray,
  known: np.ndarray,
  size: int,
) -> Bool[np.ndarray, "B I1"]:
  """What the column `filtered/` may show to each of the rows.

  Args:
    prepared: the data.
    requests: as asked.
    rows: which of them.
    known: bool [I + 1], items that training events name.
    size: B, at least as many as the rows.
  """
  allowed = np.repeat(known[None], size, axis=0)
  for place, i in enumerate(rows):
    record = prepared.user(int(requests.user[i]) - 1)
    allowed[place, record.items[: requests.first[i]]] = False
  return allowed


def measure(
  shown: Int[np.ndarray, "Q m"],
  held: list[np.ndarray],
  category: Int[np.ndarray, "I1"] | None,
) -> dict[str, np.ndarray]:
  """The figures of each query; see the module docstring.

  Args:
    shown: sessions, 0 for an empty slot.
    held: the items of each request, at least m.
    category: of each item, 0 unknown; None: no `diversity`.

  Returns:
    Name → float32 [Q]. A session without two items of known category has
    diversity 0.
  """
  m = shown.shape[1]
  hits = np.stack([np.isin(s, h) for s, h in zip(shown, held)]) & (shown > 0)
  gain = 1 / np.log2(np.arange(m) + 2.0)
  found = {
    "precision": hits.mean(axis=1),
    "hit": hits.any(axis=1),
    "ndcg": hits @ gain / gain.sum(),
    "full": (shown > 0).mean(axis=1),
  }
  if category is not None:
    of = np.where(shown > 0, category[shown], 0)
    a, b = np.triu_indices(m, 1)
    known = (of[:, a] > 0) & (of[:, b] > 0)
    differ = known & (of[:, a] != of[:, b])
    pairs = np.maximum(known.sum(axis=1), 1)
    found["diversity"] = differ.sum(axis=1) / pairs
  return {name: np.asarray(v, np.float32) for name, v in found.items()}


def with_true_values(
  found: result.Evaluation,
  prepared: shards.PreparedData,
  requests: held_out.Requests,
  config: config_lib.SimulationConfig,
) -> result.Evaluation:
  """Adds what the sessions are worth to the users of the simulated world.

  Plays the world that made the data again and asks it, at each request, for
  the expected feedback to the session of the column `filtered/`
  (truth.session_values). Adds `true/clicks` and `true/watch_s`, and beside
  them `true/logged_…`, of what the log shows, and `true/oracle_…`.

  Args:
    found: `evaluate` on these requests.
    prepared: data of the source `simulator`, of all its events.
    requests: as measured.
    config: of the world.

  Raises:
    ValueError: an empty slot, or data that leaves events out.
  """
  values = true_values(
    prepared, requests, found.filtered_items, config, found.name
  )
  values = {
    f"true/{name}": value
    for name, value in values.items()
    if name.endswith(("clicks", "watch_s"))
  }
  means = {name: float(value.mean()) for name, value in values.items()}
  return dataclasses.replace(
    found,
    metrics=found.metrics | means,
    per_query=found.per_query | values,
  )


def true_values(
  prepared: shards.PreparedData,
  requests: held_out.Requests,
  shown: Int[np.ndarray, "Q *W m"],
  config: config_lib.SimulationConfig,
  name: str,
) -> dict[str, np.ndarray]:
  """truth.session_values of held-out requests, in the data's dense ids.

  Args:
    prepared: data of the source `simulator`, of all its events.
    requests: of these data.
    shown: a session of each request, or W of them; no slot empty.
    config: of the world.
    name: whose sessions they are, for messages.

  Raises:
    ValueError: an empty slot, or data that leaves events out.
  """
  if (shown <= 0).any():
    raise ValueError(f"{name}: a session to be valued has an empty slot")
  if left_out := sum(prepared.manifest["dropped_events"].values()):
    raise ValueError(
      f"{prepared.directory} leaves out {left_out} of the world's events, and "
      "so its requests cannot be found again in the world; prepare it without "
      "prepare.where, min_user_events and min_item_events"
    )
  world = World.create(config)
  number = lambda raw: np.asarray([int(name[1:]) for name in raw], np.int32)
  users = number(prepared.users["raw_id"].to_pylist())
  items = number(prepared.items["raw_id"].to_pylist())
  return truth.session_values(
    world,
    LoggingPolicy.create(world),
    users[requests.user - 1],
    requests.number.astype(np.int64),
    items[shown - 1],
  )


def compare(
  a: Sequence[result.Evaluation], b: Sequence[result.Evaluation]
) -> list[dict[str, Any]]:
  """Two models on the same requests, each by its seeds.

  A request's value is the mean over the seeds; intervals are of the paired
  bootstrap over users (bootstrap.py). What sessions are to hit is measured on
  all requests and, as `good/`, on those like the ones learnt from.

  Args:
    a: `evaluate` of one model, a seed each.
    b: of the other.

  Returns:
    For each metric `metric`, `mean_a`, `std_a` (over seeds; None of one),
    `mean_b`, `std_b`, `difference`, `low`, `high`, `above_zero`, `queries`.

  Raises:
    ValueError: they were measured on other requests.
  """
  first = a[0]
  for other in (*a, *b):
    same = np.array_equal(first.user, other.user)
    if not (same and np.array_equal(first.target, other.target)):
      raise ValueError(
        f"{first.name} and {other.name} were measured on different requests; "
        "evaluate both on the same prepared data and split"
      )
  rows = []
  good = first.per_query["good"] > 0
  for prefix, kept in (("", np.ones_like(good)), ("good/", good)):
    if not kept.any():
      continue
    names = [n for n in first.per_query if n != "good"]
    names = [n for n in names if not prefix or not n.startswith("true/")]
    values = [_by_seed(seeds, names, kept) for seeds in (a, b)]
    means = [v.mean(axis=0) for v in values]
    found = bootstrap.intervals(means[0] - means[1], first.user[kept])
    for place, (name, interval) in enumerate(zip(names, found)):
      row = {"metric": prefix + name, "queries": int(kept.sum())}
      for side, seeds in zip("ab", values):
        figures = seeds[:, :, place].mean(axis=1)
        row[f"mean_{side}"] = float(figures.mean())
        several = len(figures) > 1
        row[f"std_{side}"] = float(figures.std(ddof=1)) if several else None
      row["difference"] = interval.mean
      rows.append(row | dataclasses.asdict(interval))
  for row in rows:
    del row["mean"]
  return rows


def _by_seed(
  seeds: Sequence[result.Evaluation], names: list[str], kept: np.ndarray
) -> np.ndarray:
  """[seeds, Q, M] float64."""
  columns = [
    np.stack([e.per_query[name][kept] for name in names], axis=1) for e in seeds
  ]
  return np.stack(columns).astype(np.float64)
