"""True preference: what a model's sessions are worth to the simulated users.

OneRec (arXiv 2502.18965 §4) judges alignment by the mean and the maximum over
the sessions a model generates for a request, by its reward model. Here the
judge is the world itself, which no reward model has to be trusted for:

  swt   expected play time of the session, seconds
  vtr   share of its items that are expected to be viewed (long_view)
  wtr   probability of at least one follow
  ltr   probability of at least one like
  clicks, duration_s   expected clicks; mean length of the items shown, seconds

in the user's state at the held-out request (simulation/truth.py). A session
model answers with its W best sessions, a point-wise one with one session, its
m best items; neither may show an item of the user's history, or one that no
training event names. Beside them stand the first m items that the log shows and
that the greedy oracle would. These two may show again what the user saw before
the world's repeat window, the models nothing of the whole history: so the
distance to the oracle is an upper bound.

A maximum over W sessions grows with W: it is left out where all models answer
with one, and not compared with a model that answers with another number.

Where there is no world a reward model is the judge (judged.py): the answers and
the comparison are these.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
import rich
import rich.box
import rich.table
from jax.sharding import Mesh
from jaxtyping import Int

from onerec_jax import config as config_lib
from onerec_jax import files, partitioning
from onerec_jax.data import shards, splits
from onerec_jax.data.batch import Batch
from onerec_jax.evaluation import bootstrap, held_out, protocol, sessions
from onerec_jax.inference import (
  assemble,
  prefix_index,
  retrieval,
  session_search,
)

_MAX = "_max"
FIGURES = ("swt", "vtr", "wtr", "ltr", "clicks", "duration_s")

Answer = Callable[[Batch, np.ndarray], Any]
"""(batch with T = 1, allowed bool [B, I + 1]) → sessions [B, W, m]."""


@dataclasses.dataclass(frozen=True)
class Preference:
  """What one model's sessions are worth to a judge.

  Attributes:
    name: of the run.
    user: [Q] dense users.
    number: [Q] which request of the user.
    sessions: [Q, W, m] dense items, best first.
    values: figure → float32 [Q, W]; see the module docstring.
    log: as `columns`, of what the log shows at these requests.
    oracle: as `columns`, of the greedy oracle; empty: nobody knows.
  """

  name: str
  user: np.ndarray
  number: np.ndarray
  sessions: np.ndarray
  values: dict[str, np.ndarray]
  log: dict[str, np.ndarray]
  oracle: dict[str, np.ndarray]

  @property
  def width(self) -> int:
    """W."""
    return self.sessions.shape[1]

  def columns(self) -> dict[str, np.ndarray]:
    """Column → [Q]: `columns` of the values."""
    return columns(self.values)


def columns(values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Means and maxima over the answers to each request.

  Args:
    values: figure → [Q, W].

  Returns:
    `<figure>_mean`, `<figure>_max` → [Q].
  """
  found = {}
  for name, value in values.items():
    found[f"{name}_mean"] = value.mean(axis=1)
    if name != "duration_s":  # nobody wants the longest
      found[f"{name}{_MAX}"] = value.max(axis=1)
  return found


def make_answer(
  system: assemble.System,
  params: Any,
  mesh: Mesh,
  width: int,
  items: int | None = None,
) -> Answer:
  """The sessions of a model; see the module docstring.

  Args:
    system: the model and what it needs.
    params: its parameters.
    mesh: the devices the rows of a batch are spread over.
    width: W of a session model.
    items: m of a point-wise one; None: its `pipeline.session_items`.
  """
  model, index = system.model, system.index
  m = items or system.config.pipeline.session_items
  beam = max(width, system.config.evaluation.beam_width)
  catalogue = jax.device_put(system.catalogue, partitioning.replicated(mesh))
  rows = partitioning.batch_sharding(mesh)
  if getattr(model, "session_items", 1) > 1:

    @jax.jit
    def find(params, batch, catalogue, index, allowed):
      found, _ = session_search.session_search(
        model, params, batch, catalogue,
        prefix_index.restrict(index, allowed), beam,
      )  # fmt: skip
      return found[:, :width]

    search = lambda batch, allowed: find(
      params, batch, catalogue, index, allowed
    )
  else:
    best = retrieval.make_retrieve(model, index, max(m, beam))
    search = lambda batch, allowed: best(params, batch, catalogue, allowed)[0][
      :, None, :m
    ]

  def answer(batch: Batch, allowed: np.ndarray) -> np.ndarray:
    batch, allowed = jax.device_put((batch, allowed), rows)
    with jax.set_mesh(mesh):
      return np.asarray(search(batch, allowed))

  return answer


