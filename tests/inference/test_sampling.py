"""Sampling against the exact distribution, scored by teacher forcing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.inference import beam_search, prefix_index, sampling
from tests import tiny

EACH, SEEDS = 5000, range(4)
COUNT = EACH * len(SEEDS)
BATCH, CATALOGUE = tiny.separate(tiny.batch())[0], tiny.catalogue()
INDEX = prefix_index.build(np.asarray(CATALOGUE.codes), tiny.CODEBOOK_SIZES)
# One block: what is sampled is a matter of logits, not of depth. By whether the
# softmax is over codes that continue to an item; their parameters are the same.
MODELS = {
  legal: tiny.lazy_decoder(num_layers=1, constrained_softmax=legal)
  for legal in (True, False)
}
# (the softmax is constrained, the draws are, how many)
WAYS = {
  "legal": (True, True, EACH),
  "free": (False, False, EACH),
  "legal_of_free": (False, True, 64),
}


@jax.jit
def program(params, index, key):
  """{way: samples}, many at temperature 1 and few that are all but frozen.

  One program for all tests: what the ways have in common is compiled once.
  """

  def samples(most, **options):
    return {
      way: sampling.sample(
        MODELS[softmax], params, BATCH, CATALOGUE, index, key,
        min(count, most), constrained, **options,
      )
      for way, (softmax, constrained, count) in WAYS.items()
    }  # fmt: skip

  return samples(EACH), samples(8, temperature=1e-4)


def draw(seed, index=INDEX):
  params = tiny.params(MODELS[True])
  return jax.device_get(program(params, index, jax.random.key(seed)))


@pytest.fixture(scope="module")
def draws():
  return [draw(seed) for seed in SEEDS]


@pytest.fixture(scope="module")
def drawn(draws):
  """All draws of all seeds: {way: samples}."""
  each = [many for many, _ in draws]
  return jax.tree.map(lambda *x: np.concatenate(x, axis=1), *each)


@pytest.fixture(scope="module")
def exact():
  """Log-probabilities of all items, [B, I], the lowest of equal IDs' alone.

  By whether the softmax is constrained.
  """
  items = np.arange(1, len(CATALOGUE.codes), dtype=np.int32)
  every = jnp.broadcast_to(items, (len(BATCH.items), len(items)))

  @jax.jit
  def both(params):
    return {
      legal: beam_search.exact_scores(
        model, params, BATCH, CATALOGUE, INDEX, every
      )
      for legal, model in MODELS.items()
    }

  first = np.isin(items, np.asarray(INDEX.leaf_item))
  return {
    legal: np.where(first, scores, -np.inf)
    for legal, scores in both(tiny.params(MODELS[True])).items()
  }


# Constrained draws from a free softmax would not be its own.
@pytest.mark.parametrize("way", ["legal", "free"])
def test_items_come_as_often_as_they_are_likely(drawn, exact, way):
  legal = WAYS[way][0]
  samples, scores = drawn[way], exact[legal]
  assert (samples.items > 0).all() == legal
  for row, chosen in enumerate(samples.items):
    seen = np.bincount(chosen, minlength=scores.shape[1] + 1)[1:] / COUNT
    likely = np.exp(scores[row])
    error = np.sqrt(likely * (1 - likely) / COUNT)
    assert (np.abs(seen - likely) <= 4.5 * error + 1e-9).all()


def test_free_samples_may_be_no_items(drawn, exact):
  legal = (drawn["free"].items > 0).mean(axis=1)
  likely = np.exp(exact[False]).sum(axis=1)
  assert (likely < 0.9).all()
  np.testing.assert_allclose(
    legal, likely, atol=4.5 * np.sqrt(0.25 / COUNT), rtol=0
  )


def test_free_draws_from_a_constrained_softmax_are_refused():
  model = MODELS[True]
  given = tiny.params(model), BATCH, CATALOGUE, INDEX, jax.random.key(0)
  with pytest.raises(ValueError, match="constrained_softmax=False"):
    sampling.sample(model, *given, 8, constrained=False)


@pytest.mark.parametrize("way", WAYS)
def test_log_probabilities_are_those_of_teacher_forcing(drawn, exact, way):
  samples, scores = drawn[way], exact[WAYS[way][0]]
  got = samples.log_probability.sum(axis=-1)
  for row, chosen in enumerate(samples.items):
    legal = chosen > 0
    np.testing.assert_allclose(
      got[row][legal], scores[row][chosen[legal] - 1], rtol=1e-4, atol=1e-4
    )
  assert np.isfinite(got).all()


@pytest.mark.parametrize("way", ["legal", "legal_of_free"])
def test_codes_are_those_of_the_items(drawn, way):
  samples = drawn[way]
  codes = np.asarray(CATALOGUE.codes)
  np.testing.assert_array_equal(codes[samples.items], samples.codes)


def test_only_allowed_items_are_drawn():
  allowed = np.isin(np.arange(len(CATALOGUE.codes)), [2, 3])
  samples, _ = draw(0, prefix_index.restrict(INDEX, jnp.asarray(allowed)))
  for way in ("legal", "legal_of_free"):
    assert {*samples[way].items.ravel().tolist()} <= {2, 3}


@pytest.mark.parametrize("way", WAYS)
def test_a_low_temperature_takes_the_best_code_each_time(draws, way):
  for _, few in draws:
    assert (few[way].codes == few[way].codes[:, :1]).all()


def test_draws_are_a_function_of_the_key(draws):
  (first, _), (other, _), *_ = draws
  again, _ = draw(SEEDS[0])
  for way, samples in first.items():
    np.testing.assert_array_equal(samples.codes, again[way].codes)
    assert (samples.codes != other[way].codes).any()
