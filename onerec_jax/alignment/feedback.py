"""Learning from the feedback on what was logged (V2 §3.6).

OneRec-V2 (arXiv 2508.20900) needs no reward model: users' own play times give
advantages to what was shown, and GBPO (gbpo.py) learns from them. A second loss
puts what a user liked above what the same user disliked.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from onerec_jax.alignment import gbpo, rewards
from onerec_jax.data import batch as batch_lib
from onerec_jax.data import schema
from onerec_jax.data.batch import Batch

LOSSES = ("gbpo", "pairs")
"""What `alignment.feedback_loss` may be."""

SIGNALS = {"duration": "play_quantile", "play_time": "play_time_ms"}
"""`alignment.feedback` → the label of which the batch's largest quarter is
positive: the place of a play time among the user's own of like durations, or
the play time as it is, which favours long videos."""

NO_OPINIONS = ("log_probability", "weight")
"""Labels that say nothing of what users liked."""


def label_of(feedback: str) -> str:
  """The label that a kind of feedback reads."""
  return SIGNALS.get(feedback, feedback)


def made_of(label: str) -> str:
  """Says what in the tables a label is made of; for messages."""
  if label == "play_quantile":
    return f"{label} is made of the events' play_time_ms and items' duration_ms"
  columns = (*schema.FLAGS, "play_time_ms", "log_probability")
  if label in columns or label.startswith(schema.STAGE_PREFIX):
    return f"{label} is a column of the events"
  return (
    f"{label} is no flag; flags are the events' columns "
    f"{', '.join(schema.FLAGS)} and {schema.STAGE_PREFIX}…"
  )


def advantages(
  batch: Batch, feedback: str, key: jax.Array
) -> Float[Array, "B T"]:
  """+1, −1 or 0 for each target; −1 for what was disliked.

  Args:
    batch: with labels.
    feedback: of AlignmentConfig; a label other than the two signals gives +1
      where it is set.
    key: of the draw among equals.
  """
  real = batch.targets > 0
  disliked = real & (batch.labels.get("dislike", jnp.zeros(real.shape)) > 0)
  value = batch.labels[label_of(feedback)]
  if feedback not in SIGNALS:
    liked = (real & (value > 0)).astype(jnp.float32)
    return jnp.where(disliked, -1.0, liked)
  # Padding is labelled 0, which would count among the batch's values.
  known = jnp.where(real, value, jnp.nan)
  found = rewards.duration_advantages(known.ravel(), disliked.ravel(), key)
  return found.reshape(real.shape)


def loss(
  log_probability: Float[Array, "B T L"],
  batch: Batch,
  advantage: Float[Array, "B T"],
  logged_policy: bool,
) -> Float[Array, "B T"]:
  """GBPO's of each target, a mean over its codes.

  What is logged at exposure is the probability of the whole item, and GBPO is
  of tokens. INFERRED: π_old = sg π of each token, and where the item's is known
  a positive's loss is multiplied by min(1, sg π / π_old) of the whole item: its
  gradient is then that of GBPO on items, exactly. A negative's denominator is
  1 − π unless π_old of the item is above that, so it is left alone. π has the
  dropout of the training step and what is logged has none, so the multiplier is
  noisy; without it would cost a second forward pass.

  Args:
    log_probability: of each code under the policy.
    batch: with labels.
    advantage: of each target; any scale.
    logged_policy: whether to read `log_probability` of the labels.
  """
  if logged_policy:
    own = jnp.sum(jax.lax.stop_gradient(log_probability), axis=-1)
    ratio = jnp.exp(jnp.minimum(own - batch.labels["log_probability"], 0.0))
    known = (advantage > 0) & ~jnp.isnan(ratio)
    advantage *= jnp.where(known, ratio, 1.0)
  of_codes = gbpo.gbpo(log_probability, None, advantage[..., None])
  return jnp.mean(of_codes, axis=-1)


def pair_loss(
  log_probability: Float[Array, "B T L"],
  batch: Batch,
  advantage: Float[Array, "B T"],
) -> Float[Array, "B T"]:
  """−A log σ(log π(i) − log π(j)), a mean over the user's disliked j.

  Of each target i with A > 0; 0 where nothing of the user's in this row has
  A < 0. It is DPO's loss on logged pairs, without a reference and with β = 1
  (as CPO's; dpo.py). INFERRED, no paper of the line has it: under GBPO a
  dislike pushes with π / (1 − π), next to nothing on a large catalogue.

  Args:
    log_probability: of each code under the policy.
    batch: the targets.
    advantage: of each target; any scale.
  """
  item = jnp.sum(log_probability, axis=-1)
  user = batch_lib.target_segments(batch)
  pairs = (advantage > 0)[:, :, None] & (advantage < 0)[:, None, :]
  pairs &= user[:, :, None] == user[:, None, :]
  wrong = jax.nn.softplus(item[:, None, :] - item[:, :, None])
  worse = jnp.maximum(jnp.sum(pairs, axis=2), 1)
  mean = jnp.sum(jnp.where(pairs, wrong, 0.0), axis=2) / worse
  return jnp.maximum(advantage, 0.0) * mean
