"""Two towers: against loops in numpy, brute force, and the loss by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import model_configs
from onerec_jax.inference import retrieval
from onerec_jax.models import registry, two_tower
from onerec_jax.training import losses
from tests import tiny


@pytest.fixture(scope="module")
def model():
  return tiny.two_tower(temperature=0.5)


@pytest.fixture(scope="module")
def tables(model):
  return jax.tree.map(
    lambda x: np.asarray(x, np.float64), dict(tiny.params(model))
  )


def _norm(x, scale):
  return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * scale


def _ffn(x, p):
  gate, value = np.split(x @ p["wi"]["kernel"], 2, axis=-1)
  return (gate / (1 + np.exp(-gate)) * value) @ p["wo"]["kernel"]


def _read(p, item):
  if not item:
    return np.zeros(16)
  category = int(tiny.catalogue().features["category"][item])
  known = p["of_items_category"]["table"][category] if category else 0
  return 4.0 * (p["item"]["table"][item] + known)


def item_vector(p, item):
  v = _read(p, item)
  v = v + _ffn(_norm(v, p["item_norm"]["scale"]), p["item_ffn"])
  return v / np.linalg.norm(v)


def user_vector(p, batch, row, positions):
  """Of a target that sees these positions, the user token among them."""
  x = []
  for s in positions:
    h = _read(p, int(batch.items[row, s]))
    token = int(batch.items[row, s] == 0)
    values = {k: int(v[row, s]) for k, v in batch.features.items()}
    for name, value in {**values, "user_token": token}.items():
      if value:
        h = h + p[f"of_events_{name}"]["table"][value]
    x.append(h)
  x = np.stack(x)
  # The latest position is the last; an empty history has the token alone.
  order = np.argsort(positions)
  h = _norm(x, p["norm"]["scale"])
  q = h[order[-1]] @ p["query"]["kernel"]
  k, v = np.split(h @ p["key_value"]["kernel"], 2, axis=-1)
  seen, bias = np.zeros(16), p["distance_bias"]["table"]
  for head in range(2):
    part = slice(8 * head, 8 * head + 8)
    logits = [
      q[part] @ k[n, part] / np.sqrt(8)
      + bias[48 if batch.items[row, s] == 0 else max(positions) - s, head]
      for n, s in enumerate(positions)
    ]
    weights = np.exp(logits - np.max(logits))
    seen[part] = (weights / weights.sum()) @ v[:, part]
  u = x[order[-1]] + seen @ p["out"]["kernel"]
  u = u + _ffn(_norm(u, p["user_norm"]["scale"]), p["user_ffn"])
  return u / np.linalg.norm(u)


@pytest.fixture(scope="module")
def vectors(model):
  """(users [B, T, D], items [I + 1, D]) by the model."""
  apply = jax.jit(
    lambda p: tuple(
      model.apply({"params": p}, of, tiny.catalogue(), method=method)
      for of, method in (
        (tiny.batch(), "users"),
        (jnp.arange(tiny.NUM_ITEMS + 1), "items"),
      )
    )
  )
  return [np.asarray(x) for x in apply(tiny.params(model))]


def test_towers_equal_loops_in_numpy(model, tables, vectors):
  users, items = vectors
  for item in range(1, tiny.NUM_ITEMS + 1):
    np.testing.assert_allclose(
      items[item], item_vector(tables, item), atol=1e-5
    )
  for (row, target), (token, events) in tiny.SEES.items():
    expected = user_vector(tables, tiny.batch(), row, [token, *events])
    np.testing.assert_allclose(users[row, target], expected, atol=1e-4)


def test_retrieval_is_brute_force(model, tables):
  """The best of every item's dot product, among those that are allowed."""
  batch, sources = tiny.separate(tiny.batch())
  find = retrieval.make_retrieve(model, None, 7)
  params = tiny.params(model)
  rng = np.random.default_rng(0)
  allowed = rng.random((len(sources), tiny.NUM_ITEMS + 1)) < 0.5
  items, scores = find(params, batch, tiny.catalogue(), jnp.asarray(allowed))
  every = range(1, tiny.NUM_ITEMS + 1)
  catalogue = np.stack([item_vector(tables, item) for item in every])
  for place, (row, target) in enumerate(sources):
    token, events = tiny.SEES[row, target]
    user = user_vector(tables, tiny.batch(), row, [token, *events])
    worth = np.where(allowed[place, 1:], catalogue @ user / 0.5, -np.inf)
    best = np.argsort(-worth)[:7]
    np.testing.assert_array_equal(items[place], best + 1)
    np.testing.assert_allclose(scores[place], worth[best], atol=1e-4)


