"""OneRec-V1's preference score: one number for all that a user may do.

arXiv 2506.13695 §2.5. Every objective has a tower with a cross-entropy of its
own as auxiliary loss. The towers' hidden states, the user's and the item's
representation go into one more, whose probability p, the P-Score, is trained
against all the labels:

  L = Σ_xtr w^xtr · CE(p, y^xtr) + Σ_xtr CE(p^xtr, y^xtr)

For given inputs the first sum is least at p = Σ w P(y = 1) / Σ w: p is the
weighted mean of the objectives' probabilities, and w says what counts. With
equal weights the frequent ones decide; raise w of the objectives whose AUC
falls behind that of their own towers (docs/rewards.md).

INFERRED: the user's representation is what target attention makes of the
candidate (reward.py), the item's the vector that went in.
"""

from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from onerec_jax.data import batch as batch_lib
from onerec_jax.models import reward

FUSED = "p"
"""The head of the P-Score; every other head is an objective's."""


class PScore(reward.RewardModel):
  """The model; fields beyond those of RewardModel.

  Attributes:
    weights: w of each objective; empty: 1 for all.
  """

  weights: tuple[float, ...]

  value_weights: ClassVar[Mapping[str, float]] = {FUSED: 1.0}

  def setup(self):
    super().setup()
    self.towers = reward.Towers(len(self.objectives), self.d_ff)
    self.fused = reward.Towers(1, self.d_ff, ("context", "projected"))

  @property
  def terms(self) -> tuple[reward.Term, ...]:
    """Each objective's own, and the P-Score against each."""
    weights = self.weights or (1.0,) * len(self.objectives)
    own = [reward.Term(name, name) for name in self.objectives]
    fused = [
      reward.Term(FUSED, name, weight)
      for name, weight in zip(self.objectives, weights)
    ]
    return (*own, *fused)

  def __call__(
    self, batch: batch_lib.Batch, catalogue: batch_lib.Catalogue
  ) -> dict[str, Float[Array, "B T"]]:
    """Logits of the batch's own targets."""
    return self.scores(batch, catalogue, batch.targets)

  def scores(
    self,
    batch: batch_lib.Batch,
    catalogue: batch_lib.Catalogue,
    candidates: Int[Array, "#B R *m"],
  ) -> dict[str, Float[Array, "B R"]]:
    """See RewardModel; a session's logit is the mean over its items."""
    items = candidates if candidates.ndim == 3 else candidates[..., None]
    e, v = self.aware(batch, catalogue, items)
    logits, hidden = self.towers(e)
    hidden = hidden.reshape(*hidden.shape[:3], -1)
    v = jnp.broadcast_to(v, e.shape)
    fused, _ = self.fused(jnp.concatenate([hidden, e, v], axis=-1))
    logits = jnp.concatenate([logits, fused], axis=-1)
    real = jnp.broadcast_to(items > 0, e.shape[:3])[..., None]
    # A lone candidate keeps its logit, be it an item or padding.
    real = real | (items.shape[2] == 1)
    count = jnp.maximum(jnp.sum(real, axis=2), 1)
    mean = jnp.sum(jnp.where(real, logits, 0.0), axis=2) / count
    return dict(zip((*self.objectives, FUSED), jnp.moveaxis(mean, -1, 0)))

  def labels(self, batch: batch_lib.Batch) -> dict[str, Float[Array, "B T"]]:
    """Objective → labels of the targets."""
    return {
      name: jnp.where(
        batch.targets > 0, reward.known_label(batch, name), jnp.nan
      )
      for name in self.objectives
    }


def block_parameters(model: PScore) -> int:
  """Parameters of the blocks' matrices and of the towers' first layers."""
  return reward.backbone_parameters(model) + _towers(model)


def forward_flops(
  model: PScore, rows: int, positions: int, targets: int
) -> float:
  """Multiply-adds ×2 of one forward pass over a batch, padding included.

  Args:
    model: the model.
    rows: B.
    positions: S.
    targets: T.
  """
  total = reward.backbone_cost(model, positions, targets)
  return 2.0 * rows * (total + targets * _towers(model))


def _towers(model: PScore) -> int:
  D, F, number = model.d_model, model.d_ff, len(model.objectives)
  return number * D * F + (number * F + 2 * D) * F
