"""The curves of benchmarks/negative_gradients.py against closed forms."""

import json
import subprocess
import sys

import numpy as np
import pytest

CODES = 8192

# ∂loss / ∂ log π for A = −1: the ratio π / π'_old where it is not clipped.
SLOPES = {
  "GRPO, ratio 10": lambda p: np.full_like(p, 10.0),
  "ECPO, ratio 10": lambda p: np.full_like(p, 1.3),
  "GRPO and ECPO, ratio 1": np.ones_like,
  "GRPO and ECPO, ratio .5": np.zeros_like,
  "GBPO": lambda p: p / np.maximum(p, 1 - p),
  "GBPO, π_old .2 logged": lambda p: p / np.maximum(0.2, 1 - p),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory):
  """What the program writes; its flags are those of other benchmarks."""
  output = tmp_path_factory.mktemp("gradients") / "found.json"
  command = ["-m", "benchmarks.negative_gradients", f"--output={output}"]
  subprocess.run([sys.executable, *command], check=True, capture_output=True)
  return json.loads(output.read_text())


@pytest.mark.parametrize("name", SLOPES)
def test_the_norm_of_a_disliked_tokens_gradient(found, name):
  assert found.keys() == {"probability", *SLOPES}
  p = np.asarray(found["probability"])
  # ∂ log π / ∂ logits: 1 − π; of each other token −(1 − π) / (K − 1).
  of_logits = (1 - p) * np.sqrt(1 + 1 / (CODES - 1))
  np.testing.assert_allclose(
    found[name], SLOPES[name](p) * of_logits, rtol=2e-5, atol=1e-15
  )