def ask(
  answer: Answer,
  prepared: shards.PreparedData,
  requests: held_out.Requests,
  config: config_lib.Config,
  progress: bool = True,
) -> Int[np.ndarray, "Q W m"]:
  """The sessions that a model answers requests with.

  Args:
    answer: of `make_answer`, or any other.
    prepared: the data.
    requests: of these data.
    config: the model's.
    progress: whether to show a bar.
  """
  size, parts = sessions.batch_size(config), []
  known = prepared.item_counts > 0
  with protocol.bar_of(progress) as bar:
    task = bar.add_task(f"sessions of {config.name}", total=len(requests))
    for batch, rows in held_out.batches(
      prepared, requests, config.pipeline, 1, size
    ):
      allowed = sessions.allowed_items(prepared, requests, rows, known, size)
      found = answer(batch, allowed)
      parts.append(np.asarray(found, np.int32)[: len(rows)])
      bar.update(task, advance=len(rows))
  return np.concatenate(parts)


def measure(
  answer: Answer,
  prepared: shards.PreparedData,
  config: config_lib.Config,
  split: str,
  limit: int = 0,
  progress: bool = True,
) -> Preference:
  """Asks a model for sessions, and the world for their worth.

  Args:
    answer: of `make_answer`, or any other.
    prepared: the data, the simulator's.
    config: the experiment.
    split: `validation` or `test`.
    limit: a random sample of at most so many requests; 0: all.
    progress: whether to show a bar.

  Raises:
    ValueError: data of another source, or that leave events out; a session
      with an empty slot.
  """
  if config.prepare.dataset != "simulator":
    raise ValueError(
      f"{config.name} was trained on {config.prepare.dataset}: true preference "
      "is known of the data set 'simulator' alone"
    )
  m = config.pipeline.session_items
  requests = held_out.requests(prepared, splits.HELD_OUT[split], m, limit)
  shown = ask(answer, prepared, requests, config, progress)
  worth = sessions.true_values(
    prepared, requests, shown, config.prepare.simulation, config.name
  )
  return Preference(
    config.name,
    requests.user.astype(np.int32),
    requests.number.astype(np.int32),
    shown,
    _figures(worth, shown.shape[2], ""),
    columns(_figures(worth, shown.shape[2], "logged_")),
    columns(_figures(worth, shown.shape[2], "oracle_")),
  )


def _figures(
  worth: dict[str, np.ndarray], m: int, prefix: str
) -> dict[str, np.ndarray]:
  """Figure → [Q, W]; of the log and of the oracle W = 1."""
  of = {figure: worth[prefix + name] for figure, name in _SOURCE.items()}
  of["vtr"] = of["vtr"] / m
  return {figure: value.reshape(len(value), -1) for figure, value in of.items()}


_SOURCE = {
  "swt": "watch_s",
  "vtr": "long_views",
  "wtr": "any_follow",
  "ltr": "any_like",
  "clicks": "clicks",
  "duration_s": "duration_s",
}
assert tuple(_SOURCE) == FIGURES


