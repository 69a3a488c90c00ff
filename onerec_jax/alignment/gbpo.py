"""OneRec-V2's gradient-bounded policy loss (arXiv 2508.20900 §3.6).

  loss = −π / π'_old · A
  π'_old = max(π_old, sg π)        A ≥ 0
           max(π_old, 1 − sg π)    A < 0

No ratio is clipped and no sample dropped. For what another system exposed,
π_old is unknown and counts as sg π. Then a positive's gradient is that of the
negative log-likelihood, and a negative's that of binary cross-entropy,
∂π / (1 − π), while π < ½: bounded as π → 0, where a plain policy gradient,
∂π / π, is not. Above ½ a negative gets ∂π / π.

With a logged π_old above both, the ratio is π / π_old: a positive that the
policy has become unsure of gets a small gradient, and a sure negative,
π = .9 with π_old = .2, gets 4.5 in log π. The bounds are those of π_old = sg π.

INFERRED: per token with its item's advantage; the probability of a whole item,
a product of three, is so small that negatives would have no gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def gbpo(
  log_probability: Float[Array, "*shape"],
  old: Float[Array, "*shape"] | None,
  advantage: Float[Array, "*#shape"],
) -> Float[Array, "*shape"]:
  """GBPO's loss of each token.

  Args:
    log_probability: under the policy, in nats.
    old: as logged at exposure; None: not known, π_old = sg π.
    advantage: A of the token's item.
  """
  own = jax.lax.stop_gradient(log_probability)
  old = own if old is None else jax.lax.stop_gradient(old)
  # log(1 − π); at π = 1 it is −inf, and the maximum falls to π_old. Exact for
  # small π, where 1 − exp would be 1.
  rest = jnp.log1p(-jnp.exp(jnp.minimum(own, 0.0)))
  least = jnp.where(advantage < 0, rest, own)
  ratio = jnp.exp(log_probability - jnp.maximum(old, least))
  return -ratio * advantage
