"""SASRec: what depends on what, and its two ways to score."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import model_configs
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.models import registry
from tests import tiny


@pytest.fixture(scope="module")
def model():
  return tiny.sasrec()


@pytest.fixture(scope="module")
def batch():
  return tiny.batch()


def scores_of(model, batch, rngs=None):
  run = jax.jit(
    lambda p: model.apply({"params": p}, batch, tiny.catalogue(), rngs=rngs)
  )
  return np.asarray(run(tiny.params(model)))


@pytest.fixture(scope="module")
def scores(model, batch):
  return scores_of(model, batch)


def _norm(x, scale):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def forward(model, params, batch, row, token, positions):
  """Scores after the last of `positions`, in plain numpy."""
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  D, H = model.d_model, model.num_heads
  Z, table = D // H, p["item"]["table"]
  x = []
  for s in [token, *positions]:
    item = int(batch.items[row, s])
    h = np.sqrt(D) * table[item] if item else np.zeros(D)
    values = {k: int(v[row, s]) for k, v in batch.features.items()}
    values["user_token"] = int(item == 0)
    for name, value in values.items():
      if value:
        h = h + p[f"feature_embeddings_{name}"]["table"][value]
    x.append(h)
  x = np.stack(x)
  bias = p["distance_bias"]["table"]
  for layer in range(model.num_layers):
    b = p[f"blocks_{layer}"]
    qkv = _norm(x, b["norm"]["scale"]) @ b["qkv"]["kernel"]
    out = np.zeros_like(x)
    for n in range(len(x)):
      for head in range(H):
        q, k, v = (
          qkv[:, i * D + head * Z : i * D + (head + 1) * Z] for i in range(3)
        )
        logits = [
          q[n] @ k[s] / np.sqrt(Z) + bias[48 if s == 0 else n - s, head]
          for s in range(n + 1)
        ]
        weights = np.exp(logits - np.max(logits))
        weights /= weights.sum()
        out[n, head * Z : (head + 1) * Z] = weights @ v[: n + 1]
    x = x + out @ b["out"]["kernel"]
    h = _norm(x, b["ffn_norm"]["scale"]) @ b["ffn"]["wi"]["kernel"]
    gate, value = np.split(h, 2, axis=-1)
    x = x + (gate / (1 + np.exp(-gate)) * value) @ b["ffn"]["wo"]["kernel"]
  last = _norm(x[-1], p["norm"]["scale"])
  return last @ table[: model.num_items + 1].T


def _whole(batch, row, target):
  """User token and every event of the segment up to visible_until."""
  token, _ = tiny.SEES[row, target]
  until = int(batch.visible_until[row, target])
  return token, list(range(token + 1, until))


def test_equals_loops_in_numpy(model, batch, scores):
  for row, target in tiny.SEES:
    expected = forward(
      model, tiny.params(model), batch, row, *_whole(batch, row, target)
    )
    np.testing.assert_allclose(
      scores[row, target, 1:], expected[1:], atol=5e-4, rtol=5e-4
    )


def test_the_state_depends_on_the_past_of_its_own_user_alone(model, batch):
  """By gradient; it sees its whole segment, not visible_from on."""
  params = tiny.params(model)
  rng = np.random.default_rng(3)
  weights = rng.normal(size=(1, 1, model.d_model))

  def sums(table):
    changed = {**params, "item": {"table": table}}
    states = model.apply({"params": changed}, batch, method="states")
    return jnp.sum(states * weights, axis=-1)

  jacobian = jax.jit(jax.jacrev(sums))(params["item"]["table"])
  norms = np.linalg.norm(jacobian, axis=-1)
  for row, target in tiny.SEES:
    _, events = _whole(batch, row, target)
    depends = set(np.flatnonzero(norms[row, target]).tolist())
    assert depends == {int(batch.items[row, s]) for s in events}


def test_packed_rows_equal_separate_rows(model, batch, scores):
  # Targets that see all their segment has before them: visible_from does not
  # cut SASRec, so the others would see more when packed.
  alone, places = tiny.separate(batch)
  found = scores_of(model, alone)
  compared = 0
  for i, (row, target) in enumerate(places):
    if tiny.SEES[row, target] == _whole(batch, row, target):
      np.testing.assert_allclose(
        found[i, 0, 1:], scores[row, target, 1:], atol=2e-4, rtol=2e-4
      )
      compared += 1
  assert compared == 4


def test_padding_is_never_recommended(scores):
  assert scores.shape == (2, 5, tiny.NUM_ITEMS + 1)
  assert scores.dtype == np.float32
  assert (scores[..., 0] == -np.inf).all()
  assert np.isfinite(scores[..., 1:]).all()


def test_pair_scores_are_the_same_scores(model, batch, scores):
  rng = np.random.default_rng(0)
  items = jnp.asarray(rng.integers(1, tiny.NUM_ITEMS + 1, (2, 5, 7)))
  found = jax.jit(
    lambda p: model.apply({"params": p}, batch, items, method="pair_scores")
  )(tiny.params(model))
  expected = np.take_along_axis(scores, np.asarray(items), axis=-1)
  np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_dropout_is_active_iff_a_key_is_given(batch, scores):
  model = tiny.sasrec(dropout=0.5)
  np.testing.assert_array_equal(scores_of(model, batch), scores)
  found = scores_of(model, batch, {"dropout": jax.random.key(0)})
  assert not np.allclose(found[..., 1:], scores[..., 1:])


def test_flops_agree_with_the_compiler():
  B, S, T = 2, 64, 32
  config = model_configs.SASRecConfig(
    num_layers=2, d_model=128, num_heads=2, d_ff=256, dropout=0.0
  )
  model = registry.create(config, 500, (), {"a": 3}, {})
  zeros = lambda n: jax.ShapeDtypeStruct((B, n), jnp.int32)
  batch = Batch(
    zeros(S), zeros(S), {"a": zeros(S)}, zeros(T), zeros(T), zeros(T)
  )
  catalogue = Catalogue(jax.ShapeDtypeStruct((501, 0), jnp.int32), {})
  variables = jax.eval_shape(model.init, jax.random.key(0), batch, catalogue)
  compiled = jax.jit(model.apply).lower(variables, batch, catalogue).compile()
  counted = registry.forward_flops(model, B, S, T)
  assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.03)
