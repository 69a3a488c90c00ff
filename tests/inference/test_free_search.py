"""The search over all codes against every ID there is, scored one by one."""

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


@pytest.fixture(
  scope="module", params=["lazy_decoder", "encoder_decoder", "decoder_only"]
)
def world(request):
  return make_world(getattr(tiny, request.param))


def make_world(make):
  model = make(constrained_softmax=False)
  batch, catalogue = tiny.separate(tiny.batch())[0], tiny.catalogue()
  index = prefix_index.build(np.asarray(catalogue.codes), model.codebook_sizes)
  return model, tiny.params(model), batch, catalogue, index


@pytest.fixture(scope="module")
def exact(world):
  """[B, K^L, L] log-probability of each code of every ID, teacher-forced."""
  model, params, batch, catalogue, index = world
  codes = jnp.broadcast_to(EVERY, (len(batch.items), *EVERY.shape))
  rows = policy.with_codes(batch, catalogue, codes)
  return np.asarray(
    jax.jit(
      lambda params: policy.log_probabilities(model, params, *rows, index)
    )(params)
  )


def lowest_items(catalogue, allowed):
  """{semantic ID: its lowest allowed item}."""
  codes = np.asarray(catalogue.codes).tolist()
  items = range(tiny.NUM_ITEMS, 0, -1)
  return {tuple(codes[item]): item for item in items if allowed[item]}


def search(world, width):
  model, params, batch, catalogue, index = world
  jitted = jax.jit(
    lambda params: free_search.free_search(
      model, params, batch, catalogue, index, width
    )
  )
  return jax.device_get(jitted(params))


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


@pytest.mark.parametrize("width", [1, 7, 10_000])
def test_it_finds_what_a_search_by_hand_finds(world, exact, width):
  found = search(world, width)
  assert found.codes.shape[1] == min(width, len(EVERY))
  for codes, scores, table in zip(found.codes, found.scores, exact):
    wanted = by_hand(table, width)
    assert {*map(tuple, codes.tolist())} == {*wanted}
    np.testing.assert_allclose(scores, [*wanted.values()], atol=1e-4)
    own = [wanted[tuple(each)] for each in codes.tolist()]
    np.testing.assert_allclose(scores, own, atol=1e-4)


def test_its_items_are_those_of_its_codes(world):
  found = search(world, 100)
  own = lowest_items(world[3], np.ones(tiny.NUM_ITEMS + 1, bool))
  wanted = [
    [own.get(tuple(each), 0) for each in row] for row in found.codes.tolist()
  ]
  np.testing.assert_array_equal(found.items, wanted)
  assert 0 < (found.items > 0).mean() < 1


def test_of_what_is_not_allowed_there_is_no_item():
  """Two sets of allowed items, one for each half of the rows."""
  model, params, batch, catalogue, index = make_world(tiny.lazy_decoder)
  allowed = np.random.default_rng(0).random((7, tiny.NUM_ITEMS + 1)) < 0.5
  restricted = prefix_index.restrict(index, jnp.asarray(allowed))
  found = search((model, params, batch, catalogue, restricted), 100)
  for row, codes, items in zip(allowed, found.codes, found.items):
    own = lowest_items(catalogue, row)
    wanted = [own.get(tuple(each), 0) for each in codes.tolist()]
    np.testing.assert_array_equal(items, wanted)


def test_rows_on_eight_devices_need_no_communication():
  model, params, batch, catalogue, index = make_world(tiny.lazy_decoder)
  batch = jax.tree.map(lambda x: jnp.concatenate([x, x[:1]]), batch)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  spread = NamedSharding(mesh, PartitionSpec("data"))
  copied = NamedSharding(mesh, PartitionSpec())
  program = jax.jit(
    lambda params, batch, catalogue, index: free_search.free_search(
      model, params, batch, catalogue, index, 20
    ),
    in_shardings=(copied, spread, copied, copied),
    out_shardings=spread,
  )
  arguments = params, batch, catalogue, index
  text = program.lower(*arguments).compile().as_text()
  for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute"):
    assert word not in text
  alone = search((model, params, batch, catalogue, index), 20)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    program(*arguments),
    alone,
  )


def test_a_constrained_softmax_is_refused(world):
  model, *rest = world
  with pytest.raises(ValueError, match="constrained_softmax=False"):
    free_search.free_search(model.clone(constrained_softmax=True), *rest, 4)
