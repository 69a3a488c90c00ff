"""Preference losses against their formulas in numpy and known properties."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.alignment import dpo

BETA = 0.3


def pairs(losers=1, size=6, seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(-rng.exponential(5.0, shape), jnp.float32)
  return dpo.Pairs(
    draw(size), draw(size, losers), draw(size), draw(size, losers)
  )


def ratios(of):
  """π / π_ref of winners and losers, in float64."""
  wide = lambda x: np.asarray(x, np.float64)
  winner = np.exp(wide(of.winner) - wide(of.winner_reference))
  return winner, np.exp(wide(of.losers) - wide(of.losers_reference))


def of_margins(margins):
  """Pairs with these margins."""
  zeros = jnp.zeros(len(margins))
  return dpo.Pairs(jnp.asarray(margins), zeros[:, None], zeros, zeros[:, None])


def test_dpo_is_a_bradley_terry_likelihood():
  """σ(β Δ) = w^β / (w^β + l^β) with ratios w and l."""
  given = pairs()
  winner, losers = ratios(given)
  chosen = winner**BETA / (winner**BETA + losers[:, 0] ** BETA)
  np.testing.assert_allclose(dpo.dpo(given, BETA), -np.log(chosen), rtol=1e-5)


def test_s_dpo_is_a_choice_among_all():
  given = pairs(losers=4)
  winner, losers = ratios(given)
  chosen = winner**BETA / (winner**BETA + np.sum(losers**BETA, axis=1))
  np.testing.assert_allclose(dpo.s_dpo(given, BETA), -np.log(chosen), rtol=1e-5)


def test_s_dpo_with_one_loser_is_dpo():
  given = pairs()
  np.testing.assert_allclose(
    dpo.s_dpo(given, BETA), dpo.dpo(given, BETA), rtol=1e-6
  )


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.4])
def test_noisy_labels(noise):
  """cDPO is DPO's mean over noisy labels; rDPO's mean over them is DPO."""
  right = of_margins([-3.0, -0.5, 0.0, 2.0, 10.0])
  wrong = of_margins([3.0, 0.5, 0.0, -2.0, -10.0])
  mixed = (1 - noise) * dpo.dpo(right, BETA) + noise * dpo.dpo(wrong, BETA)
  np.testing.assert_allclose(
    dpo.conservative_dpo(right, BETA, noise), mixed, rtol=1e-5
  )
  robust = (1 - noise) * dpo.robust_dpo(right, BETA, noise)
  robust += noise * dpo.robust_dpo(wrong, BETA, noise)
  np.testing.assert_allclose(robust, dpo.dpo(right, BETA), rtol=1e-4)


def test_ipo_has_its_minimum_at_a_finite_margin():
  margins = jnp.linspace(-5, 5, 1001)
  losses = dpo.ipo(of_margins(margins), BETA)
  assert margins[jnp.argmin(losses)] == pytest.approx(1 / (2 * BETA), abs=0.01)
  assert losses[0] == pytest.approx((5 + 1 / (2 * BETA)) ** 2, rel=1e-5)


def test_losses_without_a_reference():
  given = pairs()
  winner, loser = (
    np.asarray(x, np.float64) for x in (given.winner, given.losers[:, 0])
  )
  sigmoid = lambda x: 1 / (1 + np.exp(-x))
  np.testing.assert_allclose(
    dpo.cpo(given, BETA, 0.5),
    -np.log(sigmoid(BETA * (winner - loser))) - 0.5 * winner,
    rtol=1e-5,
  )
  np.testing.assert_allclose(
    dpo.simpo(given, 2.0, 0.5, tokens=3),
    -np.log(sigmoid(2.0 * (winner / 3 - loser / 3) - 0.5)),
    rtol=1e-5,
  )


def test_dpo_pushes_by_how_wrong_it_is():
  """Gradients ∓β σ(−β Δ), and none for the reference."""
  given = pairs()
  margin = np.asarray(given.margin())

  def total(winner, losers, winner_reference, losers_reference):
    return jnp.sum(
      dpo.dpo(
        dpo.Pairs(winner, losers, winner_reference, losers_reference), BETA
      )
    )

  of_winner, of_loser, *of_reference = jax.grad(total, argnums=(0, 1, 2, 3))(
    given.winner, given.losers, given.winner_reference, given.losers_reference
  )
  push = BETA / (1 + np.exp(BETA * margin))
  np.testing.assert_allclose(of_winner, -push, rtol=1e-4)
  np.testing.assert_allclose(of_loser[:, 0], push, rtol=1e-4)
  assert not any(np.any(x) for x in of_reference)


@pytest.mark.parametrize(
  "loss",
  [
    lambda p: dpo.dpo(p, BETA),
    lambda p: dpo.conservative_dpo(p, BETA, 0.1),
    lambda p: dpo.robust_dpo(p, BETA, 0.1),
    lambda p: dpo.cpo(p, BETA),
    lambda p: dpo.simpo(p, BETA, 0.5, 3),
    lambda p: dpo.s_dpo(p, BETA),
  ],
)
def test_extreme_margins_stay_finite(loss):
  of = of_margins([-1e4, 1e4])
  assert np.isfinite(loss(of)).all()


def test_several_losers_are_refused_by_losses_of_one():
  with pytest.raises(
    ValueError, match="one worse answer a pair, not 4 margins"
  ):
    dpo.dpo(pairs(losers=4), BETA)
  with pytest.raises(ValueError, match="not 4 losers; s_dpo takes several"):
    dpo.cpo(pairs(losers=4), BETA)
