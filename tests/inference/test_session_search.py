"""Session search against brute force and against a beam of Python lists.

The oracles read one table: the teacher-forced logits of every session. They
use neither the decoding steps nor the prefix index.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from onerec_jax import config as config_lib
from onerec_jax import model_configs, partitioning
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.inference import (
  beam_search,
  prefix_index,
  retrieval,
  session_search,
)
from onerec_jax.models import registry
from tests import tiny

SIZES = (3, 2, 3)
# Items 2 and 6 share a semantic ID; item 6 is the more popular.
CODES = np.asarray(
  [[0, 0, 0], [0, 0, 0], [0, 0, 1], [0, 1, 2], [1, 0, 0], [2, 1, 1], [0, 0, 1],
   [2, 1, 2]], np.int32,
)  # fmt: skip
ANSWERS = (1, 3, 4, 5, 6, 7)
"""One item a semantic ID."""
ROWS = 2


def _batch(targets):
  """Two users: three events, and none."""
  items = np.zeros((ROWS, 4), np.int32)
  items[0, 1:] = [3, 5, 1]
  until = np.asarray([4, 1])
  until = np.repeat(until[:, None], targets.shape[1], axis=1)
  return Batch(
    items=jnp.asarray(items),
    segment=jnp.asarray([[1, 1, 1, 1], [1, 0, 0, 0]], jnp.int32),
    features={},
    targets=jnp.asarray(targets, jnp.int32),
    visible_from=jnp.ones(targets.shape, jnp.int32),
    visible_until=jnp.asarray(until, jnp.int32),
  )


class World:
  """A session model, and the logits of all sessions of different IDs."""

  def __init__(self, m, constrained=True):
    # Experts take long to compile: in one of the worlds.
    moe = model_configs.MoEConfig()
    if not constrained:
      moe = tiny.experts(router="softmax")
    config = model_configs.SessionDecoderConfig(
      **tiny._GENERATOR,
      session_items=m,
      constrained_softmax=constrained,
      moe=moe,
    )
    self.m, self.searches = m, {}
    self.model = registry.create(config, len(CODES) - 1, SIZES, {}, {})
    self.catalogue = Catalogue(jnp.asarray(CODES), {})
    popularity = np.asarray([0, 1, 1, 1, 1, 1, 5, 1])
    self.index = prefix_index.build(CODES, SIZES, popularity)
    self.sessions = list(itertools.permutations(ANSWERS, m))
    self.batch = _batch(np.zeros((ROWS, 1)))
    all_of = np.tile(np.ravel(self.sessions), (ROWS, 1))
    batch = _batch(all_of)
    variables = jax.eval_shape(
      lambda *args: nn.unbox(self.model.init(*args)),
      jax.random.key(0), batch, self.catalogue,
    )  # fmt: skip
    rng = np.random.default_rng(4)
    self.params = jax.tree.map(
      lambda x: jnp.asarray(0.7 * rng.normal(size=x.shape), jnp.float32),
      variables["params"],
    )
    logits = jax.jit(self.model.apply)(
      {"params": self.params}, batch, self.catalogue
    )
    shape = (ROWS, len(self.sessions), m, -1)
    self.logits = [np.asarray(x, np.float64).reshape(shape) for x in logits]
    self.codes = [np.concatenate([CODES[i] for i in s]) for s in self.sessions]
    # Codes so far → a session that begins with them.
    self.first = {}
    for session, codes in enumerate(self.codes):
      for n in range(len(codes)):
        self.first.setdefault(tuple(codes[:n].tolist()), session)

  def step(self, row, prefix):
    """Log-probabilities of the next code; `prefix` are the codes so far."""
    place, level = divmod(len(prefix), len(SIZES))
    x = self.logits[level][row, self.first[prefix], place]
    if self.model.constrained_softmax:
      own = prefix[place * len(SIZES) :]
      follow = {c[level] for c in CODES[1:].tolist() if c[:level] == list(own)}
      x = np.where([k in follow for k in range(len(x))], x, -np.inf)
    return x - np.log(np.exp(x).sum())

  def score(self, row, session):
    codes = np.concatenate([CODES[i] for i in session])
    return sum(
      self.step(row, tuple(codes[:n]))[code] for n, code in enumerate(codes)
    )

  def ranked(self, row, allowed=ANSWERS):
    """[(score, session)] of all sessions, best first."""
    found = itertools.permutations(allowed, self.m)
    return sorted((self.score(row, s), s) for s in found)[::-1]

  def beam(self, row, width):
    """A beam of lists that cannot see further than the next code."""
    beams = [(0.0, ())]
    for n in range(self.m * len(SIZES)):
      beams = sorted(
        (score + self.step(row, prefix)[code], (*prefix, code))
        for score, prefix in beams
        for code in sorted({int(c[n]) for c in self.codes
                            if tuple(c[:n]) == prefix})
      )[::-1][:width]  # fmt: skip
    return beams

  def search(
    self,
    width,
    index=None,
    function=session_search.session_search,
    params=None,
  ):
    key = width, function
    if key not in self.searches:
      self.searches[key] = jax.jit(
        functools.partial(function, self.model, width=width)
      )
    index = self.index if index is None else index
    params = self.params if params is None else params
    found = self.searches[key](params, self.batch, self.catalogue, index)
    return jax.tree.map(np.asarray, found)

  def restricted(self, allowed):
    mask = np.isin(np.arange(len(CODES)), allowed)
    return restrict(self.index, jnp.asarray(mask))


restrict = jax.jit(prefix_index.restrict)
world_of = functools.cache(World)


def assert_agree(sessions, scores, want):
  """One row of a search against [(score, session)], then nothing."""
  count = len(want)
  np.testing.assert_allclose(scores[:count], [s for s, _ in want], atol=1e-4)
  assert [tuple(s) for s in sessions[:count].tolist()] == [s for _, s in want]
  assert (sessions[count:] == 0).all()
  assert (scores[count:] == -np.inf).all()


@pytest.mark.parametrize("constrained", [True, False])
def test_full_width_is_brute_force_over_all_sessions(constrained):
  world = world_of(2, constrained)
  sessions, scores = world.search(1000)
  assert sessions.shape == (ROWS, scores.shape[1], 2)
  for row in range(ROWS):
    assert_agree(sessions[row], scores[row], world.ranked(row))


def test_a_narrow_beam_is_the_beam_of_lists():
  misses = 0
  for m, width in ((2, 1), (3, 4)):
    world = world_of(m)
    sessions, scores = world.search(width)
    for row in range(ROWS):
      want = world.beam(row, width)
      np.testing.assert_allclose(scores[row], [s for s, _ in want], atol=1e-4)
      codes = CODES[sessions[row]].reshape(len(want), -1)
      assert [tuple(c) for c in codes.tolist()] == [p for _, p in want]
      best = [s for _, s in world.ranked(row)[: len(want)]]
      misses += [tuple(s) for s in sessions[row].tolist()] != best
  assert misses > 0, "a world in which the search is no exact one"


def test_no_semantic_id_comes_twice_in_a_session():
  """Though the model, blind to places and sure of itself, would repeat one."""
  world = world_of(3)
  params = jax.tree.map(jnp.copy, world.params)
  for name in ("places", "last_codes"):
    params[name]["table"] = jnp.zeros_like(params[name]["table"])
  for level in range(len(SIZES)):
    head = params["codes"][f"heads_{level}"]
    head["kernel"] = 9 * head["kernel"]
  sessions, scores = world.search(4, params=params)
  assert np.isfinite(scores).all()
  for session in sessions.reshape(-1, 3):
    assert len({tuple(CODES[i]) for i in session}) == 3


def test_a_restricted_search_is_the_search_of_the_subset():
  world = world_of(2)
  for allowed in ((1, 3, 7), (2, 4)):
    sessions, scores = world.search(1000, world.restricted(allowed))
    for row in range(ROWS):
      assert_agree(
        sessions[row], scores[row], world_subset(world, row, allowed)
      )


def world_subset(world, row, allowed):
  """Item 2 answers for the ID that item 6 has too, when 6 is not allowed."""
  ids = [6 if item == 2 else item for item in allowed]
  return [
    (score, tuple(2 if item == 6 and 2 in allowed else item for item in s))
    for score, s in world.ranked(row, ids)
  ]


def test_another_set_for_each_request_and_sessions_cut_short():
  world = world_of(2)
  allowed = np.zeros((ROWS, len(CODES)), bool)
  allowed[0, [1, 4, 5]] = True
  allowed[1, 7] = True
  index = restrict(world.index, jnp.asarray(allowed))
  sessions, scores = world.search(1000, index)
  assert_agree(sessions[0], scores[0], world.ranked(0, (1, 4, 5)))
  # One item is no session of two: it is all there is.
  one = sum(
    world.step(1, tuple(CODES[7][:n]))[code] for n, code in enumerate(CODES[7])
  )
  assert_agree(sessions[1], scores[1], [(one, (7, 0))])
  # And where nothing is allowed, there is nothing.
  sessions, scores = world.search(1000, world.restricted(()))
  assert (sessions == 0).all()
  assert (scores == -np.inf).all()


@pytest.mark.parametrize("width", [4, 6, 1000])
def test_the_list_of_items_is_the_sessions_as_they_come(width, monkeypatch):
  """And then what sessions might have begun with."""
  world = world_of(2)
  of = world.search(width)
  begun, _, own = world.search(width, function=beam_search.beam_search)
  if width == 6:
    items, values = world.search(width, function=session_search.item_list)
  else:
    # The search within is a program of its own already.
    found = jax.tree.map(jnp.asarray, (*of, (begun, own)))
    monkeypatch.setattr(session_search, "_search", lambda *_: found)
    asked = world.model, world.params, world.batch, world.catalogue, world.index
    listed = jax.jit(lambda: session_search.item_list(*asked, width))
    items, values = jax.tree.map(np.asarray, listed())
  filled = False
  for row in range(ROWS):
    want = {}
    for session, score in zip(of[0][row].tolist(), of[1][row].tolist()):
      for item in session:
        if item:
          want.setdefault(item, score)
    brought, worst = len(want), of[1][row][of[1][row] > -np.inf].min()
    for item, value in zip(begun[row].tolist(), own[row].tolist()):
      if item:
        want.setdefault(item, worst + value)
    count = min(len(want), width)
    filled |= brought < count
    assert items[row, :count].tolist() == list(want)[:count]
    np.testing.assert_allclose(
      values[row, :count], list(want.values())[:count], atol=1e-6
    )
    assert (items[row, count:] == 0).all()
    assert (values[row, count:] == -np.inf).all()
    assert items[row, :2].tolist() == of[0][row, 0].tolist()
  assert filled == (width == 6), "or the fill is not shown"


def test_retrieval_of_sessions_of_one_item_is_beam_search():
  world = world_of(1)
  retrieve = retrieval.make_retrieve(world.model, world.index, 6)
  allowed = np.isin(np.arange(len(CODES)), (3, 5, 7))
  items, scores = retrieve(
    world.params, world.batch, world.catalogue, jnp.asarray(allowed)
  )
  index = world.restricted((3, 5, 7))
  found = world.search(6, index, beam_search.beam_search)
  np.testing.assert_array_equal(items, found[0])
  np.testing.assert_allclose(scores, found[2], atol=1e-5)


def test_rows_on_eight_devices_give_what_one_does():
  world = world_of(2)
  batch = jax.tree.map(lambda x: jnp.tile(x, (4, 1)), world.batch)
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  spread = partitioning.batch_sharding(mesh)
  copied = partitioning.replicated(mesh)
  with jax.set_mesh(mesh):
    search = jax.jit(
      functools.partial(session_search.session_search, world.model, width=4),
      in_shardings=(copied, spread, copied, copied),
      out_shardings=spread,
    )
    found = search(world.params, batch, world.catalogue, world.index)
  for got, want in zip(found, world.search(4)):
    np.testing.assert_allclose(got, np.concatenate([want] * 4), atol=1e-4)