def compare(
  models: Sequence[Sequence[Preference]],
) -> list[dict[str, Any]]:
  """Models on the same requests, each against the first.

  Args:
    models: each by its seeds. A request's value is the mean over the seeds;
      intervals are of the paired bootstrap over users (bootstrap.py).

  Returns:
    For each model and figure: `model` (its number), `runs`, `sessions` (W),
    `items` (m), `figure`, `mean`, `std` (over seeds; None of one), `logged` and
    `oracle` (the same figure of what the log shows and of the oracle, where
    there is one), and but for the first model `difference`, `low`, `high`,
    `above_zero`; `queries`. See the module docstring for maxima.

  Raises:
    ValueError: they were measured on other requests, or seeds of one model
      with other numbers of sessions.
  """
  _check_alike(models)
  first, rows = models[0][0], []
  several = any(seeds[0].width > 1 for seeds in models)
  names = [n for n in first.columns() if several or not n.endswith(_MAX)]
  by_seed = [
    np.stack([np.stack([p.columns()[n] for n in names], axis=1) for p in seeds])
    for seeds in models
  ]
  base = by_seed[0].mean(axis=0)
  for place, (seeds, values) in enumerate(zip(models, by_seed)):
    found = bootstrap.intervals(values.mean(axis=0) - base, first.user)
    figures = values.mean(axis=1)
    for column, name in enumerate(names):
      spread = None
      if len(seeds) > 1:
        spread = float(figures[:, column].std(ddof=1))
      row = {
        "model": place,
        "runs": [p.name for p in seeds],
        "sessions": seeds[0].width,
        "items": seeds[0].sessions.shape[2],
        "figure": name,
        "mean": float(figures[:, column].mean()),
        "std": spread,
        "queries": len(first.user),
      }
      for shown, of in (("logged", first.log), ("oracle", first.oracle)):
        if of:
          row[shown] = float(of[name].mean())
      alike = seeds[0].sessions.shape == first.sessions.shape
      alike = alike or not name.endswith(_MAX)
      if place and alike:
        interval = dataclasses.asdict(found[column])
        row |= {"difference": interval.pop("mean"), **interval}
      rows.append(row)
  return rows


def _check_alike(models: Sequence[Sequence[Preference]]) -> None:
  """Refuses what cannot be compared; see `compare`."""
  first = models[0][0]
  for seeds in models:
    for one in seeds:
      same = np.array_equal(first.user, one.user)
      if not (same and np.array_equal(first.number, one.number)):
        raise ValueError(
          f"{first.name} and {one.name} were measured on different requests; "
          "measure both on the same prepared data, split and session length"
        )
      was, now = seeds[0].sessions.shape[1:], one.sessions.shape[1:]
      if was != now:
        raise ValueError(
          f"{seeds[0].name} answers with {was[0]} sessions of {was[1]} items, "
          f"{one.name} with {now[0]} of {now[1]}: no seeds of one model"
        )


def of_run(
  workdir: files.PathLike, name: str, split: str, width: int, limit: int = 0
) -> Preference:
  """Measures the best parameters of a run.

  Args:
    workdir: the work directory.
    name: of the run.
    split: `validation` or `test`.
    width: W, sessions of a session model.
    limit: a random sample of at most so many requests; 0: all.
  """
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  system, params = assemble.load(workdir, name, mesh)
  answer = make_answer(system, params, mesh, width)
  return measure(answer, system.prepared, system.config, split, limit)


def print_table(rows: Sequence[dict[str, Any]], title: str) -> None:
  """Prints `compare`, a section a figure, with the log's and the oracle's."""
  table = rich.table.Table(
    "figure", "run", "mean", "± seeds", "difference", "95%",
    title=title, box=rich.box.SIMPLE,
  )  # fmt: skip
  for row in sorted(rows, key=lambda row: (row["figure"], row["model"])):
    figure, over = row["figure"], ("", "")
    if row["model"] == 0:
      table.add_section()
      for shown in ("logged", "oracle"):
        if shown in row:
          table.add_row(figure, f"({shown})", f"{row[shown]:.4g}")
    elif "difference" in row:
      # What is left of sums that cancel is no figure.
      mean, low, high = (
        f"{round(row[name], 9):+.3g}" for name in ("difference", "low", "high")
      )
      over = mean, f"{low} … {high}"
    seeds = "" if row["std"] is None else f"{row['std']:.2g}"
    name, *others = row["runs"]
    name += f" ({1 + len(others)} seeds)" if others else ""
    table.add_row(figure, name, f"{row['mean']:.4g}", seeds, *over)
  rich.print(table)
