"""The search over all codes against every ID there is, scored one by one."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from onerec_jax.alignment import policy
from onerec_jax.inference import free_search, prefix_index
from tests import tiny

EVERY = np.asarray([*itertools.product(*map(range, tiny.CODEBOOK_SIZES))])


MODELS = {
  "lazy_decoder": tiny.lazy_decoder(constrained_softmax=False),
  # One block: quicker to compile.
  "encoder_decoder": tiny.encoder_decoder(
    constrained_softmax=False, decoder_layers=1
  ),
  "decoder_only": tiny.decoder_only(constrained_softmax=False, num_layers=1),
}
WIDTHS = 1, 7, 10_000
BATCH, CATALOGUE = tiny.separate(tiny.batch())[0], tiny.catalogue()
INDEX = prefix_index.build(np.asarray(CATALOGUE.codes), tiny.CODEBOOK_SIZES)
# Another set of items for each row.
ALLOWED = np.random.default_rng(0).random((7, tiny.NUM_ITEMS + 1)) < 0.5


@functools.cache
def searched(name):
  """({width: answers}, the widest of ALLOWED alone, `exact`) of a model.

  In one program: what the searches have in common is compiled once.
  `exact` is [B, K^L, L], the log-probability of each code of every ID.
  """
  model = MODELS[name]

  @jax.jit
  def run(params):
    def search(index, width):
      return free_search.free_search(
        model, params, BATCH, CATALOGUE, index, width
      )

    restricted = prefix_index.restrict(INDEX, jnp.asarray(ALLOWED))
    codes = jnp.broadcast_to(EVERY, (len(BATCH.items), *EVERY.shape))
    rows = policy.with_codes(BATCH, CATALOGUE, codes)
    return (
      {width: search(INDEX, width) for width in WIDTHS},
      search(restricted, WIDTHS[-1]),
      policy.log_probabilities(model, params, *rows, INDEX),
    )

  return jax.device_get(run(tiny.params(model)))


def lowest_items(allowed):
  """{semantic ID: its lowest allowed item}."""
  codes = np.asarray(CATALOGUE.codes).tolist()
  items = range(tiny.NUM_ITEMS, 0, -1)
  return {tuple(codes[item]): item for item in items if allowed[item]}


def by_hand(exact, width):
  """Beam search of one row, over a table of what each code is worth."""
  beams = {(): 0.0}
  for level in range(EVERY.shape[1]):
    gain = {
      tuple(codes[: level + 1]): of_codes[level]
      for codes, of_codes in zip(EVERY.tolist(), exact)
    }
    longer = {p: beams[p[:-1]] + g for p, g in gain.items() if p[:-1] in beams}
    best = sorted(longer, key=lambda prefix: -longer[prefix])[:width]
    beams = {prefix: longer[prefix] for prefix in best}
  return beams


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("name", MODELS)
def test_it_finds_what_a_search_by_hand_finds(name, width):
  found, _, exact = searched(name)
  found = found[width]
  assert found.codes.shape[1] == min(width, len(EVERY))
  for codes, scores, table in zip(found.codes, found.scores, exact):
    wanted = by_hand(table, width)
    assert {*map(tuple, codes.tolist())} == {*wanted}
    np.testing.assert_allclose(scores, [*wanted.values()], atol=1e-4)
    own = [wanted[tuple(each)] for each in codes.tolist()]
    np.testing.assert_allclose(scores, own, atol=1e-4)


def assert_items(found, allowed):
  """Those of the codes, of what each row is allowed."""
  for row, codes, items in zip(allowed, found.codes, found.items):
    own = lowest_items(row)
    wanted = [own.get(tuple(each), 0) for each in codes.tolist()]
    np.testing.assert_array_equal(items, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_its_items_are_those_of_its_codes(name):
  found, _, _ = searched(name)
  for of_width in found.values():
    assert_items(of_width, np.ones_like(ALLOWED))
  assert 0 < (found[WIDTHS[-1]].items > 0).mean() < 1


@pytest.mark.parametrize("name", MODELS)
def test_of_what_is_not_allowed_there_is_no_item(name):
  assert_items(searched(name)[1], ALLOWED)


def test_rows_on_eight_devices_need_no_communication():
  model, width = MODELS["lazy_decoder"], 7
  batch = jax.tree.map(lambda x: np.concatenate([x, x[:1]]), BATCH)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  spread = NamedSharding(mesh, PartitionSpec("data"))
  copied = NamedSharding(mesh, PartitionSpec())
  program = jax.jit(
    lambda params, batch, catalogue, index: free_search.free_search(
      model, params, batch, catalogue, index, width
    ),
    in_shardings=(copied, spread, copied, copied),
    out_shardings=spread,
  )
  arguments = tiny.params(model), batch, CATALOGUE, INDEX
  text = program.lower(*arguments).compile().as_text()
  for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
    assert word not in text
  alone = searched("lazy_decoder")[0][width]
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(
      a, np.concatenate([b, b[:1]]), atol=1e-5
    ),
    program(*arguments),
    alone,
  )


@pytest.mark.parametrize("name", MODELS)
def test_a_constrained_softmax_is_refused(name):
  model = MODELS[name].clone(constrained_softmax=True)
  params = tiny.params(MODELS[name])
  with pytest.raises(ValueError, match="constrained_softmax=False"):
    free_search.free_search(model, params, BATCH, CATALOGUE, INDEX, 4)
