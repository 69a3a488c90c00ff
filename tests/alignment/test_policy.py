"""Log-probabilities of answers, against the search and against sampling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.alignment import policy
from onerec_jax.inference import beam_search, prefix_index, sampling
from tests import tiny

# One block but where answers share what blocks make of it.
SHALLOW = {
  "lazy_decoder": functools.partial(tiny.lazy_decoder, num_layers=1),
  "encoder_decoder": functools.partial(tiny.encoder_decoder, decoder_layers=1),
  "decoder_only": functools.partial(tiny.decoder_only, num_layers=1),
}


def world(make, constrained):
  model = make(constrained_softmax=constrained)
  batch, catalogue = tiny.separate(tiny.batch())[0], tiny.catalogue()
  index = prefix_index.build(np.asarray(catalogue.codes), model.codebook_sizes)
  return model, tiny.params(model), batch, catalogue, index


@pytest.mark.parametrize("constrained", [True, False])
@pytest.mark.parametrize("name", SHALLOW)
def test_they_are_those_of_the_search_and_of_the_sampler(name, constrained):
  """Of items the search's scores, of illegal IDs too what the sampler says."""
  model, params, batch, catalogue, index = world(SHALLOW[name], constrained)

  @jax.jit
  def all_three(params):
    given = model, params, batch, catalogue, index
    items, _, scores = beam_search.beam_search(*given, 8)
    codes, samples = catalogue.codes[items], None
    if not constrained:
      samples = sampling.sample(
        *given, jax.random.key(1), 32, constrained=False
      )
      codes = jnp.concatenate([codes, samples.codes], axis=1)
    rows = policy.with_codes(batch, catalogue, codes)
    found = policy.log_probabilities(model, params, *rows, index)
    return scores, samples, found

  scores, samples, found = all_three(params)
  np.testing.assert_allclose(np.sum(found[:, :8], axis=-1), scores, atol=1e-4)
  if not constrained:
    assert (samples.items == 0).any()
    np.testing.assert_allclose(found[:, 8:], samples.log_probability, atol=1e-4)


def test_items_of_the_context_keep_their_rows():
  """What is appended is not what the context looks up."""
  model, params, batch, catalogue, index = world(SHALLOW["lazy_decoder"], True)
  codes = jnp.broadcast_to(catalogue.codes[batch.targets], (7, 1, 3))
  rows, larger = policy.with_codes(batch, catalogue, codes)
  np.testing.assert_array_equal(
    larger.codes[: len(catalogue.codes)], catalogue.codes
  )

  @jax.jit
  def both(params):
    return [
      policy.log_probabilities(model, params, *given, index)
      for given in ((rows, larger), (batch, catalogue))
    ]

  found, wanted = both(params)
  np.testing.assert_allclose(found, wanted, atol=1e-6)


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

  @functools.partial(jax.grad, has_aux=True)
  def apart(params):
    rows = policy.with_codes(batch, catalogue, codes)
    found = policy.log_probabilities(model, params, *rows, index)
    return jnp.sum(weights * found), found

  @functools.partial(jax.grad, has_aux=True)
  def together(params):
    found = policy.group_log_probabilities(
      model, params, batch, catalogue, codes, index
    )
    return jnp.sum(weights * found), found

  # In one program the context and its blocks are compiled once.
  wanted, found = jax.jit(lambda p: (apart(p), together(p)))(params)
  np.testing.assert_allclose(found[1], wanted[1], atol=1e-5)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5),
    found[0],
    wanted[0],
  )


def test_answers_of_one_code_have_nothing_but_the_beginning():
  model, _, batch, catalogue, _ = world(SHALLOW["lazy_decoder"], True)
  model = model.clone(codebook_sizes=(tiny.NUM_ITEMS,))
  items = jnp.arange(tiny.NUM_ITEMS + 1)[:, None]
  catalogue = catalogue.replace(codes=jnp.maximum(items - 1, 0))
  params = tiny.random_params(model, batch, catalogue, 0)
  index = prefix_index.build(np.asarray(catalogue.codes), model.codebook_sizes)
  codes = jax.random.randint(jax.random.key(2), (7, 5, 1), 0, tiny.NUM_ITEMS)
  rows = policy.with_codes(batch, catalogue, codes)

  @jax.jit
  def both(params):
    return policy.log_probabilities(
      model, params, *rows, index
    ), policy.group_log_probabilities(
      model, params, batch, catalogue, codes, index
    )

  wanted, found = both(params)
  np.testing.assert_allclose(found, wanted, atol=1e-5)
