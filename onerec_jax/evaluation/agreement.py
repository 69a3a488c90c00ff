"""Does a reward model tell the answers to one request apart as the truth does?

Alignment compares answers to the same request, the beams of one search, which
differ far less than what a log shows. A reward model that is good at the log
(its AUC, rewards.py) may have learnt who likes much and what is watched long,
and know nothing of which beam is liked more. Here a run answers held-out
requests of the simulated world, W sessions each; of every head of a judge

  spread  root mean square of what it makes of an answer, less the mean over the
          request's answers
  r       correlation of that with a figure of true preference (preference.py),
          less its request's mean as well

as alignment asks it: a P-Score's heads are σ of a session's mean logit.
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
import rich.box
import rich.table
from jaxtyping import Float

from onerec_jax import config as config_lib
from onerec_jax import files, partitioning
from onerec_jax.evaluation import judged, preference
from onerec_jax.inference import assemble


@dataclasses.dataclass(frozen=True)
class Agreement:
  """One head of one reward model.

  Attributes:
    spread: see the module docstring.
    r: figure → correlation; NaN where answers do not differ.
  """

  spread: float
  r: dict[str, float]


def within_requests(
  head: Float[np.ndarray, "Q W"], truth: dict[str, Float[np.ndarray, "Q W"]]
) -> Agreement:
  """How a head goes with the truth among the answers to each request.

  Args:
    head: what the reward model makes of W answers to Q requests.
    truth: figure → what they are worth.
  """
  own = _deviations(head)
  spread = float(np.sqrt(np.mean(own**2)))

  def r(figure: np.ndarray) -> float:
    other = _deviations(figure)
    scale = np.sqrt(np.sum(own**2) * np.sum(other**2))
    return float(np.sum(own * other) / scale) if scale else float("nan")

  return Agreement(spread, {name: r(figure) for name, figure in truth.items()})


def _deviations(values: Float[np.ndarray, "Q W"]) -> np.ndarray:
  values = values.astype(np.float64)
  return values - values.mean(axis=1, keepdims=True)


def of_run(
  workdir: files.PathLike,
  name: str,
  judges: Sequence[str],
  split: str,
  width: int,
  limit: int = 0,
) -> dict[str, dict[str, Agreement]]:
  """Judge → head → its agreement with the truth on the answers of a run.

  Args:
    workdir: the work directory.
    name: of the run, a session model.
    judges: runs of reward models.
    split: `validation` or `test`.
    width: W.
    limit: a random sample of at most so many requests; 0: all.

  Raises:
    ValueError: data of another source than the simulator, a run that is no
      session model, or a judge of other data or other sessions.
  """
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  system, params = assemble.load(workdir, name, mesh)
  m = getattr(system.model, "session_items", 1)
  if m == 1:
    raise ValueError(
      f"{name} answers a request with one session, and there is nothing to "
      "tell apart; name a session model"
    )
  answer = preference.make_answer(system, params, mesh, width)
  true = preference.measure(
    answer, system.prepared, system.config, split, limit
  )
  found = {}
  for by in judges:
    judge = judged.load(workdir, by, split, limit, session_items=m)
    judged.check(system, judge, name, m)
    values = judged.measure(judge, name, true.sessions).values
    found[by] = {
      head: within_requests(value, true.values)
      for head, value in values.items()
    }
  return found


def table(
  found: dict[str, Sequence[dict[str, Agreement]]],
) -> rich.table.Table:
  """What `of_run` gives, judge → its seeds, to print: means over seeds."""
  shown = rich.table.Table(
    "judge", "head", "spread", *preference.FIGURES, box=rich.box.SIMPLE
  )
  for judge, seeds in found.items():
    for head in seeds[0]:
      of = [seed[head] for seed in seeds]
      columns = [
        f"{np.mean([a.r[figure] for a in of]):+.3f}"
        for figure in preference.FIGURES
      ]
      spread = f"{np.mean([a.spread for a in of]):.4f}"
      shown.add_row(judge, head, spread, *columns)
  return shown
