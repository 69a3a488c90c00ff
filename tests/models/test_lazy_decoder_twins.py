"""Ways to run the lazy decoder that must not differ."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny


@pytest.fixture(scope="module")
def batch():
  return tiny.batch()


@pytest.fixture(scope="module")
def catalogue():
  return tiny.catalogue()


def _stacked(params, first, num_layers):
  """Parameters of the loop → those of the scan over blocks from `first` on."""
  params = dict(params)
  blocks = [params.pop(f"layers_{i}") for i in range(first, num_layers)]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
  return {**params, "scanned": {"block": stacked}}


def _run(model, params, batch, catalogue):
  """Logits, gradients and loads."""

  def loss(p):
    logits, sown = model.apply(
      {"params": p}, batch, catalogue, mutable=["loads"]
    )
    return sum(jnp.sum(jnp.square(x)) for x in logits), (logits, sown)

  grads, (logits, sown) = jax.jit(jax.grad(loss, has_aux=True))(params)
  return logits, grads, sown.get("loads", {})


def _assert_close(one, other, tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, atol=tolerance, rtol=tolerance
    ),
    one,
    other,
  )


@pytest.mark.parametrize(
  ("first", "changes"),
  [
    (0, {"num_layers": 3}),
    (
      1,
      {
        "num_layers": 3,
        "moe": tiny.experts(dense_layers=1, shared_experts=1),
      },
    ),
  ],
)
def test_scanned_layers_equal_the_loop(batch, catalogue, first, changes):
  """Blocks from `first` on are scanned; dense ones before experts are not."""
  changes = {**changes, "kv_layers": 2, "kv_split": 2}
  num_layers = changes["num_layers"]
  loop = tiny.lazy_decoder(**changes)
  scan = tiny.lazy_decoder(**changes, scan_layers=True, remat="dots")
  params = tiny.params(loop)
  stacked = _stacked(params, first, num_layers)
  assert jax.tree.map(np.shape, stacked) == jax.tree.map(
    np.shape, tiny.params(scan)
  )
  logits, grads, loads = _run(loop, params, batch, catalogue)
  found, found_grads, found_loads = _run(scan, stacked, batch, catalogue)
  _assert_close(found, logits, 1e-5)
  _assert_close(found_grads, _stacked(grads, first, num_layers), 1e-3)
  if "moe" in changes:
    loads = _stacked(loads, first, num_layers)
  _assert_close(found_loads, loads, 0)
