"""Preference losses over pairs: DPO and the variants OneRec compares (§1.5).

With log-probabilities of the better and the worse answer under the policy and
under a frozen reference, and the *margin*

  Δ = (log π(w) − log π_ref(w)) − (log π(l) − log π_ref(l))

  DPO     −log σ(β Δ)                                       arXiv 2305.18290
  cDPO    −(1 − ε) log σ(β Δ) − ε log σ(−β Δ)               labels wrong by ε
  rDPO    (−(1 − ε) log σ(β Δ) + ε log σ(−β Δ)) / (1 − 2ε)  arXiv 2403.00409
  IPO     (Δ − 1 / 2β)²                                     arXiv 2310.12036
  CPO     −log σ(β (log π(w) − log π(l))) − λ log π(w)      arXiv 2401.08417
  SimPO   −log σ(β (log π(w) − log π(l)) / n − γ)           arXiv 2405.14734
  S-DPO   −log σ(−log Σ_l exp(−β Δ_l))                      arXiv 2406.09215

n is the number of tokens, equal for both answers here. S-DPO has several worse
answers and is DPO with one. Losses are per pair; averaging is the caller's.
OneRec (arXiv 2502.18965) trains DPO on pairs of its own beam: the best and the
worst by its reward model; that loop is IPA.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclasses.dataclass(frozen=True)
class Pairs:
  """Log-probabilities of better and worse answers, in nats.

  Attributes:
    winner: [*batch] of the better answer under the policy.
    losers: [*batch, N] of the worse ones.
    winner_reference: [*batch] under the reference.
    losers_reference: [*batch, N] likewise.
  """

  winner: Float[Array, "*batch"]
  losers: Float[Array, "*batch N"]
  winner_reference: Float[Array, "*batch"]
  losers_reference: Float[Array, "*batch N"]

  def margins(self) -> Float[Array, "*batch N"]:
    """Δ of each worse answer; the reference takes no gradient."""
    reference = jax.lax.stop_gradient(
      self.winner_reference[..., None] - self.losers_reference
    )
    return self.winner[..., None] - self.losers - reference

  def margin(self) -> Float[Array, "*batch"]:
    """Δ of the only worse answer.

    Raises:
      ValueError: there are several.
    """
    return _only(self.margins(), "margins")


def _only(
  values: Float[Array, "*batch N"], name: str
) -> Float[Array, "*batch"]:
  if values.shape[-1] != 1:
    raise ValueError(
      f"this loss takes one worse answer a pair, not {values.shape[-1]} {name};"
      " s_dpo takes several"
    )
  return values[..., 0]


def dpo(pairs: Pairs, beta: float) -> Float[Array, "*batch"]:
  """DPO."""
  return -jax.nn.log_sigmoid(beta * pairs.margin())


def conservative_dpo(
  pairs: Pairs, beta: float, noise: float
) -> Float[Array, "*batch"]:
  """cDPO: a share `noise` (ε) of the pairs is labelled the wrong way round."""
  margin = beta * pairs.margin()
  right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
  return -(1 - noise) * right - noise * wrong


def robust_dpo(
  pairs: Pairs, beta: float, noise: float
) -> Float[Array, "*batch"]:
  """rDPO: the mean over noisy labels is DPO's loss on true ones; ε < ½."""
  margin = beta * pairs.margin()
  right, wrong = jax.nn.log_sigmoid(margin), jax.nn.log_sigmoid(-margin)
  return (-(1 - noise) * right + noise * wrong) / (1 - 2 * noise)


def ipo(pairs: Pairs, beta: float) -> Float[Array, "*batch"]:
  """IPO: the margin is drawn to 1 / 2β, and no further."""
  return jnp.square(pairs.margin() - 1 / (2 * beta))


def cpo(
  pairs: Pairs, beta: float, likelihood: float = 1.0
) -> Float[Array, "*batch"]:
  """CPO: no reference; `likelihood` (λ) of the better answer's own loss."""
  difference = pairs.winner - _only(pairs.losers, "losers")
  return -jax.nn.log_sigmoid(beta * difference) - likelihood * pairs.winner


def simpo(
  pairs: Pairs, beta: float, margin: float, tokens: int
) -> Float[Array, "*batch"]:
  """SimPO: no reference, mean log-probability a token, `margin` (γ) apart."""
  difference = pairs.winner - _only(pairs.losers, "losers")
  return -jax.nn.log_sigmoid(beta * difference / tokens - margin)


def s_dpo(pairs: Pairs, beta: float) -> Float[Array, "*batch"]:
  """S-DPO: one better answer against several worse ones."""
  return -jax.nn.log_sigmoid(
    -jax.nn.logsumexp(-beta * pairs.margins(), axis=-1)
  )
