"""OneRec's reward model: what a whole session is worth to a user.

arXiv 2502.18965 §3.4. Of a session of m items, each aware of the user
(reward.py),

  h_f = SelfAttention(h),  h = {e_1, …, e_m}
  r̂^xtr = σ(MLP_xtr(Σ_i h_f,i)),  xtr in swt, vtr, wtr, ltr

and the loss is the binary cross-entropy of the four: session watch time, view,
follow and like. Items have no places, so their order does not matter.

INFERRED: self-attention is a whole block, with residuals and a feed-forward; a
slot without an item takes no part. Labels of a session, which the paper does
not give:

  swt   its play time over `session_seconds`, at most 1
  vtr   share of its items that are viewed (`long_view`; without it, `click`)
  wtr   whether any of its authors is followed
  ltr   whether any of its items is liked
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int

from onerec_jax.data import batch as batch_lib
from onerec_jax.models import attention, layers, reward, session_decoder
from onerec_jax.partitioning import constrain

OBJECTIVES = ("swt", "vtr", "wtr", "ltr")
"""What `objectives` may hold."""


class Among(nn.Module):
  """Self-attention among the items of each session, then a feed-forward.

  h ← h + SelfAttn(RMSNorm(h));  h ← h + SwiGLU(RMSNorm(h))
  """

  num_heads: int
  d_ff: int
  dropout: float

  @nn.compact
  def __call__(
    self, h: Float[Array, "B R N D"], real: Bool[Array, "B R N"]
  ) -> Float[Array, "B R N D"]:
    """Runs the block; slots that are not real are seen by nobody."""
    D, drop = h.shape[-1], layers.Dropout(self.dropout)
    x = layers.RMSNorm(name="norm")(h)
    qkv = layers.Linear(3 * D, ("embed", "heads"), name="qkv")(x)
    q, k, v = (
      y.reshape(*h.shape[:3], self.num_heads, -1)
      for y in jnp.split(qkv, 3, axis=-1)
    )
    q = q * np.asarray(q.shape[-1] ** -0.5, q.dtype)
    logits = jnp.einsum("brnhz,brkhz->brhnk", q, k)
    logits = jnp.where(real[:, :, None, None], logits, attention.MASKED)
    weights = attention.softmax(logits).astype(v.dtype)
    x = jnp.einsum("brhnk,brkhz->brnhz", weights, v).reshape(h.shape)
    h = h + drop(layers.Linear(D, ("heads", "embed"), name="out")(x))
    x = layers.RMSNorm(name="ffn_norm")(h)
    h = h + drop(layers.SwiGLU(self.d_ff, name="ffn")(x))
    return constrain(h, ("batch", None, None, None))


class SessionReward(reward.RewardModel):
  """The model; fields beyond those of RewardModel.

  Attributes:
    session_size: m.
    session_seconds: play time at which `swt` is 1.
  """

  session_size: int
  session_seconds: float

  @property
  def value_weights(self) -> Mapping[str, float]:
    """Of the heads there are.

    INFERRED: the paper says that swt and ltr are the ones watched, and not how
    four heads become one reward.
    """
    weights = {"swt": 1.0, "vtr": 0.5, "wtr": 0.5, "ltr": 1.0}
    return {name: weights[name] for name in self.objectives}

  def setup(self):
    super().setup()
    self.among = Among(self.num_heads, self.d_ff, self.dropout)
    self.among_norm = layers.RMSNorm()
    self.towers = reward.Towers(len(self.objectives), self.d_ff)

  @property
  def terms(self) -> tuple[reward.Term, ...]:
    """A head an objective."""
    return tuple(reward.Term(name, name) for name in self.objectives)

  def __call__(
    self, batch: batch_lib.Batch, catalogue: batch_lib.Catalogue
  ) -> dict[str, Float[Array, "B G"]]:
    """Logits of the batch's own sessions, G = T / m.

    Args:
      batch: its targets are sessions of m, one after the other; fewer than m
        are the beginning of one.
      catalogue: of the items.

    Raises:
      ValueError: the targets are not whole sessions.
    """
    m = self._size(batch)
    sessions = session_decoder.one_target_a_session(batch, m)
    candidates = batch.targets.reshape(len(batch.targets), -1, m)
    return self.scores(sessions, catalogue, candidates)

  def scores(
    self,
    batch: batch_lib.Batch,
    catalogue: batch_lib.Catalogue,
    candidates: Int[Array, "#B R *m"],
  ) -> dict[str, Float[Array, "B R"]]:
    """See RewardModel; an item given alone is a session of one."""
    if candidates.ndim == 2:
      candidates = candidates[..., None]
    h, _ = self.aware(batch, catalogue, candidates)
    real = jnp.broadcast_to(candidates > 0, h.shape[:3])
    h = self.among_norm(self.among(h, real))
    total = jnp.sum(jnp.where(real[..., None], h, 0.0), axis=2)
    logits, _ = self.towers(total)
    return dict(zip(self.objectives, jnp.moveaxis(logits, -1, 0)))

  def labels(self, batch: batch_lib.Batch) -> dict[str, Float[Array, "B G"]]:
    """Objective → labels of the sessions; see the module docstring.

    NaN where an item of the session is missing or its feedback is unknown.
    """
    m = self._size(batch)
    group = lambda x: x.reshape(len(x), -1, m)
    whole = jnp.all(group(batch.targets > 0), axis=-1)

    def of(name: str) -> Array:
      if name == "swt":
        played = group(reward.known_label(batch, "play_time_ms"))
        seconds = jnp.sum(played, axis=-1) / 1000.0
        return jnp.minimum(seconds / self.session_seconds, 1.0)
      if name == "vtr":
        viewed = group(reward.known_label(batch, "long_view", "click"))
        return jnp.mean(viewed, axis=-1)
      flag = {"wtr": "follow", "ltr": "like"}[name]
      return jnp.max(group(reward.known_label(batch, flag)), axis=-1)

    return {
      name: jnp.where(whole, of(name), jnp.nan) for name in self.objectives
    }

  def _size(self, batch: batch_lib.Batch) -> int:
    """m, or fewer where the batch has but the beginning of one session."""
    T = batch.targets.shape[1]
    m = min(self.session_size, T)
    if T % m:
      raise ValueError(
        f"{T} targets a row are no sessions of {m}; set pipeline.row_targets "
        "to a multiple of model.session_size"
      )
    return m


def block_parameters(model: SessionReward) -> int:
  """Parameters of the blocks' matrices and of the towers' first layers."""
  D, F = model.d_model, model.d_ff
  among = 4 * D**2 + 3 * D * F
  return reward.backbone_parameters(model) + among + _towers(model)


def forward_flops(
  model: SessionReward, rows: int, positions: int, targets: int
) -> float:
  """Multiply-adds ×2 of one forward pass over a batch, padding included.

  Args:
    model: the model.
    rows: B.
    positions: S.
    targets: T.
  """
  D, m = model.d_model, min(model.session_size, targets)
  among = targets * (4 * D**2 + 3 * D * model.d_ff + 2 * m * D)
  total = reward.backbone_cost(model, positions, targets) + among
  return 2.0 * rows * (total + targets // m * _towers(model))


def _towers(model: SessionReward) -> int:
  return len(model.objectives) * model.d_model * model.d_ff
