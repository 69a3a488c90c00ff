"""Rewards of one's own, as a config names them."""

import jax
import jax.numpy as jnp


def low_ids(histories, candidates):
  """1 for items 1 to 10, whoever asks; of a session the mean."""
  del histories
  earned = (candidates <= 10).astype(jnp.float32)
  return jnp.mean(earned.reshape(*candidates.shape[:2], -1), axis=-1)


def of_each_request(histories, candidates):
  """Of a wrong shape: one reward a request."""
  del histories
  return jnp.mean(candidates, axis=1, keepdims=True)


table = jax.tree_util.Partial(
  lambda values, histories, candidates: values[candidates],
  jnp.linspace(-1.0, 1.0, 40),
)
"""A reward with parameters."""
