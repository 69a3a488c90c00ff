"""Sampling against the exact distribution, scored by teacher forcing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.inference import beam_search, prefix_index, sampling
from tests import tiny

COUNT = 20_000


@pytest.fixture(scope="module", params=[True, False], ids=["legal", "free"])
def world(request):
  model = tiny.lazy_decoder(constrained_softmax=request.param)
  params = tiny.params(model)
  batch, catalogue = tiny.separate(tiny.batch())[0], tiny.catalogue()
  codes = np.asarray(catalogue.codes)
  return (
    model,
    params,
    batch,
    catalogue,
    prefix_index.build(codes, model.codebook_sizes),
  )


def draw(world, seed=0, count=COUNT, index=None, **options):
  model, params, batch, catalogue, whole = world
  jitted = jax.jit(
    lambda params, key: sampling.sample(
      model, params, batch, catalogue, whole if index is None else index, key,
      count, **options,
    )
  )  # fmt: skip
  return jax.device_get(jitted(params, jax.random.key(seed)))


def exact(world):
  """Log-probability of every item, [B, I], the lowest of equal IDs' alone."""
  model, params, batch, catalogue, index = world
  items = jnp.broadcast_to(
    jnp.arange(1, len(catalogue.codes)),
    (len(batch.items), len(catalogue.codes) - 1),
  ).astype(jnp.int32)
  scores = np.asarray(
    beam_search.exact_scores(model, params, batch, catalogue, index, items)
  ).copy()
  first = set(np.asarray(index.leaf_item).tolist())
  for item in range(1, len(catalogue.codes)):
    if item not in first:
      scores[:, item - 1] = -np.inf
  return scores


def test_items_come_as_often_as_they_are_likely(world):
  # Constrained draws from a free softmax would not be its own.
  legal = world[0].constrained_softmax
  samples, scores = draw(world, constrained=legal), exact(world)
  assert (samples.items > 0).all() == legal
  for row, chosen in enumerate(np.asarray(samples.items)):
    seen = np.bincount(chosen, minlength=scores.shape[1] + 1)[1:] / COUNT
    likely = np.exp(scores[row])
    error = np.sqrt(likely * (1 - likely) / COUNT)
    assert (np.abs(seen - likely) <= 4.5 * error + 1e-9).all()


def test_free_samples_may_be_no_items(world):
  if world[0].constrained_softmax:
    with pytest.raises(ValueError, match="constrained_softmax=False"):
      draw(world, constrained=False)
    return
  samples, scores = draw(world, constrained=False), exact(world)
  legal = (samples.items > 0).mean(axis=1)
  likely = np.exp(scores).sum(axis=1)
  assert (likely < 0.9).all()
  np.testing.assert_allclose(
    legal, likely, atol=4.5 * np.sqrt(0.25 / COUNT), rtol=0
  )


@pytest.mark.parametrize("constrained", [True, False])
def test_log_probabilities_are_those_of_teacher_forcing(world, constrained):
  if world[0].constrained_softmax and not constrained:
    pytest.skip("refused, see above")
  samples, scores = draw(world, count=64, constrained=constrained), exact(world)
  got = np.asarray(samples.log_probability).sum(axis=-1)
  for row, chosen in enumerate(np.asarray(samples.items)):
    legal = chosen > 0
    np.testing.assert_allclose(
      got[row][legal], scores[row][chosen[legal] - 1], rtol=1e-4, atol=1e-4
    )
  assert np.isfinite(got).all()


def test_codes_are_those_of_the_items(world):
  samples = draw(world, count=64)
  codes = np.asarray(world[3].codes)
  np.testing.assert_array_equal(codes[np.asarray(samples.items)], samples.codes)


def test_only_allowed_items_are_drawn(world):
  index = world[4]
  allowed = np.zeros(len(world[3].codes), bool)
  allowed[[2, 3]] = True
  samples = draw(
    world, count=256, index=prefix_index.restrict(index, jnp.asarray(allowed))
  )
  assert set(np.unique(samples.items)) <= {2, 3}


def test_a_low_temperature_takes_the_best_code_each_time(world):
  samples = draw(world, count=8, temperature=1e-4)
  assert (np.asarray(samples.codes) == np.asarray(samples.codes)[:, :1]).all()


def test_draws_are_a_function_of_the_key(world):
  again = [np.asarray(draw(world, seed, count=32).codes) for seed in (3, 3, 4)]
  np.testing.assert_array_equal(again[0], again[1])
  assert (again[0] != again[2]).any()
