"""Losses against closed forms and loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import model_configs
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.models import registry
from onerec_jax.training import losses


def test_cross_entropy_of_uniform_logits_is_log_k():
  logits = jnp.zeros((5, 7))
  found = losses.cross_entropy(logits, jnp.arange(5))
  np.testing.assert_allclose(found, np.log(7), rtol=1e-6)


def test_constrained_cross_entropy_equals_softmax_over_the_valid_entries():
  rng = np.random.default_rng(0)
  logits = rng.normal(size=(6, 9)).astype(np.float32)
  valid = rng.random((6, 9)) < 0.5
  labels = rng.integers(0, 9, 6)
  valid[np.arange(6), labels] = True
  found = losses.cross_entropy(
    jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(valid)
  )
  for row in range(6):
    terms = np.exp(logits[row][valid[row]].astype(np.float64))
    expected = np.log(terms.sum()) - logits[row, labels[row]]
    np.testing.assert_allclose(found[row], expected, rtol=1e-5)


def test_constrained_cross_entropy_stays_finite_for_padding():
  """A padding target's prefix has no continuation: nothing may be infinite."""
  none = jnp.zeros((1, 4), bool)
  logits, labels = jnp.ones((1, 4)), jnp.zeros(1, jnp.int32)
  loss = lambda x: losses.cross_entropy(x, labels, none).sum() * 0.0
  assert float(loss(logits)) == 0.0
  assert np.isfinite(jax.grad(loss)(logits)).all()


def test_semantic_id_loss_is_the_mean_over_levels_and_skips_padding():
  rng = np.random.default_rng(1)
  sizes = (5, 3, 4)
  logits = [rng.normal(size=(2, 3, k)).astype(np.float32) for k in sizes]
  codes = np.stack([rng.integers(0, k, (2, 3)) for k in sizes], -1)
  weights = np.asarray([[1, 1, 0], [1, 0, 0]], np.float32)
  sums = losses.semantic_id_loss(
    tuple(jnp.asarray(x) for x in logits),
    jnp.asarray(codes),
    jnp.asarray(weights),
    None,
  )
  per_level = np.zeros(3)
  for b, t in np.argwhere(weights > 0):
    for level, k in enumerate(sizes):
      x = logits[level][b, t].astype(np.float64)
      log_p = x - np.log(np.exp(x).sum())
      per_level[level] -= log_p[codes[b, t, level]]
      assert log_p.shape == (k,)
  np.testing.assert_allclose(sums["loss"], per_level.mean(), rtol=1e-5)
  np.testing.assert_allclose(sums["loss_level_2"], per_level[1], rtol=1e-5)
  assert float(sums["count"]) == 3.0


@pytest.fixture(scope="module")
def scorer():
  """A SASRec, its parameters, a batch of three targets (one padding)."""
  model = registry.create(model_configs.SASRecConfig(d_model=8), 5, (), {}, {})
  one = lambda *values: jnp.asarray([values], jnp.int32)
  batch = Batch(
    items=one(0, 1, 2),
    segment=one(1, 1, 1),
    features={},
    targets=one(4, 0, 2),
    visible_from=one(1, 0, 1),
    visible_until=one(2, 0, 3),
  )
  catalogue = Catalogue(jnp.zeros((6, 1), jnp.int32), {})
  params = model.init(jax.random.key(0), batch, catalogue)["params"]
  # The initial scores are all near 0; wider ones tell losses apart.
  params = jax.tree.map(lambda x: 3.0 * x, params)
  scores = np.asarray(model.apply({"params": params}, batch, catalogue))
  return model, params, batch, catalogue, scores[0].astype(np.float64)


def test_item_softmax_loss_against_numpy(scorer):
  model, params, batch, catalogue, scores = scorer
  sums = losses.make_loss(model)(params, batch, catalogue, None, None)
  expected = sum(
    np.log(np.exp(scores[slot, 1:]).sum()) - scores[slot, target]
    for slot, target in ((0, 4), (2, 2))
  )
  np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)
  assert float(sums["count"]) == 2.0


def test_item_bce_loss_converges_to_its_expectation_over_negatives(scorer):
  """Averaged over keys: softplus(−s+) + mean over items of softplus(s−)."""
  model, params, batch, catalogue, scores = scorer
  model = model.clone(loss="bce", dropout=0.0)
  loss = losses.make_loss(model)
  one = lambda key: loss(params, batch, catalogue, None, key)["loss"]
  found = jax.vmap(one)(jax.random.split(jax.random.key(0), 20_000)).mean()
  softplus = lambda x: np.log1p(np.exp(x))
  expected = sum(
    softplus(-scores[slot, target]) + softplus(scores[slot, 1:]).mean()
    for slot, target in ((0, 4), (2, 2))
  )
  np.testing.assert_allclose(found, expected, atol=0.02)


def test_unknown_loss_is_named():
  model = registry.create(
    model_configs.SASRecConfig(loss="hinge"), 5, (), {}, {}
  )
  with pytest.raises(ValueError, match="hinge"):
    losses.make_loss(model)
