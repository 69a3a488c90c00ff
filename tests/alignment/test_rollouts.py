"""Answers against the searches they come from, and against teacher forcing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import model_configs
from onerec_jax.alignment import rollouts
from onerec_jax.alignment_config import AlignmentConfig
from onerec_jax.inference import prefix_index
from tests import tiny


def ask(model, allowed=None, **settings):
  """(answers, their log-probabilities by teacher forcing, catalogue)."""
  params, catalogue = tiny.params(model), tiny.catalogue()
  requests = tiny.separate(tiny.batch())[0]
  index = prefix_index.build(np.asarray(catalogue.codes), model.codebook_sizes)
  asked = index if allowed is None else prefix_index.restrict(index, allowed)
  config = AlignmentConfig(**settings)

  def both(params):
    found = rollouts.answer(
      model, params, requests, catalogue, asked, jax.random.key(0), config
    )
    return found, rollouts.log_probability(
      model, params, requests, found.codes, catalogue, index
    )

  found, again = jax.jit(both)(params)
  return jax.device_get(found), np.asarray(again), catalogue


# Small and dense: quicker to compile.
lazy = functools.partial(tiny.lazy_decoder, num_layers=1)
sessions = functools.partial(
  tiny.session_decoder, decoder_layers=1, moe=model_configs.MoEConfig()
)


@pytest.mark.parametrize("make", [lazy, sessions])
def test_beams_are_different_items_and_log_what_the_policy_says(make):
  found, again, catalogue = ask(make(), group=6)
  assert found.legal.all()
  np.testing.assert_allclose(found.log_probability, again, atol=1e-4)
  assert (np.diff(found.log_probability, axis=1) <= 1e-5).all()
  items = found.items.reshape(7, 6, -1)
  np.testing.assert_array_equal(found.codes, catalogue.codes[items])
  for row in items:
    assert len({tuple(answer) for answer in row.tolist()}) == 6


def test_dead_beams_are_no_answers():
  """Four items are allowed: two of six beams have nothing to say."""
  allowed = np.zeros(tiny.NUM_ITEMS + 1, bool)
  codes = np.asarray(tiny.catalogue().codes)[1:]
  _, first = np.unique(codes, axis=0, return_index=True)
  allowed[1 + first[:4]] = True
  found, again, _ = ask(lazy(), jnp.asarray(allowed), group=6)
  np.testing.assert_array_equal(found.legal.sum(axis=1), 4)
  assert np.isfinite(found.log_probability).all()
  assert np.isfinite(again).all()
  legal = found.legal
  np.testing.assert_allclose(
    found.log_probability[legal], again[legal], atol=1e-4
  )


@pytest.mark.parametrize("search", ["sample", "beam"])
def test_free_answers_may_be_no_items(search):
  found, again, catalogue = ask(
    lazy(constrained_softmax=False), search=search,
    constrained=False, group=64,
  )  # fmt: skip
  np.testing.assert_allclose(found.log_probability, again, atol=1e-4)
  known = {*map(tuple, np.asarray(catalogue.codes)[1:].tolist())}
  for row, legal, scores in zip(
    found.codes[:, :, 0].tolist(), found.legal, found.log_probability
  ):
    answers = [*map(tuple, row)]
    assert [answer in known for answer in answers] == legal.tolist()
    if search == "beam":
      assert len({*answers}) == 64
      assert (np.diff(scores) <= 1e-5).all()
  assert 0 < found.legal.mean() < 1
