"""Trained reward models as rewards (rewards.py).

A reward with parameters is a `jax.tree_util.Partial`: a pytree that can be
called. A step that takes it as an argument gets its parameters as arguments
and not as constants copied into the program.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from onerec_jax import config as config_lib
from onerec_jax import files, partitioning
from onerec_jax.alignment import rewards
from onerec_jax.data import snapshots
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.inference import assemble
from onerec_jax.models import reward as reward_lib


@dataclasses.dataclass(frozen=True)
class _Value:
  """(params, catalogue, histories, candidates) → rewards.

  A class, not a closure: two loads of one run are the same to `jax.jit`.
  """

  model: nn.Module
  weights: tuple[tuple[str, float], ...]

  def __call__(
    self,
    params: Any,
    catalogue: Catalogue,
    histories: Batch,
    candidates: Int[Array, "B R *m"],
  ) -> Float[Array, "B R"]:
    """Σ w · σ(logit), see reward.value."""
    logits = self.model.apply(
      {"params": params}, histories, catalogue, candidates, method="scores"
    )
    return reward_lib.value(logits, dict(self.weights))


def load(
  workdir: files.PathLike,
  name: str,
  mesh: Mesh | None = None,
  weights: Mapping[str, float] | None = None,
  pipeline: config_lib.PipelineConfig | None = None,
  session_items: int | None = None,
) -> rewards.Reward:
  """The reward that a trained reward model gives.

  Of a session model for sessions [B, R, m] (an item given alone is a session
  of one); of a P-Score for items [B, R] (of a session: σ of its items' mean
  logit).

  Args:
    workdir: the work directory.
    name: of the reward model's run.
    mesh: where its parameters are to lie; default: all devices.
    weights: head → weight of its probability; default: the model's
      `value_weights`. Weigh by spread, not by worth alone: a probability of
      .01 moves the sum by no more than that.
    pipeline: of the histories that it will be asked about; None: of any.
    session_items: m of the answers that it will be asked about; None: any.

  Raises:
    ValueError: the run is of another kind of model, a weight is of no head, or
      the run was trained on other histories or sessions than those.
  """
  mesh = mesh or partitioning.make_mesh(config_lib.MeshConfig())
  system, params = assemble.load(workdir, name, mesh)
  model = system.model
  if not isinstance(model, reward_lib.RewardModel):
    raise ValueError(
      f"{name} is a {system.config.model.system}, which gives no rewards; name "
      "a run of session_reward or p_score"
    )
  if pipeline is not None:
    _check_histories(name, system.config.pipeline, pipeline)
  size = getattr(model, "session_size", None)
  if None not in (size, session_items) and size != session_items:
    raise ValueError(
      f"{name} was trained on sessions of {size} and is asked about answers of "
      f"{session_items}; train it with model.session_size={session_items}, or "
      "judge items by a p_score"
    )
  weights = dict(weights or model.value_weights)
  unknown = sorted(set(weights) - {term.head for term in model.terms})
  if unknown:
    raise ValueError(
      f"weights of {unknown}, and {name} has the heads "
      f"{sorted({term.head for term in model.terms})}"
    )
  catalogue = jax.device_put(system.catalogue, partitioning.replicated(mesh))
  value = _Value(model, tuple(sorted(weights.items())))
  return jax.tree_util.Partial(value, params, catalogue)


def check_lifelong(
  workdir: files.PathLike, name: str, asking: assemble.System
) -> None:
  """Refuses a reward model of other compressed histories than it would get.

  It is given those of the model to be aligned. Pathways and data are compared
  by `load`; what histories are compressed with is in neither.

  Args:
    workdir: the work directory.
    name: of the reward model's run.
    asking: the model to be aligned.

  Raises:
    FileNotFoundError: there is no such run.
    ValueError: it was trained on others.
  """
  record = assemble.read_record(workdir, name)
  own = config_lib.from_dict(record["config"])
  if not own.pipeline.pathways.lifelong:
    return
  read = snapshots.fingerprint(
    own.lifelong,
    own.pipeline.pathways.lifelong,
    asking.prepared.manifest["fingerprint"],
    record["semantic_ids"],
  )
  given = assemble.snapshots_name(
    asking.config, asking.prepared, asking.semantic_ids
  )
  if read != given:
    raise ValueError(
      f"{name} was trained on other compressed histories than those of the "
      "model to be aligned, which it is asked about; train both on the same "
      "pipeline.pathways.lifelong, lifelong and semantic IDs"
    )


def _check_histories(
  name: str, own: config_lib.PipelineConfig, asked: config_lib.PipelineConfig
) -> None:
  """Refuses histories that a reward model was not trained on."""
  fields = ["pathways"]
  if not asked.pathways.on:  # Then max_history is not read.
    fields.append("max_history")
  for field in fields:
    was, now = getattr(own, field), getattr(asked, field)
    if was != now:
      raise ValueError(
        f"{name} was trained on pipeline.{field}={was} and is asked about "
        f"{now}; train it with the pipeline.{field} of the model to be aligned"
      )
