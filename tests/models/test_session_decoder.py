"""The session-wise decoder against loops in numpy, and its own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import model_configs
from onerec_jax.models import attention, registry
from onerec_jax.training import losses
from tests import tiny
from tests.models import numpy_parts as parts
from tests.models import session_decoder_oracle as oracle

LEVELS = len(tiny.CODEBOOK_SIZES)
# A dense block and one of experts. Several tests ask the same model for the
# logits of a batch of the same shape: compiled once.
MIXED = tiny.experts(router="softmax", dense_layers=1)
OF_TWO = tiny.session_decoder(session_items=2)
OF_THREE = tiny.session_decoder(session_items=3, moe=MIXED)


def beginning(batch, few=1):
  """The first targets of each row; one is how search sees a session."""
  return batch.replace(
    targets=batch.targets[:, :few],
    visible_from=batch.visible_from[:, :few],
    visible_until=batch.visible_until[:, :few],
  )


@pytest.fixture(scope="module")
def catalogue():
  return tiny.catalogue()


@pytest.mark.parametrize(
  "model",
  [
    # Seven positions by products and sums, eleven as matrix products.
    OF_TWO,
    tiny.session_decoder(
      session_items=3, moe=MIXED, num_heads=2, encoder_layers=2,
      causal_encoder=True,
    ),
  ],
  ids=["two", "three"],
)  # fmt: skip
def test_equals_loops_in_numpy(catalogue, model):
  m, params = model.session_items, tiny.params(model)
  batch = tiny.session_batch(m)
  found = parts.logits_of(model, params, batch, catalogue)
  for (row, session), (token, events) in tiny.SEES.items():
    expected = oracle.forward(
      model, params, batch, catalogue, row, session, token, events
    )
    for place in range(m):
      for level, logits in enumerate(expected[place]):
        np.testing.assert_allclose(
          found[level][row, session * m + place], logits, atol=2e-4, rtol=2e-4
        )


def test_a_session_of_one_item_is_the_encoder_decoder(catalogue):
  """The same parameters, the same logits."""
  moe = tiny.experts(router="softmax")
  model = tiny.session_decoder(session_items=1)
  plain = tiny.encoder_decoder(moe=moe, causal_encoder=False)
  params, batch = tiny.params(plain), tiny.batch()
  assert jax.tree.structure(tiny.params(model)) == jax.tree.structure(params)

  @jax.jit
  def both(params):
    return [
      each.apply({"params": params}, batch, catalogue)
      for each in (model, plain)
    ]

  for found, expected in zip(*both(params)):
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_steps_with_a_cache_are_teacher_forcing(catalogue):
  """Two beams, one session each, which change places after every step.

  The last steps are matrix products, those before are products and sums.
  """
  model, m = OF_THREE, 3
  params, batch = tiny.params(model), tiny.session_batch(m)
  # All sessions see what the first of the row does.
  same = lambda x: jnp.broadcast_to(x[:, :1], x.shape)
  batch = batch.replace(
    targets=jnp.maximum(batch.targets, 1),
    visible_from=same(batch.visible_from),
    visible_until=same(batch.visible_until),
  )
  expected = parts.logits_of(model, params, batch, catalogue)
  codes = catalogue.codes[batch.targets[:, : 2 * m]].reshape(2, 2, m * LEVELS)

  @jax.jit
  def steps(params):
    apply = lambda *args, method: model.apply(
      {"params": params}, *args, method=method
    )
    context = apply(beginning(batch), catalogue, method="encode")
    logits, cache = apply(0, None, None, context, method="decode_step")
    # The one beam becomes two.
    cache = jax.tree.map(lambda x: jnp.repeat(x, 2, axis=2), cache)
    found, previous = [jnp.repeat(logits, 2, axis=1)], codes[:, :, 0]
    for index in range(1, m * LEVELS):
      logits, cache = apply(
        index, previous, cache, context, method="decode_step"
      )
      order = slice(None, None, -1) if index % 2 else slice(None)
      found.append(logits[:, slice(None, None, -1 if index % 2 == 0 else 1)])
      cache = jax.tree.map(lambda x: x[:, :, ::-1], cache)
      previous = codes[:, order, index]
    return found

  for index, logits in enumerate(steps(params)):
    place, level = divmod(index, LEVELS)
    for session in range(2):
      want = expected[level][:, session * m + place]
      np.testing.assert_allclose(logits[:, session], want, atol=2e-4, rtol=2e-4)


def test_an_item_depends_on_the_items_before_it_alone(catalogue):
  model, m = OF_THREE, 3
  params, batch = tiny.params(model), tiny.session_batch(m)
  before = parts.logits_of(model, params, batch, catalogue)
  for place in range(m):
    changed = batch.replace(
      targets=batch.targets.at[0, place].set(int(batch.items[0, 2]))
    )
    after = parts.logits_of(model, params, changed, catalogue)
    for level in range(LEVELS):
      moved = np.abs(after[level] - before[level]).max(axis=-1) > 1e-6
      # Its own level 1 comes before it; levels 2 and 3 see its first code.
      first = place + (level == 0)
      expected = np.zeros(moved.shape, bool)
      expected[0, first:m] = True
      np.testing.assert_array_equal(moved, expected)


def test_few_targets_are_the_beginning_of_a_session(catalogue):
  params, batch = tiny.params(OF_THREE), tiny.session_batch(3)
  whole = parts.logits_of(OF_THREE, params, batch, catalogue)

  @jax.jit
  def cut(params):
    return {
      few: OF_THREE.apply({"params": params}, beginning(batch, few), catalogue)
      for few in (1, 2)
    }

  for few, found in cut(params).items():
    for level in range(LEVELS):
      np.testing.assert_allclose(
        found[level], whole[level][:, :few], atol=2e-5, rtol=2e-5
      )


def test_half_sessions_are_refused(catalogue):
  with pytest.raises(ValueError, match="5 targets.*sessions of 2.*row_targets"):
    OF_TWO.apply({"params": tiny.params(OF_TWO)}, tiny.batch(), catalogue)


def test_causal_products_equal_the_sums_of_few_positions(monkeypatch):
  rng = np.random.default_rng(0)
  q, k, v = (
    jnp.asarray(rng.normal(size=(2, 3, n, 4, 5)), jnp.float32)
    for n in (2, 6, 6)
  )
  few = attention.causal_attention(q, k, v)
  monkeypatch.setattr(attention, "_FEW", 0)
  many = attention.causal_attention(q, k, v)
  np.testing.assert_allclose(many, few, atol=1e-5)


@pytest.mark.parametrize("m", [2, 5])
def test_flops_agree_with_the_compiler(catalogue, m):
  model = tiny.session_decoder(
    session_items=m, moe=model_configs.MoEConfig(), d_model=256, d_ff=512
  )
  B, S, T = 2, 64, 4 * m
  batch = tiny.batch()
  sized = lambda n: jax.ShapeDtypeStruct((B, n), jnp.int32)
  shapes = batch.replace(
    items=sized(S), segment=sized(S), targets=sized(T),
    features={name: sized(S) for name in batch.features},
    visible_from=sized(T), visible_until=sized(T),
  )  # fmt: skip
  variables = jax.eval_shape(model.init, jax.random.key(0), shapes, catalogue)
  compiled = jax.jit(model.apply).lower(variables, shapes, catalogue).compile()
  counted = registry.forward_flops(model, B, S, T)
  assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.03)


def test_the_papers_experts_are_the_default():
  moe = model_configs.SessionDecoderConfig().moe
  assert (moe.num_experts, moe.experts_per_token) == (24, 2)
  assert (moe.router, moe.balance_rate, moe.shared_experts) == ("softmax", 0, 0)


@pytest.fixture(scope="module")
def sums(catalogue):
  model = OF_TWO.clone(constrained_softmax=False)
  arguments = tiny.session_batch(2), catalogue, None, None
  return jax.jit(lambda p: losses.make_loss(model)(p, *arguments))(
    tiny.params(OF_TWO)
  )


def test_the_loss_is_the_sum_over_the_sessions_codes(catalogue, sums):
  """By hand from the logits."""
  batch = tiny.session_batch(2)
  logits = parts.logits_of(OF_TWO, tiny.params(OF_TWO), batch, catalogue)
  codes = np.asarray(catalogue.codes)[np.asarray(batch.targets)]
  total = 0.0
  for row, target in np.argwhere(np.asarray(batch.targets) > 0):
    for level in range(LEVELS):
      x = logits[level][row, target].astype(np.float64)
      total += np.log(np.exp(x).sum()) - x[codes[row, target, level]]
  assert sums["count"] == 2 * len(tiny.SEES)
  assert float(sums["loss"]) == pytest.approx(total / LEVELS, rel=1e-4)


def test_experts_count_the_positions_of_real_sessions(sums):
  """Two experts a token, seven positions a session, both decoder layers."""
  loads = [np.asarray(x).sum() for x in jax.tree.leaves(sums["loads"])]
  assert loads == [2 * 7 * len(tiny.SEES)] * 2