def test_the_corrected_loss_against_numpy(model, vectors):
  """Σ over targets of −log softmax of u·v/τ − log q over the batch's items."""
  batch, (users, items) = tiny.batch(), vectors
  # One item twice: both places count.
  targets = np.array(batch.targets)
  targets[0, 1] = targets[1, 1]
  weight = np.ones(targets.shape, np.float32)
  weight[0, 0] = 0
  batch = batch.replace(
    targets=jnp.asarray(targets), labels={"weight": jnp.asarray(weight)}
  )
  counts = np.random.default_rng(1).integers(0, 50, tiny.NUM_ITEMS + 1)
  log_q = two_tower.log_frequency(counts)
  real = [tuple(place) for place in np.argwhere(targets > 0)]
  share = lambda item: (counts[item] + 1) / (counts[1:].sum() + 60)
  expected = number = 0.0
  for n in real:
    if not weight[n]:
      continue
    logit = lambda item, n=n: users[n] @ items[item] / 0.5 - np.log(share(item))
    expected += np.log(sum(np.exp(logit(targets[j])) for j in real))
    expected -= logit(targets[n])
    number += 1
  loss = jax.jit(
    lambda *args: losses.make_loss(model)(*args, tiny.catalogue(), log_q, None)
  )
  sums = loss(tiny.params(model), batch)
  assert float(sums["count"]) == number == len(real) - 1
  np.testing.assert_allclose(sums["loss"], expected, rtol=1e-5)


def test_the_correction_undoes_in_batch_popularity():
  """Free scores fitted to in-batch softmax: log p(j | u) up to a constant.

  Two kinds of users want items 1 and 2 with other odds than these come up in
  all; the raw in-batch softmax would learn those odds over the popularity.
  """
  rng = np.random.default_rng(0)
  # p(item | kind); item 0 is everybody's, so very popular.
  odds = np.asarray([[0.8, 0.15, 0.05], [0.8, 0.05, 0.15]])
  q = odds.mean(axis=0)
  kinds = rng.integers(2, size=20_000)
  wanted = np.asarray([rng.choice(3, p=odds[kind]) for kind in kinds])

  def loss(scores, correct):
    rows = scores[kinds].reshape(-1, 40, 3)
    own = wanted.reshape(-1, 40)
    logits = jnp.take_along_axis(rows, own[:, None], axis=2)
    logits = logits - correct * jnp.log(q)[own][:, None]
    return losses.cross_entropy(
      logits, jnp.broadcast_to(jnp.arange(40), own.shape)
    ).mean()

  def fit(correct):
    scores = jnp.zeros((2, 3))
    step = jax.jit(lambda s: s - 2.0 * jax.grad(loss)(s, correct))
    for _ in range(60):
      scores = step(scores)
    found = jax.nn.softmax(scores, axis=1)
    return np.asarray(found)

  right, raw = fit(1.0), fit(0.0)
  assert np.abs(right - odds).max() < 0.03
  # The raw one learns odds over popularity: nothing of that item 0 is liked.
  over = odds / q / (odds / q).sum(axis=1, keepdims=True)
  assert np.abs(raw - over).max() < 0.05


def test_counts_and_refusals(model):
  matrices = sum(
    leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(tiny.params(model))
    if path[-1].key == "kernel"
  )
  assert registry.block_parameters(model) == matrices
  one = registry.forward_flops(model, 2, 8, 3)
  # By hand: keys and values; query, attention, output, towers, the softmax.
  by_hand = 2 * 2 * 8 * 2 * 16 * 16 + 2 * 6 * (
    2 * 16 * 16 + 2 * 8 * 16 + 2 * 3 * 16 * 24 + 6 * 16
  )
  assert one == by_hand
  with pytest.raises(ValueError, match="temperature=0"):
    registry.create(
      model_configs.TwoTowerConfig(temperature=0.0), 5, (), {}, {}
    )


def test_flops_agree_with_the_compiler():
  """Of the loss: a forward pass ends with the in-batch softmax."""
  # Wide: what is not a product, which the counter leaves out, is then little.
  model = tiny.two_tower(d_model=256, d_ff=512)
  B, S, T = 2, 64, 24
  shapes = tiny.shapes_of(tiny.batch(), B, S, T)
  items = tiny.catalogue()
  variables = jax.eval_shape(model.init, jax.random.key(0), shapes, items)
  log_q = jax.ShapeDtypeStruct((tiny.NUM_ITEMS + 1,), jnp.float32)
  loss = losses.make_loss(model)
  compiled = (
    jax.jit(lambda p, b, q: loss(p, b, items, q, None))
    .lower(variables["params"], shapes, log_q)
    .compile()
  )
  counted = registry.forward_flops(model, B, S, T)
  assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.03)
