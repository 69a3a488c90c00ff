"""Losses: pure functions of (params, batch) with sums, not means.

Sums and counts leave the averaging to the step, so that microbatches and
devices with different numbers of targets are weighted exactly.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.inference import prefix_index
from onerec_jax.models import registry, sasrec

Sums = dict[str, Any]
"""`loss`, `count` and whatever else is worth a curve, summed over targets; and
`loads`, tokens routed to each expert (models/moe.py), where there are any."""

LossFn = Callable[[Any, Batch, Catalogue, Any, jax.Array], Sums]
"""(params, batch, catalogue, prefix index, key) → sums."""


def cross_entropy(
  logits: Float[Array, "*batch K"],
  labels: Int[Array, "*batch"],
  valid: Bool[Array, "*batch K"] | None = None,
) -> Float[Array, "*batch"]:
  """−log softmax(logits)[label], over the valid entries alone if given."""
  if valid is not None:
    # A label outside the valid set (padding) would make the loss infinite.
    valid = valid | jax.nn.one_hot(labels, logits.shape[-1], dtype=bool)
    logits = jnp.where(valid, logits, -jnp.inf)
  label = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
  return jax.nn.logsumexp(logits, axis=-1) - label


def semantic_id_loss(
  logits: tuple[Float[Array, "B T _"], ...],
  codes: Int[Array, "B T L"],
  weights: Float[Array, "B T"],
  valid: list[Bool[Array, "B T _"]] | None,
) -> Sums:
  """V2's L_Gen: −1/L Σ_l log p(s^l | s^<l, context), summed over targets.

  V1 reports the sum over levels: multiply by L to compare.

  Args:
    logits: of each level.
    codes: the targets' semantic IDs.
    weights: 1 at targets, 0 at padding.
    valid: codes that continue to an item, level by level; None: all K.
  """
  levels = [
    jnp.sum(
      weights
      * cross_entropy(
        level_logits, codes[..., level], None if valid is None else valid[level]
      )
    )
    for level, level_logits in enumerate(logits)
  ]
  sums = {f"loss_level_{i + 1}": value for i, value in enumerate(levels)}
  return dict(sums, loss=sum(levels) / len(levels), count=jnp.sum(weights))


def generative_loss(model: registry.Model) -> LossFn:
  """Next-token loss over the codes of the targets."""

  def loss(params, batch, catalogue, index, key):
    rngs = None if key is None else {"dropout": key}
    logits, sown = model.apply(
      {"params": params}, batch, catalogue, rngs=rngs, mutable=["loads"]
    )
    codes = jnp.take(catalogue.codes, batch.targets, axis=0)
    valid = None
    if model.constrained_softmax:
      valid = [
        prefix_index.valid_mask(index, level, codes[..., :level])
        for level in range(codes.shape[-1])
      ]
    weights = (batch.targets > 0).astype(jnp.float32)
    return semantic_id_loss(logits, codes, weights, valid) | sown

  return loss


def item_softmax_loss(model: sasrec.SASRec) -> LossFn:
  """Cross-entropy over all items."""

  def loss(params, batch, catalogue, index, key):
    del index
    rngs = None if key is None else {"dropout": key}
    scores = model.apply({"params": params}, batch, catalogue, rngs=rngs)
    # Padding targets point at column 0, whose score is −inf: score column 1
    # there instead, and weigh it 0.
    labels = jnp.maximum(batch.targets, 1)
    weights = (batch.targets > 0).astype(jnp.float32)
    losses = cross_entropy(scores, labels)
    return {"loss": jnp.sum(weights * losses), "count": jnp.sum(weights)}

  return loss


def item_bce_loss(model: sasrec.SASRec) -> LossFn:
  """SASRec's own: the target against one uniformly sampled item.

  INFERRED: a sample may hit the target (probability 1/I); the original
  resamples items of the user's history, which a packed row does not hold in
  whole.
  """

  def loss(params, batch, catalogue, index, key):
    del catalogue, index
    sample_key, dropout_key = jax.random.split(
      jax.random.key(0) if key is None else key
    )
    negatives = jax.random.randint(
      sample_key, batch.targets.shape, 1, model.num_items + 1
    )
    scores = model.apply(
      {"params": params},
      batch,
      jnp.stack([batch.targets, negatives], axis=-1),
      rngs=None if key is None else {"dropout": dropout_key},
      method="pair_scores",
    )
    weights = (batch.targets > 0).astype(jnp.float32)
    losses = jax.nn.softplus(-scores[..., 0]) + jax.nn.softplus(scores[..., 1])
    return {"loss": jnp.sum(weights * losses), "count": jnp.sum(weights)}

  return loss


def make_loss(model: registry.Model) -> LossFn:
  """The loss a model is trained with.

  Raises:
    ValueError: an unknown `loss` of SASRec.
  """
  if not isinstance(model, sasrec.SASRec):
    return generative_loss(model)
  known = {"softmax": item_softmax_loss, "bce": item_bce_loss}
  if model.loss not in known:
    raise ValueError(f"model.loss={model.loss!r}: want one of {sorted(known)}")
  return known[model.loss](model)
