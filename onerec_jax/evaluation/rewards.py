"""How well a reward model tells held-out answers apart.

An answer is what the log showed: an item, or a whole session of m. A query is
a held-out request; the model knows what came before it.

  auc_<objective>       probability that of two answers, one of which got the
                        feedback, the model's reward is higher for that one
  user_auc_<objective>  likewise of two answers to the same user: alignment
                        compares answers to one user, and knowing who likes
                        everything does not help there
  tower/…               by the objective's own tower, where the reward is one
                        fused score (models/p_score.py)
  rate_<objective>      share of the answers that got it, so that an AUC of a
                        handful is seen to be one
  auc, user_auc         means over the objectives
  loss                  as trained, without dropout

Ties count half. A label that is a share, as the watch time of a session, counts
as feedback from its median up (INFERRED; above the median where all reach it).
An objective whose answers are all alike, or unknown, has no AUC.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Bool, Float, Int

from onerec_jax import config as config_lib
from onerec_jax import files, partitioning
from onerec_jax.data import rows as rows_lib
from onerec_jax.data import splits
from onerec_jax.data.batch import Batch
from onerec_jax.evaluation import held_out
from onerec_jax.inference import assemble
from onerec_jax.models import reward
from onerec_jax.training import losses

Answers = tuple[dict[str, np.ndarray], dict[str, np.ndarray], np.ndarray]
"""Head → logits [N], objective → labels [N], user [N]."""


def validator(
  system: assemble.System, mesh: Mesh
) -> Callable[[Any], dict[str, float]]:
  """Gives params → figures on a fixed sample of validation requests.

  Args:
    system: of a reward model; `evaluation.validation_users` requests are drawn.
    mesh: the mesh.

  Raises:
    ValueError: the pipeline does not give the model what it learns from.
  """
  _check(system)
  requests = _requests(
    system, splits.VALIDATION, system.config.evaluation.validation_users
  )
  return functools.partial(_figures, system, requests, _answerer(system, mesh))


def evaluate(
  workdir: files.PathLike, name: str, split: str = "test"
) -> dict[str, float]:
  """Figures of a run's best parameters on all requests of a split.

  Args:
    workdir: the work directory.
    name: of a reward model's run.
    split: `validation` or `test`.
  """
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  system, params = assemble.load(workdir, name, mesh)
  requests = _requests(system, splits.HELD_OUT[split], 0)
  return _figures(system, requests, _answerer(system, mesh), params)


def _check(system: assemble.System) -> None:
  """Refuses a pipeline without labels, or of other sessions."""
  config, m = system.config.pipeline, _size(system)
  if not config.labels:
    raise ValueError(
      "a reward model learns from what came of each shown item: set "
      "--config.pipeline.labels=True"
    )
  if config.imitate != "all":
    raise ValueError(
      f"pipeline.imitate={config.imitate!r}: a reward model learns from what "
      "was disliked, too; set --config.pipeline.imitate=all"
    )
  if not hasattr(system.model, "session_size"):
    return
  if config.targets != "exposed" or config.session_items % m:
    raise ValueError(
      f"model.session_size={m} with pipeline.targets={config.targets} and "
      f"pipeline.session_items={config.session_items}: set "
      f"--config.pipeline.targets=exposed and --config.pipeline.session_items "
      f"to a multiple of {m}"
    )


def _size(system: assemble.System) -> int:
  """Items of an answer."""
  return getattr(system.model, "session_size", 1)


def _requests(
  system: assemble.System, split: int, limit: int
) -> held_out.Requests:
  return held_out.requests(system.prepared, split, _size(system), limit)


def batches(
  system: assemble.System, requests: held_out.Requests
) -> Iterator[tuple[Batch, np.ndarray]]:
  """One row a request: what came before it → what it showed, with labels.

  A request of more items than `pipeline.row_targets` keeps its first.

  Yields:
    Batches (the last one filled with empty rows), and each row's user.
  """
  config, prepared = system.config.pipeline, system.prepared
  names = sorted(rows_lib.feature_sizes(prepared))
  m = _size(system)
  longest = min(max(map(len, requests.items)), config.row_targets)
  width, devices = longest // m * m, jax.device_count()
  size = -(-system.config.evaluation.batch_size // devices) * devices
  for start in range(0, len(requests), size):
    part = slice(start, start + size)
    records = [prepared.user(int(u) - 1) for u in requests.user[part]]
    first = requests.first[part].tolist()
    histories = [
      rows_lib.before(prepared, *pair) for pair in zip(records, first)
    ]
    batch = rows_lib.request_batch(histories, names, config, size)
    targets, labels = np.zeros((size, width), np.int32), {}
    for row, (record, event) in enumerate(zip(records, first)):
      count = min(len(requests.items[start + row]) // m * m, width)
      shown = slice(event, event + count)
      targets[row, :count] = record.items[shown]
      for name, values in rows_lib.labels(prepared, record, config).items():
        column = labels.setdefault(name, np.zeros(targets.shape, np.float32))
        column[row, :count] = values[shown]
    users = np.zeros(size, np.int32)
    users[: len(records)] = requests.user[part]
    see = lambda x: np.repeat(x, width, axis=1)  # noqa: B023
    yield (
      batch.replace(
        targets=targets,
        labels=labels,
        visible_from=see(batch.visible_from),
        visible_until=see(batch.visible_until),
      ),
      users,
    )


def _answerer(system: assemble.System, mesh: Mesh) -> Callable[..., Any]:
  """(params, host batch) → logits, labels and (loss, count) on the host."""
  model, loss_fn = system.model, losses.make_loss(system.model)

  @jax.jit
  def run(params, batch, catalogue):
    logits = model.apply({"params": params}, batch, catalogue)
    sums = loss_fn(params, batch, catalogue, None, None)
    return logits, model.labels(batch), (sums["loss"], sums["count"])

  catalogue = jax.device_put(system.catalogue, partitioning.replicated(mesh))
  rows = partitioning.batch_sharding(mesh)

  def answer(params: Any, batch: Batch) -> Any:
    with jax.set_mesh(mesh):
      found = run(params, jax.device_put(batch, rows), catalogue)
    return multihost_utils.process_allgather(found, tiled=True)

  return answer


def _figures(
  system: assemble.System,
  requests: held_out.Requests,
  answer: Callable[..., Any],
  params: Any,
) -> dict[str, float]:
  """Figures of the answers to all the requests."""
  parts, sums = [], []
  for batch, users in batches(system, requests):
    logits, labels, of_batch = answer(params, batch)
    answers = next(iter(labels.values())).shape[1]
    parts.append((logits, labels, np.repeat(users[:, None], answers, axis=1)))
    sums.append(of_batch)
  answers = jax.tree.map(lambda *x: np.concatenate(x).ravel(), *parts)
  total, count = np.sum(sums, axis=0)
  figures = measure(system.model.terms, answers)
  return figures | {"loss": float(total / count)}


def measure(
  terms: tuple[reward.Term, ...], answers: Answers
) -> dict[str, float]:
  """The figures; see the module docstring.

  Args:
    terms: of the model.
    answers: its logits, their labels and users.
  """
  logits, labels, users = answers
  fused = any(term.head != term.objective for term in terms)
  found: dict[str, float] = {}
  for head, objective, _ in terms:
    known = ~np.isnan(labels[objective])
    positive = positives(labels[objective][known])
    if positive.all() or not positive.any():
      continue
    by, of = logits[head][known], users[known]
    prefix = "tower/" if fused and head == objective else ""
    found[f"{prefix}auc_{objective}"] = auc(by, positive)
    within = user_auc(by, positive, of)
    if not np.isnan(within):
      found[f"{prefix}user_auc_{objective}"] = within
    found[f"rate_{objective}"] = float(positive.mean())
  for name in ("auc", "user_auc"):
    of = [v for k, v in found.items() if k.startswith(f"{name}_")]
    if of:
      found[name] = float(np.mean(of))
  return found


def positives(labels: Float[np.ndarray, "N"]) -> Bool[np.ndarray, "N"]:
  """Which labels count as feedback: 1, or from the median of shares up."""
  if np.isin(labels, (0.0, 1.0)).all():
    return labels > 0
  median = np.median(labels)
  above = labels >= median
  return labels > median if above.all() else above


def auc(
  scores: Float[np.ndarray, "N"], positive: Bool[np.ndarray, "N"]
) -> float:
  """Share of the pairs of a positive and another in the right order.

  Ties count half; NaN where all are alike or a score is NaN.
  """
  number = int(positive.sum())
  pairs = number * (len(positive) - number)
  if not pairs or np.isnan(scores).any():
    return float("nan")
  _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
  # Of what is alike the mean rank, so that a tie counts half.
  ranks = (np.cumsum(count) - (count - 1) / 2)[place]
  return float((ranks[positive].sum() - number * (number + 1) / 2) / pairs)


def user_auc(
  scores: Float[np.ndarray, "N"],
  positive: Bool[np.ndarray, "N"],
  users: Int[np.ndarray, "N"],
) -> float:
  """`auc` of the pairs that are of one user; NaN where there is none."""
  order = np.argsort(users, kind="stable")
  starts = np.flatnonzero(np.diff(users[order])) + 1
  right = total = 0.0
  for own in np.split(order, starts):
    number = int(positive[own].sum())
    pairs = number * (len(own) - number)
    if pairs:
      right += pairs * auc(scores[own], positive[own])
      total += pairs
  return right / total if total else float("nan")
