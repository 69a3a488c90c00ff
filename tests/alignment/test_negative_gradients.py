"""The curves of benchmarks/negative_gradients.py against closed forms."""

import numpy as np
import pytest

from benchmarks import negative_gradients

P = np.asarray(negative_gradients.PROBABILITIES)


def of_log_probability():
  """‖∂ log π / ∂ logits‖: 1 − π; of each other token −(1 − π) / (K − 1)."""
  return (1 - P) * np.sqrt(1 + 1 / (negative_gradients.CODES - 1))


# ∂loss / ∂ log π for A = −1: the ratio π / π'_old where it is not clipped.
SLOPES = {
  "GRPO, ratio 10": np.full_like(P, 10.0),
  "ECPO, ratio 10": np.full_like(P, 1.3),
  "GRPO and ECPO, ratio 1": np.ones_like(P),
  "GRPO and ECPO, ratio .5": np.zeros_like(P),
  "GBPO": P / np.maximum(P, 1 - P),
  "GBPO, π_old .2 logged": P / np.maximum(0.2, 1 - P),
}


@pytest.mark.parametrize("name", SLOPES)
def test_the_norm_of_a_disliked_tokens_gradient(name):
  assert negative_gradients.LOSSES.keys() == SLOPES.keys()
  found = negative_gradients.norms(negative_gradients.LOSSES[name])
  np.testing.assert_allclose(
    found, SLOPES[name] * of_log_probability(), rtol=2e-5, atol=1e-15
  )
