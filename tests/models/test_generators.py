"""What every generator of semantic IDs promises, whatever its architecture."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend import core as jax_core

from onerec_jax.inference import beam_search, prefix_index
from onerec_jax.models import registry
from tests import tiny
from tests.models import numpy_parts as parts

# Of one block, for what is no question of depth.
MAKE = {
  "lazy_decoder": functools.partial(tiny.lazy_decoder, num_layers=1),
  "encoder_decoder": functools.partial(tiny.encoder_decoder, decoder_layers=1),
  "decoder_only": functools.partial(tiny.decoder_only, num_layers=1),
}
LEVELS = range(len(tiny.CODEBOOK_SIZES))


@pytest.fixture(scope="module")
def batch():
  return tiny.batch()


@pytest.fixture(scope="module")
def catalogue():
  return tiny.catalogue()


SENSITIVITY = {
  "lazy_decoder": tiny.lazy_decoder(kv_split=2, kv_layers=2),
  "encoder_decoder": tiny.encoder_decoder(decoder_layers=1),
  "full_encoder": tiny.encoder_decoder(decoder_layers=1, causal_encoder=False),
  "decoder_only": tiny.decoder_only(),
}


@functools.cache
def _sums_and_jacobian(name):
  """(params, batch) → [B, T, L], and its derivative by every parameter.

  A fixed random projection of each level's logits.
  """
  model, catalogue = SENSITIVITY[name], tiny.catalogue()
  rng = np.random.default_rng(5)
  weights = [rng.normal(size=(1, 1, k)) for k in tiny.CODEBOOK_SIZES]

  def sums(params, batch):
    logits = model.apply({"params": params}, batch, catalogue)
    found = [jnp.sum(x * w, axis=-1) for x, w in zip(logits, weights)]
    return (jnp.stack(found, axis=-1),) * 2

  jacobian = jax.jit(jax.jacrev(sums, has_aux=True))

  def run(batch):
    derivative, values = jacobian(tiny.params(model), batch)
    return values, derivative

  return run


@pytest.fixture(scope="module", params=SENSITIVITY)
def sensitivity(request, batch):
  """Gradients [B, T, L, rows] of logits by item row and by code row."""
  _, jacobian = _sums_and_jacobian(request.param)(batch)
  norms = jax.tree.map(lambda x: np.linalg.norm(x, axis=-1), jacobian)
  by_code = [norms["codes"][f"tables_{level}"]["table"] for level in range(2)]
  return request.param, norms["embedding"]["item"]["table"], by_code


def _reaches(name, batch, row, token, events):
  """Positions whose events should reach a target."""
  if name == "lazy_decoder":
    return events
  segment = parts.segment_of(batch, row, token)[1:]
  if name == "full_encoder":
    return segment
  # Through what is seen, what came before that.
  return [s for s in segment if s <= max(events, default=token)]


def test_a_target_depends_on_what_reaches_it_alone(batch, sensitivity):
  """Of its own segment and, but for a full encoder, of its past."""
  name, by_item, _ = sensitivity
  for (row, target), (token, events) in tiny.SEES.items():
    positions = _reaches(name, batch, row, token, events)
    expected = {int(batch.items[row, s]) for s in positions}
    for level in LEVELS:
      depends = set(np.flatnonzero(by_item[row, target, level]).tolist())
      assert depends == expected


def test_a_level_depends_on_the_codes_before_it(batch, catalogue, sensitivity):
  _, _, by_code = sensitivity
  for row, target in tiny.SEES:
    codes = catalogue.codes[batch.targets[row, target]]
    for level in LEVELS:
      for earlier, gradient in enumerate(by_code):
        depends = np.flatnonzero(gradient[row, target, level]).tolist()
        expected = [int(codes[earlier])] if earlier < level else []
        assert depends == expected


@pytest.mark.parametrize("name", SENSITIVITY)
def test_empty_histories_and_padding_are_finite(batch, name):
  """Also the gradient, and also a row of nothing at all."""
  empty = batch.replace(
    items=batch.items.at[0].set(0),
    segment=batch.segment.at[0].set(0),
    targets=batch.targets.at[0].set(0),
    visible_until=batch.visible_until.at[0].set(0),
  )
  for leaf in jax.tree.leaves(_sums_and_jacobian(name)(empty)):
    assert np.isfinite(leaf).all()


@pytest.mark.parametrize("name", MAKE)
def test_dropout_is_active_iff_a_key_is_given(batch, catalogue, name):
  """Either of the two rates; what they have in common is compiled once."""
  rates = "dropout", "context_dropout"
  params = tiny.params(MAKE[name]())

  @jax.jit
  def run(params, key):
    def logits(rngs=None, **rates):
      model = MAKE[name](**rates)
      return model.apply({"params": params}, batch, catalogue, rngs=rngs)

    return logits(), {
      rate: (logits(**{rate: 0.5}), logits({"dropout": key}, **{rate: 0.5}))
      for rate in rates
    }

  plain, first = run(params, jax.random.key(0))
  _, second = run(params, jax.random.key(1))
  for rate in rates:
    (silent, one), (_, other) = first[rate], second[rate]
    for level in LEVELS:
      np.testing.assert_array_equal(silent[level], plain[level])
      assert not np.allclose(one[level], other[level])
      assert not np.allclose(one[level], plain[level])


DECODED = {
  "lazy": lambda: tiny.lazy_decoder(kv_layers=2, kv_split=2),
  "lazy_scan_experts": lambda: tiny.lazy_decoder(
    num_layers=3,
    kv_layers=2,
    scan_layers=True,
    moe=tiny.experts(dense_layers=1, shared_experts=1),
  ),
  # A dense block and one of experts.
  "encoder_decoder": lambda: tiny.encoder_decoder(
    moe=tiny.experts(router="softmax", dense_layers=1)
  ),
  "decoder_only": lambda: tiny.decoder_only(moe=tiny.experts(dense_layers=1)),
}


@pytest.mark.parametrize("name", DECODED)
def test_decoding_step_by_step_equals_teacher_forcing(batch, catalogue, name):
  model = DECODED[name]()
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
  query = batch.replace(
    targets=jnp.zeros((2, 1), jnp.int32),
    visible_from=first,
    visible_until=until,
  )
  codes = catalogue.codes[items]
  # Beams reordered between the steps, as the search does, on axis 2.
  order = np.asarray([2, 0, 3, 1])

  @jax.jit
  def run(params):
    apply = functools.partial(model.apply, {"params": params})
    context = apply(query, catalogue, method="encode")
    step = functools.partial(apply, method="decode_step")
    first, cache = step(0, None, None, context)
    cache = jax.tree.map(lambda x: jnp.repeat(x, W, axis=2), cache)
    second, cache = step(1, codes[..., 0], cache, context)
    cache = jax.tree.map(lambda x: x[:, :, order], cache)
    third, cache = step(2, codes[:, order, 1], cache, context)
    return apply(forced, catalogue), (first, second, third), cache

  expected, (first, second, third), cache = run(params)
  close = functools.partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4)
  assert first.shape == (2, 1, tiny.CODEBOOK_SIZES[0])
  for beam in range(W):
    close(first[:, 0], expected[0][:, beam])
  close(second, expected[1])
  close(third, expected[2][:, order])
  depth = {leaf.shape[:3] for leaf in jax.tree.leaves(cache)}
  layers = getattr(model, "num_layers", None) or model.decoder_layers
  assert depth == {(layers, 2, W)}


@pytest.mark.parametrize(
  ("name", "constrained_softmax"),
  [("lazy_decoder", False), ("encoder_decoder", True), ("decoder_only", True)],
)
def test_full_width_search_is_the_score_of_every_item(
  batch, catalogue, name, constrained_softmax
):
  """Two paths: steps with a cache and a prefix index; teacher forcing."""
  model = MAKE[name](constrained_softmax=constrained_softmax)
  params = tiny.params(model)
  codes = np.asarray(catalogue.codes)
  index = prefix_index.build(codes, tiny.CODEBOOK_SIZES, np.arange(len(codes)))
  query = batch.replace(
    targets=jnp.zeros((2, 1), jnp.int32),
    visible_from=batch.visible_from[:, 1:2],
    visible_until=batch.visible_until[:, 1:2],
  )
  every = jnp.arange(1, tiny.NUM_ITEMS + 1)[None].repeat(2, axis=0)

  @jax.jit
  def run(params):
    arguments = model, params, query, catalogue, index
    return beam_search.beam_search(*arguments, 1000), beam_search.exact_scores(
      *arguments, every
    )

  (items, _, scores), exact = jax.tree.map(np.asarray, run(params))
  for row in range(2):
    found = dict(zip(items[row].tolist(), scores[row].tolist()))
    found.pop(0, None)
    sids = {tuple(codes[item]) for item in found}
    assert len(sids) == len(found), "no semantic ID twice"
    assert sids == {tuple(sid) for sid in codes[1:]}
    for item, score in found.items():
      assert score == pytest.approx(exact[row, item - 1], abs=1e-4)
    real = scores[row][items[row] > 0]
    assert (np.diff(real) <= 0).all(), "best first"


def _count(jaxpr, name):
  """How many equations of this name a program holds, at any depth."""
  total = 0
  for equation in jaxpr.eqns:
    total += equation.primitive.name == name
    for sub in jax_core.jaxprs_in_params(equation.params):
      total += _count(sub, name)
  return total


RECOMPUTED = {
  # (model, its recomputed calls, the policy whose gradients are compared): a
  # call a block; the decoder-only model's first block over the context too.
  "lazy_decoder": (lambda **c: tiny.lazy_decoder(num_layers=1, **c), 1, "full"),
  "encoder_decoder": (
    lambda **c: tiny.encoder_decoder(decoder_layers=1, **c),
    2,
    "full",
  ),
  "decoder_only": (tiny.decoder_only, 3, "dots"),
}


@pytest.mark.parametrize("name", RECOMPUTED)
def test_recomputation_changes_nothing_but_memory(batch, catalogue, name):
  """Dropout included: the recomputed mask is the first one."""
  make, calls, compared = RECOMPUTED[name]

  def loss(params, remat):
    model = make(remat=remat, dropout=0.3, context_dropout=0.3)
    logits = model.apply(
      {"params": params}, batch, catalogue, rngs={"dropout": jax.random.key(3)}
    )
    return sum(jnp.sum(jnp.square(x)) for x in logits), logits

  params = tiny.params(make())
  traced = {}
  for remat in ("none", "full", "dots"):
    ask = functools.partial(loss, remat=remat)
    if remat in ("none", compared):
      ask = jax.grad(ask, has_aux=True)
    traced[remat] = jax.make_jaxpr(ask)(params)
    recomputed = _count(traced[remat].jaxpr, "remat2")
    assert recomputed == calls * (remat != "none")

  # One program of both, from what is traced already.
  both = [jax_core.jaxpr_as_fun(traced[remat]) for remat in ("none", compared)]
  expected, found = jax.jit(lambda *leaves: [f(*leaves) for f in both])(
    *jax.tree.leaves(params)
  )
  for a, b in zip(found, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


WIDE = {"d_model": 256, "num_heads": 4, "d_ff": 512}
COUNTED = {
  "lazy_decoder": lambda: tiny.lazy_decoder(
    **WIDE, num_kv_heads=4, kv_layers=2, kv_split=2
  ),
  "encoder_decoder": lambda: tiny.encoder_decoder(**WIDE, encoder_layers=2),
  "encoder_decoder_mlp": lambda: tiny.encoder_decoder(
    **WIDE, feed_forward="mlp", decoder_layers=1
  ),
  "decoder_only": lambda: tiny.decoder_only(**WIDE),
  "decoder_only_shallow": lambda: tiny.decoder_only(**WIDE, num_layers=1),
}


@pytest.mark.parametrize("name", COUNTED)
def test_flops_agree_with_the_compiler(batch, catalogue, name):
  model = COUNTED[name]()
  B, S, T = 2, 64, 16
  shapes = tiny.shapes_of(batch, B, S, T)
  variables = jax.eval_shape(model.init, jax.random.key(0), shapes, catalogue)
  compiled = jax.jit(model.apply).lower(variables, shapes, catalogue).compile()
  counted = registry.forward_flops(model, B, S, T)
  assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("name", COUNTED)
def test_flops_of_a_group_agree_with_the_compiler(batch, catalogue, name):
  model = COUNTED[name]()
  B, S, R = 2, 64, 16
  given = tiny.shapes_of(batch, B, S, 1), catalogue
  codes = jax.ShapeDtypeStruct((B, R, len(LEVELS)), np.int32)
  variables = jax.eval_shape(model.init, jax.random.key(0), *given)
  ask = functools.partial(model.apply, method="group_logits")
  compiled = jax.jit(ask).lower(variables, *given, codes).compile()
  counted = registry.group_flops(model, B, S, R)
  assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.03)


@pytest.mark.parametrize("shared_experts", [0, 1])
def test_flops_of_experts_by_hand(shared_experts):
  """Against the dense model: k + shared SwiGLUs of D × F_e, and the router."""
  B, S, T, L = 3, 20, 7, len(LEVELS)
  experts = tiny.experts(
    num_experts=8, experts_per_token=3, d_ff=10, dense_layers=1,
    shared_experts=shared_experts,
  )  # fmt: skip
  one = (3 + shared_experts) * 3 * 16 * 10 + 16 * 8 - 3 * 16 * 24
  for make, changes, tokens in [
    (tiny.lazy_decoder, {"num_layers": 3}, 2 * T * L),
    (tiny.encoder_decoder, {"decoder_layers": 3}, 2 * T * L),
    (
      tiny.encoder_decoder,
      {"decoder_layers": 2, "encoder_layers": 4, "moe_encoder": True},
      T * L + 3 * S,
    ),
    # The last block runs no context position.
    (tiny.decoder_only, {"num_layers": 4}, 3 * T * L + 2 * S),
  ]:
    found = registry.forward_flops(make(**changes, moe=experts), B, S, T)
    changes.pop("moe_encoder", None)
    dense = registry.forward_flops(make(**changes), B, S, T)
    assert found - dense == 2 * B * tokens * one
