"""Log-probabilities of answers, against the search and against sampling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.alignment import policy
from onerec_jax.inference import beam_search, prefix_index, sampling
from tests import tiny

MAKERS = [tiny.lazy_decoder, tiny.encoder_decoder, tiny.decoder_only]


def world(make, constrained):
  model = make(constrained_softmax=constrained)
  batch, catalogue = tiny.separate(tiny.batch())[0], tiny.catalogue()
  index = prefix_index.build(np.asarray(catalogue.codes), model.codebook_sizes)
  return model, tiny.params(model), batch, catalogue, index


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("make", MAKERS)
def test_of_items_they_are_the_searchs_scores(make, constrained):
  model, params, batch, catalogue, index = world(make, constrained)

  def both(params):
    items, _, scores = beam_search.beam_search(
      model, params, batch, catalogue, index, 8
    )
    rows = policy.with_codes(batch, catalogue, catalogue.codes[items])
    return scores, policy.log_probabilities(model, params, *rows, index)

  scores, found = jax.jit(both)(params)
  np.testing.assert_allclose(np.sum(found, axis=-1), scores, atol=1e-4)


@pytest.mark.parametrize("make", MAKERS)
def test_of_illegal_ids_they_are_the_samplers(make):
  model, params, batch, catalogue, index = world(make, constrained=False)

  def both(params):
    samples = sampling.sample(
      model, params, batch, catalogue, index, jax.random.key(1), 32,
      constrained=False,
    )  # fmt: skip
    rows = policy.with_codes(batch, catalogue, samples.codes)
    return samples, policy.log_probabilities(model, params, *rows, index)

  samples, found = jax.jit(both)(params)
  assert (samples.items == 0).any()
  np.testing.assert_allclose(found, samples.log_probability, atol=1e-4)


def test_items_of_the_context_keep_their_rows():
  """What is appended is not what the context looks up."""
  model, params, batch, catalogue, index = world(tiny.lazy_decoder, True)
  codes = jnp.broadcast_to(catalogue.codes[batch.targets], (7, 1, 3))
  rows, larger = policy.with_codes(batch, catalogue, codes)
  np.testing.assert_array_equal(
    larger.codes[: len(catalogue.codes)], catalogue.codes
  )
  both = jax.jit(
    lambda *given: policy.log_probabilities(model, params, *given, index)
  )
  np.testing.assert_allclose(
    both(rows, larger), both(batch, catalogue), atol=1e-6
  )


@pytest.mark.parametrize(
  ("make", "constrained"),
  [
    (tiny.lazy_decoder, True),
    (tiny.lazy_decoder, False),
    (tiny.encoder_decoder, False),
    (tiny.decoder_only, True),
  ],
)
def test_a_shared_beginning_changes_neither_values_nor_gradients(
  make, constrained
):
  """Against the same answers as targets that share nothing but the context."""
  model, params, batch, catalogue, index = world(make, constrained)
  items = jax.random.randint(jax.random.key(2), (7, 5), 1, tiny.NUM_ITEMS + 1)
  codes = catalogue.codes[items]
  # The second answer is no item, the third repeats the first.
  codes = codes.at[:, 1].set(jnp.asarray([5, 3, 7])).at[:, 2].set(codes[:, 0])
  weights = jax.random.normal(jax.random.key(3), codes.shape)

  def apart(params):
    rows = policy.with_codes(batch, catalogue, codes)
    found = policy.log_probabilities(model, params, *rows, index)
    return jnp.sum(weights * found), found

  def together(params):
    found = policy.group_log_probabilities(
      model, params, batch, catalogue, codes, index
    )
    return jnp.sum(weights * found), found

  wanted, found = (
    jax.jit(jax.grad(f, has_aux=True))(params) for f in (apart, together)
  )
  np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
    found[0],
    wanted[0],
  )


def test_answers_of_one_code_have_nothing_but_the_beginning():
  model, _, batch, catalogue, _ = world(tiny.lazy_decoder, True)
  model = model.clone(codebook_sizes=(tiny.NUM_ITEMS,))
  items = jnp.arange(tiny.NUM_ITEMS + 1)[:, None]
  catalogue = catalogue.replace(codes=jnp.maximum(items - 1, 0))
  params = tiny.random_params(model, batch, catalogue, 0)
  index = prefix_index.build(np.asarray(catalogue.codes), model.codebook_sizes)
  codes = jax.random.randint(jax.random.key(2), (7, 5, 1), 0, tiny.NUM_ITEMS)
  rows = policy.with_codes(batch, catalogue, codes)
  wanted = jax.jit(
    lambda *rows: policy.log_probabilities(model, params, *rows, index)
  )(*rows)
  found = jax.jit(
    lambda *given: policy.group_log_probabilities(model, params, *given, index)
  )(batch, catalogue, codes)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
