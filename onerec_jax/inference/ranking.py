"""A reward model's run ranks what another run found: OneRec-V1's last stage.

OneRec-V1 serves with "reward model selection" (arXiv 2506.13695, Table 12): the
generator's beam is an answer's candidates, and of them those that the P-Score
likes best are shown. INFERRED: candidates are ranked by the reward alone; the
paper does not print how they are selected.

The ranker reads users as it was trained to (`max_history`, pathways, compressed
histories), whatever the run reads that found the candidates.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float32, Int

from onerec_jax import files, partitioning
from onerec_jax.data import rows as rows_lib
from onerec_jax.inference import assemble
from onerec_jax.models import reward


class Ranker:
  """A trained reward model that ranks given items.

  Args:
    system: of the reward model.
    params: its parameters.
    mesh: the devices the rows of a batch are spread over.

  Raises:
    ValueError: the model is none that judges given items.
  """

  def __init__(self, system: assemble.System, params: Any, mesh: Mesh):
    model = system.model
    if not isinstance(model, reward.RewardModel):
      raise ValueError(
        f"{system.config.name} is a {system.config.model.system}, which ranks "
        "no given items; name a run of p_score or session_reward as the ranker"
      )
    self.system = system
    self._params, self._mesh = params, mesh
    self._names = sorted(rows_lib.feature_sizes(system.prepared))
    self._catalogue = jax.device_put(
      system.catalogue, partitioning.replicated(mesh)
    )
    self._value = jax.jit(
      lambda params, *asked: reward.value(
        model.apply({"params": params}, *asked, method="scores"),
        model.value_weights,
      )
    )

  @classmethod
  def load(cls, workdir: files.PathLike, name: str, mesh: Mesh) -> "Ranker":
    """A ranker by the best parameters of a run.

    Args:
      workdir: the work directory.
      name: of the reward model's run.
      mesh: the devices.

    Raises:
      FileNotFoundError: there is no such run.
      ValueError: it is of another kind of model, or of other data.
    """
    return cls(*assemble.load(workdir, name, mesh), mesh)

  def check(self, finder: assemble.System) -> None:
    """Refuses a run whose items the ranker does not know.

    Args:
      finder: whose items it is to rank.

    Raises:
      ValueError: their data are not the same, or the run serves new items.
    """
    name, by = finder.config.name, self.system.config.name
    data = [s.prepared.manifest["fingerprint"] for s in (finder, self.system)]
    if data[0] != data[1]:
      raise ValueError(
        f"{name} was trained on the data {data[0]}, the ranker {by} on "
        f"{data[1]}: their items bear other numbers; train both in one work "
        "directory"
      )
    items = [s.prepared.num_items for s in (finder, self.system)]
    if items[0] != items[1]:
      raise ValueError(
        f"{name} serves {items[0]} items, new ones among them, and the ranker "
        f"{by} knows {items[1]}; serve new items without a ranker"
      )

  def candidates(self, k: int, beam_width: int) -> int:
    """How many candidates of a row it is to be given.

    Args:
      k: how many are wanted of them.
      beam_width: how many are asked for; of a small catalogue all.

    Raises:
      ValueError: that is fewer than k.
    """
    if k > beam_width:
      raise ValueError(
        f"k={k} items of the beam_width={beam_width} candidates that the "
        f"ranker {self.system.config.name} is given; raise beam_width "
        f"(--beam_width) to {k} or more"
      )
    return max(k, min(beam_width, self.system.prepared.num_items))

  def rank(
    self,
    histories: Sequence[rows_lib.History],
    users: Sequence[int | None],
    items: Int[np.ndarray, "N W"],
    size: int,
  ) -> tuple[Int[np.ndarray, "N W"], Float32[np.ndarray, "N W"]]:
    """Each row's candidates by their values.

    Args:
      histories: of the rows.
      users: whose stored events a history is, counted from 0; None: given.
      items: candidates, dense; 0 is none.
      size: rows of the batch, N or more.

    Returns:
      (items, values), best first; item 0 with value -inf comes last. Of equal
      values the candidate that came first stays first.
    """
    batch = rows_lib.request_batch(
      [self._read(*of) for of in zip(histories, users, strict=True)],
      self._names, self.system.config.pipeline, size,
    )  # fmt: skip
    asked = np.pad(items, ((0, size - len(items)), (0, 0)))
    batch, asked = jax.device_put(
      (batch, asked), partitioning.batch_sharding(self._mesh)
    )
    with jax.set_mesh(self._mesh):
      found = self._value(self._params, batch, self._catalogue, asked)
    values = np.asarray(found, np.float32)[: len(items)]
    values = np.where(items > 0, values, np.float32(-np.inf))
    best = np.argsort(-values, axis=1, kind="stable")
    return tuple(np.take_along_axis(x, best, axis=1) for x in (items, values))

  def _read(
    self, history: rows_lib.History, user: int | None
  ) -> rows_lib.History:
    """With its own compressed history; the finder's may be another, or none."""
    snapshots = self.system.prepared.snapshots
    if snapshots is None:
      return history
    if user is None:
      own = snapshots.of_history(history.items, history.features)
    else:
      own = snapshots.before(user, len(history.items))
    return history._replace(lifelong=own)
