"""Ways to run the lazy decoder that must not differ."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tiny
from tests.models import lazy_decoder_oracle as oracle


@pytest.fixture(scope="module")
def batch():
  return tiny.batch()


@pytest.fixture(scope="module")
def catalogue():
  return tiny.catalogue()


def _stacked(params, num_layers):
  """Parameters of the loop → those of the scan."""
  params = dict(params)
  blocks = [params.pop(f"layers_{i}") for i in range(num_layers)]
  stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *blocks)
  return {**params, "layers": {"block": stacked}}


def _values_and_grads(model, params, batch, catalogue, key=None):
  rngs = None if key is None else {"dropout": key}

  def loss(p):
    logits = model.apply({"params": p}, batch, catalogue, rngs=rngs)
    return sum(jnp.sum(jnp.square(x)) for x in logits), logits

  grads, logits = tiny.jit(jax.grad(loss, has_aux=True))(params)
  return logits, grads


def _assert_close(one, other, tolerance):
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, b, atol=tolerance, rtol=tolerance
    ),
    one,
    other,
  )


def test_scanned_layers_equal_the_loop(batch, catalogue):
  changes = {"num_layers": 3, "kv_layers": 2, "kv_split": 2}
  loop = tiny.lazy_decoder(**changes)
  scan = tiny.lazy_decoder(**changes, scan_layers=True, remat="dots")
  params = tiny.params(loop)
  stacked = _stacked(params, 3)
  assert jax.tree.map(np.shape, stacked) == jax.tree.map(
    np.shape, tiny.params(scan)
  )
  logits, grads = _values_and_grads(loop, params, batch, catalogue)
  found, found_grads = _values_and_grads(scan, stacked, batch, catalogue)
  _assert_close(found, logits, 1e-5)
  _assert_close(found_grads, _stacked(grads, 3), 1e-3)


def test_recomputation_changes_nothing_but_memory(batch, catalogue):
  """Dropout included: the recomputed mask is the first one."""
  expected = None
  for remat in ("none", "full", "dots"):
    model = tiny.lazy_decoder(
      num_layers=1, remat=remat, dropout=0.3, context_dropout=0.3
    )
    params = tiny.params(model)
    program = jax.make_jaxpr(
      lambda p, m=model: m.apply({"params": p}, batch, catalogue)
    )(params)
    assert ("remat" in str(program)) == (remat != "none")
    if remat == "dots":
      continue  # its values: test_scanned_layers_equal_the_loop
    found = _values_and_grads(
      model, params, batch, catalogue, jax.random.key(3)
    )
    expected = expected or found
    _assert_close(found, expected, 1e-4)


@pytest.mark.parametrize("scan_layers", [False, True])
def test_decoding_step_by_step_equals_teacher_forcing(
  batch, catalogue, scan_layers
):
  model = tiny.lazy_decoder(
    num_layers=2, kv_layers=2, kv_split=2, scan_layers=scan_layers
  )
  params = tiny.params(model)
  W = 4
  items = np.random.default_rng(7).permutation(tiny.NUM_ITEMS)[: 2 * W] + 1
  items = jnp.asarray(items.reshape(2, W), jnp.int32)
  # What target 1 of each row sees, for all beams.
  first, until = batch.visible_from[:, 1:2], batch.visible_until[:, 1:2]
  forced = batch.replace(
    targets=items,
    visible_from=jnp.repeat(first, W, axis=1),
    visible_until=jnp.repeat(until, W, axis=1),
  )
  expected = oracle.logits_of(model, params, forced, catalogue)
  query = batch.replace(
    targets=jnp.zeros((2, 1), jnp.int32),
    visible_from=first,
    visible_until=until,
  )
  codes = catalogue.codes[items]
  context = model.apply({"params": params}, query, catalogue, method="encode")

  @functools.partial(tiny.jit, static_argnums=0)
  def step(level, previous, cache):
    return model.apply(
      {"params": params}, level, previous, cache, context, method="decode_step"
    )

  close = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)
  logits, cache = step(0, None, None)
  assert logits.shape == (2, 1, tiny.CODEBOOK_SIZES[0])
  for beam in range(W):
    close(logits[:, 0], expected[0][:, beam])
  cache = jax.tree.map(lambda x: jnp.repeat(x, W, axis=2), cache)
  logits, cache = step(1, codes[..., 0], cache)
  close(logits, expected[1])
  # Beams reordered between the steps, as the search does, on axis 2.
  order = np.asarray([2, 0, 3, 1])
  cache = jax.tree.map(lambda x: x[:, :, order], cache)
  logits, cache = step(2, codes[:, order, 1], cache)
  close(logits, expected[2][:, order])
  assert {leaf.shape[:3] for leaf in jax.tree.leaves(cache)} == {(2, 2, W)}
