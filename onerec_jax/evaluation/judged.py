"""Runs judged by a trained reward model: OneRec's Table 1, on any data.

OneRec (arXiv 2502.18965 §4) compares models by what its reward model makes of
the sessions they generate for a request, mean and maximum over them. The judge
is a run of a reward model in the work directory of the runs it judges:

  <head>  the head's probability: swt, vtr, wtr, ltr of a session reward; p and
          the objectives' towers of a P-Score
  value   Σ w · head by the judge's own weights (reward.value); left out where
          one head is all of it

What is judged, W answers to a request, is for

  session_reward  sessions of its m items: the W best of a session model; of a
                  point-wise one a single session, its m best items
  p_score         the W best items of a point-wise model; the W best sessions of
                  a session model, each by the mean over its items

and beside them what the log shows: the first m items of each request, or every
item of it. As in preference.py no answer holds an item of the user's history,
or one that no training event names, and maxima are compared where all answer
with as many. The judge reads users as it was trained to, whatever the judged
models read.

A reward model is no truth: a run that was aligned on it has also learnt what it
gets wrong. Let another judge, trained from another seed (docs/rewards.md).
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from onerec_jax import config as config_lib
from onerec_jax import files, partitioning
from onerec_jax.data import splits
from onerec_jax.data.batch import Batch
from onerec_jax.evaluation import held_out, preference, protocol, sessions
from onerec_jax.inference import assemble
from onerec_jax.models import reward

VALUE = "value"

Score = Callable[[Batch, np.ndarray], dict[str, np.ndarray]]
"""(batch with T = 1, answers [B, W, m]) → figure → [B, W]."""


@dataclasses.dataclass(frozen=True)
class Judge:
  """A reward model, and what runs are asked for it to judge.

  Attributes:
    system: of the reward model.
    score: what it makes of answers.
    requests: held-out requests, the same for every run.
    log: what it makes of the log there; see preference.Preference.
  """

  system: assemble.System
  score: Score
  requests: held_out.Requests
  log: dict[str, np.ndarray]

  @property
  def session_size(self) -> int | None:
    """How long the sessions it judges are, m; None: it judges items."""
    return getattr(self.system.model, "session_size", None)


def load(
  workdir: files.PathLike,
  name: str,
  split: str,
  limit: int = 0,
  progress: bool = True,
  session_items: int = 0,
) -> Judge:
  """A judge by its best parameters.

  Args:
    workdir: the work directory.
    name: of the reward model's run.
    split: `validation` or `test`.
    limit: a random sample of at most so many requests; 0: all.
    progress: whether to show a bar.
    session_items: m, to judge sessions of m as alignment does: at requests of
      at least m items, a P-Score by σ of a session's mean logit. 0: as the
      module docstring says.

  Raises:
    ValueError: the run is of another kind of model, or no held-out request is
      as long as the sessions.
  """
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  system, params = assemble.load(workdir, name, mesh)
  if not isinstance(system.model, reward.RewardModel):
    raise ValueError(
      f"{name} is a {system.config.model.system}, which judges nothing; name a "
      "run of session_reward or p_score as the judge"
    )
  score = make_score(system, params, mesh, bool(session_items))
  m = max(session_items, getattr(system.model, "session_size", 1))
  requests = held_out.requests(
    system.prepared, splits.HELD_OUT[split], m, limit
  )
  shown = _logged(system, requests)
  found = _values(system, score, requests, shown, "the log", progress)
  missing = (shown == 0).any(axis=2)
  log = {n: np.ma.masked_where(missing, value) for n, value in found.items()}
  return Judge(system, score, requests, preference.columns(log))


def make_score(
  system: assemble.System, params: Any, mesh: Mesh, whole: bool = False
) -> Score:
  """The judge's figures of answers; see the module docstring.

  Args:
    system: of the reward model.
    params: its parameters.
    mesh: the devices the rows of a batch are spread over.
    whole: whether a P-Score judges a session itself, and not item by item.
  """
  model, weights = system.model, dict(system.model.value_weights)
  whole = whole or hasattr(model, "session_size")

  @jax.jit
  def run(params, batch, catalogue, answers):
    logits = model.apply(
      {"params": params}, batch, catalogue, answers, method="scores"
    )
    found = {head: jax.nn.sigmoid(logit) for head, logit in logits.items()}
    if [*weights.values()] != [1.0]:
      found[VALUE] = reward.value(logits, weights)
    return found

  catalogue = jax.device_put(system.catalogue, partitioning.replicated(mesh))
  rows = partitioning.batch_sharding(mesh)

  def score(batch: Batch, answers: np.ndarray) -> dict[str, np.ndarray]:
    B, W, m = answers.shape
    # Items one by one: a P-Score's own score of a session is that of the mean
    # logit, and would not be the mean of what its items are judged alone.
    asked = answers if whole else answers.reshape(B, W * m)
    batch, asked = jax.device_put((batch, asked), rows)
    with jax.set_mesh(mesh):
      found = run(params, batch, catalogue, asked)
    return {
      name: np.asarray(value).reshape(B, W, -1).mean(axis=2)
      for name, value in found.items()
    }

  return score


def _logged(
  system: assemble.System, requests: held_out.Requests
) -> Int[np.ndarray, "Q W m"]:
  """What requests show: their first m items; or each item, 0 for none.

  A request of more items than `pipeline.row_targets` keeps its first.
  """
  if m := getattr(system.model, "session_size", None):
    first = [items[:m] for items in requests.items]
    return np.asarray(first, np.int32)[:, None]
  longest = max(map(len, requests.items))
  longest = min(longest, system.config.pipeline.row_targets)
  shown = np.zeros((len(requests), longest, 1), np.int32)
  for row, items in zip(shown, requests.items):
    row[: len(items), 0] = items[:longest]
  return shown


def _values(
  system: assemble.System,
  score: Score,
  requests: held_out.Requests,
  shown: Int[np.ndarray, "Q W m"],
  of: str,
  progress: bool,
) -> dict[str, Float[np.ndarray, "Q W"]]:
  """Asks the judge, which reads its own batches of the requests."""
  config, parts = system.config, []
  size = sessions.batch_size(config)
  with protocol.bar_of(progress) as bar:
    task = bar.add_task(f"{config.name} judges {of}", total=len(requests))
    for batch, rows in held_out.batches(
      system.prepared, requests, config.pipeline, 1, size
    ):
      answers = np.zeros((size, *shown.shape[1:]), np.int32)
      answers[: len(rows)] = shown[rows]
      found = score(batch, answers)
      parts.append({n: value[: len(rows)] for n, value in found.items()})
      bar.update(task, advance=len(rows))
  return {n: np.concatenate([part[n] for part in parts]) for n in parts[0]}


def measure(
  judge: Judge,
  name: str,
  shown: Int[np.ndarray, "Q W m"],
  progress: bool = True,
) -> preference.Preference:
  """What the judge makes of answers.

  Args:
    judge: the judge.
    name: whose answers they are.
    shown: W answers to each of its requests, as it judges them: sessions of m,
      or items, m = 1.
    progress: whether to show a bar.

  Raises:
    ValueError: an answer with an empty slot.
  """
  requests = judge.requests
  if (empty := (shown <= 0).any(axis=(1, 2))).any():
    row = int(np.argmax(empty))
    raise ValueError(
      f"{name} answers request {requests.number[row]} of the (dense) user "
      f"{requests.user[row]} with an empty slot: fewer items or sessions are "
      "new to the user than were asked for; ask for fewer (--answers), or "
      "train a judge of shorter sessions (--config.model.session_size)"
    )
  found = _values(judge.system, judge.score, requests, shown, name, progress)
  return preference.Preference(
    name,
    requests.user.astype(np.int32),
    requests.number.astype(np.int32),
    shown,
    found,
    judge.log,
    {},
  )


def of_run(
  judge: Judge,
  workdir: files.PathLike,
  name: str,
  width: int,
  progress: bool = True,
) -> preference.Preference:
  """Asks the best parameters of a run, and the judge what its answers are.

  Args:
    judge: the judge.
    workdir: the work directory.
    name: of the run.
    width: W; see the module docstring.
    progress: whether to show bars.

  Raises:
    ValueError: the run is of other data than the judge, or its sessions are
      of another length.
  """
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  system, params = assemble.load(workdir, name, mesh)
  m, size = getattr(system.model, "session_items", 1), judge.session_size
  check(system, judge, name, m)
  answer = preference.make_answer(system, params, mesh, width, size or width)
  shown = preference.ask(
    answer, system.prepared, judge.requests, system.config, progress
  )
  if m == 1 and size is None:
    shown = shown.swapaxes(1, 2)  # a session of W items: W answers of one
  return measure(judge, name, shown, progress)


def check(system: assemble.System, judge: Judge, name: str, m: int) -> None:
  """Refuses a run that the judge cannot judge.

  Args:
    system: of the run.
    judge: the judge.
    name: of the run.
    m: items of its answers.

  Raises:
    ValueError: it is of other data, or its sessions are of another length.
  """
  by, size = judge.system.config.name, judge.session_size
  data = [s.prepared.manifest["fingerprint"] for s in (system, judge.system)]
  if data[0] != data[1]:
    raise ValueError(
      f"{name} was trained on the data {data[0]}, the judge {by} on {data[1]}: "
      "their items bear other numbers; train both in one work directory"
    )
  if size is not None and m not in (1, size):
    raise ValueError(
      f"{name} answers with sessions of {m} and {by} judges sessions of "
      f"{size}; train a judge with --config.model.session_size={m}, or let a "
      "p_score judge"
    )


def was_made_from(workdir: files.PathLike, name: str, judge: str) -> bool:
  """Whether a run is the judge, or the judge a reward on the way to it.

  Args:
    workdir: the work directory.
    name: of the run.
    judge: name of the reward model's run.
  """
  if name == judge:
    return True
  made_from = assemble.read_record(workdir, name).get("made_from", {})
  return any(was_made_from(workdir, run, judge) for run in made_from)
