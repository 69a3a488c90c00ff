"""Losses: pure functions of (params, batch) with sums, not means.

Sums and counts leave the averaging to the step, so that microbatches and
devices with different numbers of targets are weighted exactly.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from onerec_jax.data.batch import Batch, Catalogue, target_weights
from onerec_jax.inference import prefix_index
from onerec_jax.models import registry, reward, sasrec, two_tower

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
  return sum_of_levels(_of_codes(logits, codes, valid), weights)


def _of_codes(
  logits: tuple[Float[Array, "B T _"], ...],
  codes: Int[Array, "B T L"],
  valid: list[Bool[Array, "B T _"]] | None,
) -> list[Float[Array, "B T"]]:
  return [
    cross_entropy(
      level_logits, codes[..., level], None if valid is None else valid[level]
    )
    for level, level_logits in enumerate(logits)
  ]


def sum_of_levels(
  levels: Sequence[Float[Array, "B T"]], weights: Float[Array, "B T"]
) -> Sums:
  """The sums of `semantic_id_loss` from the losses of each level's codes."""
  sums = [jnp.sum(weights * losses) for losses in levels]
  named = {f"loss_level_{i + 1}": value for i, value in enumerate(sums)}
  return dict(named, loss=sum(sums) / len(sums), count=jnp.sum(weights))


def code_losses(
  model: registry.Model,
  params: Any,
  batch: Batch,
  catalogue: Catalogue,
  index: Any,
  key: jax.Array | None = None,
) -> tuple[list[Float[Array, "B T"]], Sums]:
  """−log p of each target's codes, level by level, teacher-forced.

  Args:
    model: generative.
    params: its parameters.
    batch: contexts and targets; padding targets get numbers without meaning.
    catalogue: the targets' codes.
    index: for a constrained softmax.
    key: of dropout; None: none.

  Returns:
    The losses in nats, and `loads` where the model has experts.
  """
  rngs = None if key is None else {"dropout": key}
  logits, sown = model.apply(
    {"params": params}, batch, catalogue, rngs=rngs, mutable=["loads"]
  )
  codes = jnp.take(catalogue.codes, batch.targets, axis=0)
  valid = None
  if model.constrained_softmax:
    valid = valid_codes(index, codes)
  return _of_codes(logits, codes, valid), sown


def valid_codes(
  index: prefix_index.PrefixIndex, codes: Int[Array, "B T L"]
) -> list[Bool[Array, "B T _"]]:
  """Codes that continue each prefix to an item, level by level."""
  return [
    prefix_index.valid_mask(index, level, codes[..., :level])
    for level in range(codes.shape[-1])
  ]


def generative_loss(model: registry.Model) -> LossFn:
  """Next-token loss over the codes of the targets."""

  def loss(params, batch, catalogue, index, key):
    levels, sown = code_losses(model, params, batch, catalogue, index, key)
    return sum_of_levels(levels, target_weights(batch)) | sown

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
    weights = target_weights(batch)
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
    weights = target_weights(batch)
    losses = jax.nn.softplus(-scores[..., 0]) + jax.nn.softplus(scores[..., 1])
    return {"loss": jnp.sum(weights * losses), "count": jnp.sum(weights)}

  return loss


def in_batch_loss(model: two_tower.TwoTower) -> LossFn:
  """Softmax over the batch's targets, less log q (models/two_tower.py).

  The LossFn's `index` is two_tower.log_frequency. Other places that have the
  target's own item stay in the sum: log q counts on every one of them.
  """

  def loss(params, batch, catalogue, index, key):
    rngs = [None, None]
    if key is not None:
      rngs = [{"dropout": k} for k in jax.random.split(key)]
    ids, tables = batch.targets.reshape(-1), {"params": params}
    users, items = (
      model.apply(tables, of, catalogue, method=method, rngs=rng)
      for method, of, rng in zip(("users", "items"), (batch, ids), rngs)
    )
    users = users.reshape(len(ids), -1)
    logits = users @ items.T / model.temperature
    logits = logits - jnp.where(ids > 0, jnp.take(index, ids), 0.0)[None]
    real = jnp.broadcast_to(ids > 0, logits.shape)
    weights = target_weights(batch).reshape(-1)
    losses = cross_entropy(logits, jnp.arange(len(ids)), real)
    return {"loss": jnp.sum(weights * losses), "count": jnp.sum(weights)}

  return loss


def binary_cross_entropy(
  logits: Float[Array, "*batch"], labels: Float[Array, "*batch"]
) -> Float[Array, "*batch"]:
  """−y log σ(logit) − (1 − y) log(1 − σ(logit)), y in [0, 1]; 0 of y = NaN."""
  known = ~jnp.isnan(labels)
  losses = jax.nn.softplus(logits) - jnp.where(known, labels, 0.0) * logits
  return jnp.where(known, losses, 0.0)


def feedback_loss(model: reward.RewardModel) -> LossFn:
  """The cross-entropies of a reward model's heads, summed over its terms.

  An answer of several targets, a session, counts that many times, so that the
  mean over targets is the mean over answers. Unknown labels count nothing.
  """

  def loss(params, batch, catalogue, index, key):
    del index
    rngs = None if key is None else {"dropout": key}
    logits = model.apply({"params": params}, batch, catalogue, rngs=rngs)
    labels = model.labels(batch)
    total, sums = 0.0, {"count": jnp.sum(batch.targets > 0)}
    for head, objective, weight in model.terms:
      losses = binary_cross_entropy(logits[head], labels[objective])
      found = jnp.sum(losses) * (batch.targets.size // losses.size)
      name = objective if head == objective else f"{head}_{objective}"
      sums[f"loss_{name}"] = found
      total += weight * found
    return dict(sums, loss=total)

  return loss


def make_loss(model: registry.Model) -> LossFn:
  """The loss a model is trained with.

  Raises:
    ValueError: an unknown `loss` of SASRec.
  """
  if isinstance(model, reward.RewardModel):
    return feedback_loss(model)
  if isinstance(model, two_tower.TwoTower):
    return in_batch_loss(model)
  if not isinstance(model, sasrec.SASRec):
    return generative_loss(model)
  known = {"softmax": item_softmax_loss, "bce": item_bce_loss}
  if model.loss not in known:
    raise ValueError(f"model.loss={model.loss!r}: want one of {sorted(known)}")
  return known[model.loss](model)
