"""The user pathways against numpy, and what they promise to every generator."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from onerec_jax import config as config_lib
from onerec_jax import model_configs
from onerec_jax.models import pathways as pathways_lib
from onerec_jax.models import registry
from tests import tiny
from tests.models import numpy_parts as parts

QUERIES = 6
_VALUES = {
  "pathways": tiny.PATHWAYS,
  "lifelong_queries": QUERIES,
  "lifelong_layers": 2,
}
MAKE = {
  "lazy_decoder": functools.partial(tiny.lazy_decoder, kv_split=2, **_VALUES),
  "encoder_decoder": functools.partial(tiny.encoder_decoder, **_VALUES),
  "full_encoder": functools.partial(
    tiny.encoder_decoder, causal_encoder=False, **_VALUES
  ),
  "decoder_only": functools.partial(tiny.decoder_only, **_VALUES),
  # Its item and the padding after it are a session; without experts, whose
  # ragged products have no rule for the many gradients asked for here.
  "session_decoder": functools.partial(
    tiny.session_decoder, moe=model_configs.MoEConfig(), **_VALUES
  ),
}
SLOTS = {"static": (0, 1), "short": (1, 4), "positive": (4, 8),
         "lifelong": (8, 13)}  # fmt: skip


@pytest.fixture(scope="module")
def batch():
  return tiny.pathway_batch()


@pytest.fixture(scope="module")
def catalogue():
  return tiny.catalogue()


def qformer(p, heads, layers, v):
  """One history, rows v [S][D], in loops."""
  h = [query.copy() for query in p["queries"]]
  for layer in range(layers):
    own = p[f"layers_{layer}"]
    keys, values = [], []
    for x in v:
      k, value = np.split(x @ own["kv"]["kernel"], 2)
      keys.append(k)
      values.append(value)
    bias = np.zeros((heads, len(v)))
    for n in range(len(h)):
      q = parts.norm(h[n], own["norm"]) @ own["q"]["kernel"]
      x = parts.attend(q, keys, values, heads, heads, bias)
      h[n] = h[n] + x @ own["out"]["kernel"]
      x = parts.norm(h[n], own["ffn_norm"])
      ffn = own["ffn"]
      h[n] = h[n] + parts.swiglu(ffn["wi"]["kernel"], ffn["wo"]["kernel"], x)
  return h


def context(model, params, batch, catalogue, row):
  """place → vector of every context position there is."""
  p = params["reader"]

  def mlp(name, position):
    f = parts.embed(params, batch, catalogue, row, position)
    h = f @ p[f"{name}_in"]["kernel"]
    h = np.where(h > 0, h, 0.01 * h)
    return h @ p[f"{name}_out"]["kernel"]

  found = {}
  for name, (start, stop) in SLOTS.items():
    there = [s for s in range(start, stop) if s in tiny.PATHWAY_SEES[row]]
    rows = [mlp(name, s) for s in there]
    if name == "lifelong" and rows:
      rows = qformer(p["qformer"], model.num_heads, 2, rows)
      there = range(start, start + QUERIES)
    found |= {s: x + p["positions"][s] for s, x in zip(there, rows)}
  return found


def test_positions_equal_loops_in_numpy(batch, catalogue):
  model = MAKE["lazy_decoder"]()
  params = tiny.params(model)
  inputs = jax.jit(
    lambda p: model.apply({"params": p}, batch, catalogue, method="read")
  )(params)
  wide = parts.float64(params)
  B = len(tiny.PATHWAY_SEES)
  assert inputs.segment.shape == (B, 8 + QUERIES)
  assert inputs.distance is None
  for row in range(B):
    expected = context(model, wide, batch, catalogue, row)
    there = np.flatnonzero(inputs.segment[row]).tolist()
    assert there == sorted(expected)
    np.testing.assert_array_equal(inputs.visible[row, 0], inputs.segment[row])
    assert not inputs.visible[row, 1].any()  # padding
    for place, x in expected.items():
      x = x @ wide["project"]["kernel"]
      np.testing.assert_allclose(
        inputs.features[row, place], x, atol=1e-4, rtol=1e-4
      )


def test_each_pathway_has_an_mlp_of_its_own(catalogue, batch):
  """Positions of a pathway depend on its own weights alone."""
  model = MAKE["encoder_decoder"]()
  params = tiny.params(model)
  rng = np.random.default_rng(0)
  weights = rng.normal(size=(1, 8 + QUERIES, 16))

  def sums(reader):
    inputs = model.apply(
      {"params": params | {"reader": reader}}, batch, catalogue, method="read"
    )
    x = jnp.sum(inputs.features * inputs.segment[..., None] * weights, (0, 2))
    ends = {name: start for name, (start, _) in SLOTS.items()}
    stops = {**{n: s for n, (_, s) in SLOTS.items()}, "lifelong": None}
    return {name: x[ends[name] : stops[name]].sum() for name in SLOTS}

  jacobian = jax.jit(jax.jacrev(sums))(params["reader"])
  for name, found in jacobian.items():
    for other in SLOTS:
      for layer in ("in", "out"):
        gradient = np.abs(found[f"{other}_{layer}"]["kernel"]).max()
        assert (gradient > 1e-4) == (name == other)
    of_queries = np.abs(found["qformer"]["queries"]).max()
    assert (of_queries > 1e-4) == (name == "lifelong")


def _hiding(name):
  """A model that hides all events as it trains, and none otherwise."""
  return MAKE[name](context_dropout=1.0)


@functools.cache
def _jacobian(name):
  """Jits (params, batch) → gradients of each target's logits, the logits.

  One program for all tests that read the logits.
  """
  model = _hiding(name)
  rng = np.random.default_rng(5)
  weights = [rng.normal(size=(1, 1, k)) for k in tiny.CODEBOOK_SIZES]

  def sums(params, batch):
    logits = model.apply({"params": params}, batch, tiny.catalogue())
    total = sum(jnp.sum(x * w, axis=-1) for x, w in zip(logits, weights))
    return total, logits

  return jax.jit(jax.jacrev(sums, has_aux=True))


@functools.cache
def _found(name):
  """For `pathway_batch`: gradients [B, T, rows] of each target's logits by
  item row, [.., Q] by lifelong query; the logits."""
  params = tiny.params(_hiding(name))
  found, logits = _jacobian(name)(params, tiny.pathway_batch())
  queries = np.linalg.norm(found["reader"]["qformer"]["queries"], axis=(-1, -2))
  rows = np.linalg.norm(found["embedding"]["item"]["table"], axis=-1)
  return rows, queries, jax.device_get(logits)


@pytest.mark.parametrize("name", MAKE)
def test_a_target_depends_on_all_of_its_request_and_nothing_else(name, batch):
  by_item, by_query, _ = _found(name)
  for row, positions in enumerate(tiny.PATHWAY_SEES):
    expected = {int(batch.items[row, s]) for s in positions} - {0}
    found = set(np.flatnonzero(by_item[row, 0]).tolist())
    assert found == expected
    # Without representatives the Q-Former's answers are hidden too.
    assert (by_query[row, 0] > 0) == any(s >= 8 for s in positions)
    assert np.isfinite(by_item).all()


@pytest.mark.parametrize("name", MAKE)
def test_hidden_events_are_as_if_absent(name, batch, catalogue):
  model = _hiding(name)
  params = tiny.params(model)
  hidden = parts.logits_of(
    model, params, batch, catalogue, {"dropout": jax.random.key(0)}
  )
  token = np.arange(batch.items.shape[1])[None] == 0
  absent = batch.replace(
    items=batch.items * 0,
    segment=batch.segment * token,
    features={k: v * token for k, v in batch.features.items()},
  )
  _, expected = _jacobian(name)(params, absent)
  for one, other, third in zip(hidden, expected, _found(name)[-1]):
    np.testing.assert_allclose(one[:, 0], other[:, 0], atol=1e-5)
    assert np.abs(one[0, 0] - third[0, 0]).max() > 1e-3


@pytest.mark.parametrize("name", MAKE)
def test_step_by_step_equals_teacher_forcing(name, batch, catalogue):
  model = _hiding(name)
  params = tiny.params(model)
  codes = catalogue.codes[batch.targets[:, :1]]

  @jax.jit
  def steps(params):
    def run(bound):
      context = bound.encode(
        batch.replace(
          targets=batch.targets[:, :1],
          visible_from=batch.visible_from[:, :1],
          visible_until=batch.visible_until[:, :1],
        ),
        catalogue,
      )
      found, cache = [], None
      for level in range(len(tiny.CODEBOOK_SIZES)):
        previous = codes[..., level - 1] if level else None
        logits, cache = bound.decode_step(level, previous, cache, context)
        found.append(logits)
      return found

    return nn.apply(run, model)({"params": params})

  for one, other in zip(steps(params), _found(name)[-1]):
    np.testing.assert_allclose(one[:, 0], other[:, 0], atol=1e-4)


@pytest.mark.parametrize("name", ["lazy_decoder", "encoder_decoder"])
def test_flops_agree_with_the_compiler(name, batch, catalogue):
  lengths = config_lib.PathwaysConfig(short=16, positive=32, lifelong=64)
  wide = {"d_model": 256, "num_heads": 4, "d_ff": 512, "pathways": lengths}
  model = MAKE[name](**wide, lifelong_queries=32)
  B, S, T = 2, lengths.positions, 16
  shapes = tiny.shapes_of(batch, B, S, T)
  variables = jax.eval_shape(model.init, jax.random.key(0), shapes, catalogue)
  compiled = jax.jit(model.apply).lower(variables, shapes, catalogue).compile()
  counted = registry.forward_flops(model, B, S, T)
  assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.03)


def test_what_does_not_fit_is_refused(batch, catalogue):
  model = MAKE["lazy_decoder"]()
  with pytest.raises(ValueError, match="pipeline.pathways"):
    jax.eval_shape(model.init, jax.random.key(0), tiny.batch(), catalogue)
  with pytest.raises(ValueError, match="sasrec"):
    tiny.sasrec(pathways=tiny.PATHWAYS)
  config = model_configs.LazyDecoderConfig(lifelong_queries=0)
  with pytest.raises(ValueError, match="model.lifelong_queries"):
    registry.create(config, 10, (4, 4), {}, {})


def test_the_reports_context_has_405_positions():
  lengths = config_lib.PathwaysConfig(short=20, positive=256, lifelong=2000)
  model = tiny.encoder_decoder(pathways=lengths)
  assert lengths.positions == 2277
  assert pathways_lib.cost(model)[1] == 405
