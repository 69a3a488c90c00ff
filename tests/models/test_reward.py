"""Reward models against loops in numpy, and what they promise."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.models import registry, reward
from onerec_jax.training import losses
from tests import tiny
from tests.models import reward_oracle as oracle

M = 3
MAKE = {
  "session_reward": functools.partial(tiny.session_reward, session_size=M),
  "p_score": tiny.p_score,
}


@functools.cache
def _run(model, method):
  return jax.jit(
    lambda p, *args: model.apply({"params": p}, *args, method=method)
  )


def scores(model, batch, candidates):
  """Head → numpy [B, R]."""
  found = _run(model, "scores")(
    tiny.params(model), batch, tiny.catalogue(), jnp.asarray(candidates)
  )
  return {head: np.asarray(x) for head, x in found.items()}


def stacked(found, heads=None):
  return np.stack([found[head] for head in heads or sorted(found)], axis=-1)


@pytest.fixture(scope="module", params=MAKE)
def model(request):
  return MAKE[request.param]()


@pytest.fixture(scope="module")
def batch():
  return tiny.batch()


@pytest.fixture(scope="module")
def one():
  """Every target of `batch` in a row of its own."""
  return tiny.separate(tiny.batch())


def some_candidates(model, rows, count, seed=0):
  """Different items, in sessions where the model takes them."""
  shape = (rows, count, M) if hasattr(model, "session_size") else (rows, count)
  rng = np.random.default_rng(seed)
  return np.stack(
    [
      rng.permutation(np.arange(1, tiny.NUM_ITEMS + 1))[
        : int(np.prod(shape[1:]))
      ].reshape(shape[1:])
      for _ in range(rows)
    ]
  ).astype(np.int32)


def test_sessions_equal_loops_in_numpy():
  model = MAKE["session_reward"]()
  batch = tiny.session_batch(M)
  found = _run(model, None)(tiny.params(model), batch, tiny.catalogue())
  found = stacked(found, ["swt", "vtr", "wtr", "ltr"])
  for (row, place), (token, events) in tiny.SEES.items():
    items = batch.targets[row, place * M : (place + 1) * M]
    expected = oracle.session(
      model, tiny.params(model), batch, tiny.catalogue(), row, token, events,
      items,
    )  # fmt: skip
    np.testing.assert_allclose(found[row, place], expected, atol=3e-4)


def test_p_scores_equal_loops_in_numpy(batch):
  model = MAKE["p_score"]()
  found = _run(model, None)(tiny.params(model), batch, tiny.catalogue())
  found = stacked(found, [*model.objectives, "p"])
  for (row, target), (token, events) in tiny.SEES.items():
    expected = oracle.p_score(
      model, tiny.params(model), batch, tiny.catalogue(), row, token, events,
      batch.targets[row, target],
    )  # fmt: skip
    np.testing.assert_allclose(found[row, target], expected, atol=3e-4)


def test_candidates_that_share_a_context_score_as_alone(model, one):
  """One row of five candidates, and five rows of one."""
  rows, _ = one
  candidates = some_candidates(model, len(rows.targets), 5)
  together = scores(model, rows, candidates)
  repeated = jax.tree.map(lambda x: jnp.repeat(x, 5, axis=0), rows)
  alone = scores(
    model, repeated, candidates.reshape(-1, 1, *candidates.shape[2:])
  )
  for head, found in together.items():
    np.testing.assert_allclose(found, alone[head].reshape(-1, 5), atol=2e-5)
    assert found.std(axis=1).min() > 1e-3


def test_the_order_of_candidates_is_nothing_to_them(model, one):
  rows, _ = one
  candidates = some_candidates(model, len(rows.targets), 5)
  turned = scores(model, rows, candidates[:, ::-1])
  for head, found in scores(model, rows, candidates).items():
    np.testing.assert_allclose(found, turned[head][:, ::-1], atol=2e-5)


def test_a_session_is_a_set_of_items_that_see_each_other(one):
  rows, _ = one
  model = MAKE["session_reward"]()
  sessions = some_candidates(model, len(rows.targets), 4)
  base = stacked(scores(model, rows, sessions))
  order = stacked(scores(model, rows, sessions[..., [2, 0, 1]]))
  np.testing.assert_allclose(order, base, atol=2e-5)
  # What the first item adds depends on what stands beside it.
  less = stacked(scores(model, rows, sessions * np.int32([0, 1, 1])))
  other = np.roll(sessions, 1, axis=1) * np.int32([0, 1, 1])
  beside = stacked(scores(model, rows, sessions * np.int32([1, 0, 0]) + other))
  alone = stacked(scores(model, rows, other))
  assert np.abs((base - less) - (beside - alone)).max() > 0.05


def test_an_empty_slot_is_no_item(one):
  """Sessions of two in three slots are sessions of two."""
  rows, _ = one
  model = MAKE["session_reward"]()
  two = some_candidates(model, len(rows.targets), 4)[..., :2]
  padded = np.pad(two, ((0, 0), (0, 0), (0, 1)))
  for head, found in scores(model, rows, padded).items():
    np.testing.assert_allclose(found, scores(model, rows, two)[head], atol=2e-5)


def test_a_sessions_p_score_is_the_mean_of_its_items(one):
  rows, _ = one
  model, count = MAKE["p_score"](), len(rows.targets)
  items = some_candidates(model, count, 8).reshape(count, 4, 2)
  single = scores(model, rows, items.reshape(count, 8))["p"]
  found = scores(model, rows, np.pad(items, ((0, 0), (0, 0), (0, 1))))["p"]
  expected = single.reshape(count, 4, 2).mean(axis=-1)
  np.testing.assert_allclose(found, expected, atol=2e-5)


def test_every_item_is_scored_as_if_given_alone(model, one):
  rows, _ = one
  found = _run(model, "item_scores")(tiny.params(model), rows, tiny.catalogue())
  found = np.asarray(found)
  assert found.shape == (len(rows.targets), 1, tiny.NUM_ITEMS + 1)
  assert (found[..., 0] == -np.inf).all()
  items = np.arange(1, tiny.NUM_ITEMS + 1, dtype=np.int32)
  alone = scores(model, rows, np.tile(items, (len(rows.targets), 1)))
  expected = sum(
    w / (1 + np.exp(-alone[h])) for h, w in model.value_weights.items()
  )
  np.testing.assert_allclose(found[:, 0, 1:], expected, atol=1e-5)


def test_fewer_objectives_are_worth_what_they_are(one):
  """Data without follows: the reward of the heads there are."""
  rows, _ = one
  model = tiny.session_reward(objectives=("swt", "ltr"), session_size=M)
  candidates = some_candidates(model, len(rows.targets), 4)
  heads = scores(model, rows, candidates)
  given = {name: jnp.asarray(x) for name, x in heads.items()}
  found = reward.value(given, model.value_weights)
  expected = sum(1 / (1 + np.exp(-heads[name])) for name in ("swt", "ltr"))
  np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_contexts_that_are_not_the_candidates_are_refused(model, batch):
  with pytest.raises(ValueError, match="5 targets a row and 2 candidates"):
    scores(model, batch, np.ones((2, 2), np.int32))


def test_half_sessions_are_refused(batch):
  model = tiny.session_reward(session_size=2)
  with pytest.raises(ValueError, match="5 targets a row.*sessions of 2"):
    model.apply({"params": tiny.params(model)}, batch, tiny.catalogue())


def test_pathways_are_read(model):
  """Another event that a pathway holds is another score."""
  model = model.clone(pathways=tiny.PATHWAYS, lifelong_queries=4)
  batch = tiny.pathway_batch()
  batch = batch.replace(
    targets=batch.targets[:, :1],
    visible_from=batch.visible_from[:, :1],
    visible_until=batch.visible_until[:, :1],
  )
  candidates = some_candidates(model, len(batch.targets), 3)
  before = stacked(scores(model, batch, candidates))
  assert np.isfinite(before).all()
  for position in (2, 7, 12):  # short, positive, lifelong
    other = batch.replace(items=batch.items.at[3, position].set(59))
    moved = np.abs(stacked(scores(model, other, candidates)) - before)
    assert moved[3].min() > 0
    assert moved[:3].max() == 0


def loss_and_gradients(model, batch):
  loss = losses.make_loss(model)

  def of(params):
    sums = loss(params, batch, tiny.catalogue(), None, None)
    return sums["loss"], sums

  return jax.jit(jax.value_and_grad(of, has_aux=True))(tiny.params(model))


def cross_entropy(logit, label):
  p = 1 / (1 + np.exp(-np.float64(logit)))
  return -label * np.log(p) - (1 - label) * np.log(1 - p)


def test_the_p_scores_loss_by_hand(batch):
  weights = (1.0, 0.5, 2.0, 3.0, 1.5, 0.25)
  model = MAKE["p_score"](weights=weights)
  batch = tiny.labelled(batch)
  logits = _run(model, None)(tiny.params(model), batch, tiny.catalogue())
  total, click = 0.0, 0.0
  for place in tiny.SEES:
    for weight, name in zip(weights, model.objectives):
      label = float(batch.labels[name][place])
      if not np.isnan(label):
        own = cross_entropy(logits[name][place], label)
        total += own + weight * cross_entropy(logits["p"][place], label)
        click += own * (name == "click")
  (loss, sums), _ = loss_and_gradients(model, batch)
  assert float(loss) == pytest.approx(total, rel=1e-5)
  assert float(sums["loss_click"]) == pytest.approx(click, rel=1e-5)
  assert sums["count"] == len(tiny.SEES)


def session_labels(batch, seconds):
  """By loops: (row, session) → objective → label."""
  found = {}
  for row, place in tiny.SEES:
    own = slice(place * M, (place + 1) * M)
    of = {
      name: [float(x) for x in values[row, own]]
      for name, values in batch.labels.items()
    }
    found[row, place] = {
      "swt": min(sum(of["play_time_ms"]) / 1000 / seconds, 1.0),
      "vtr": sum(of["long_view"]) / M,
      "wtr": float("nan")
      if np.isnan(of["follow"]).any()
      else max(of["follow"]),
      "ltr": float("nan") if np.isnan(of["like"]).any() else max(of["like"]),
    }
  return found


def test_labels_and_loss_of_sessions_by_hand():
  model = MAKE["session_reward"](session_seconds=100.0)
  batch = tiny.labelled(tiny.session_batch(M))
  # A session that lost an item is none.
  batch = batch.replace(targets=batch.targets.at[0, 2].set(0))
  expected = session_labels(batch, 100.0)
  del expected[0, 0]
  labels = model.labels(batch)
  logits = _run(model, None)(tiny.params(model), batch, tiny.catalogue())
  total, unknown = 0.0, 0
  for name in model.objectives:
    values = np.full(labels[name].shape, np.nan)
    for place, of in expected.items():
      values[place] = of[name]
      if np.isnan(of[name]):
        unknown += 1
      else:
        total += cross_entropy(logits[name][place], of[name])
    np.testing.assert_allclose(labels[name], values, rtol=1e-6)
  assert unknown > 3
  assert {np.nanmax(labels["swt"])} == {1.0}
  (loss, sums), _ = loss_and_gradients(model, batch)
  assert float(loss) == pytest.approx(M * total, rel=1e-5)
  assert sums["count"] == M * len(tiny.SEES) - 1


def test_without_long_views_a_click_is_a_view():
  batch = tiny.labelled(tiny.session_batch(M))
  rest = dict(batch.labels)
  del rest["long_view"]
  found = MAKE["session_reward"]().labels(batch.replace(labels=rest))["vtr"]
  clicks = np.asarray(batch.labels["click"]).reshape(2, -1, M)[0, 0]
  np.testing.assert_allclose(found[0, 0], clicks.mean())


def test_missing_labels_are_named(model, batch):
  batch = tiny.session_batch(getattr(model, "session_size", 1))
  with pytest.raises(ValueError, match=r"pipeline\.labels=True"):
    model.labels(batch)
  labels = {"click": jnp.ones(batch.targets.shape)}
  with pytest.raises(ValueError, match=r"\['click'\].*model\.objectives"):
    model.labels(batch.replace(labels=labels))


def test_gradients_reach_everything(model):
  batch = tiny.labelled(tiny.batch_of(model))
  _, grads = loss_and_gradients(model, batch)
  for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
    assert np.abs(leaf).max() > 0, jax.tree_util.keystr(path)
  # Every tower.
  towers = grads["towers"]
  assert np.abs(towers["out"]).max(axis=1).min() > 0
  assert np.abs(towers["bias"]).min() > 0


def test_an_unknown_label_moves_nothing(model):
  """Without any label of `like`, its tower gets no gradient; others do."""
  batch = tiny.labelled(tiny.batch_of(model))
  unknown = jnp.full(batch.targets.shape, jnp.nan)
  batch = batch.replace(labels={**batch.labels, "like": unknown})
  objective = "ltr" if "ltr" in model.objectives else "like"
  (loss, sums), grads = loss_and_gradients(model, batch)
  assert np.isfinite(float(loss))
  assert sums[f"loss_{objective}"] == 0
  own = model.objectives.index(objective)
  moved = np.abs(grads["towers"]["bias"]) > 0
  np.testing.assert_array_equal(moved, np.arange(len(model.objectives)) != own)


def test_the_fused_score_is_drawn_to_the_weighted_mean_of_what_happens():
  """p = Σ w P(y = 1) / Σ w where the inputs tell nothing apart."""
  rates, weights = jnp.asarray([0.8, 0.1]), jnp.asarray([1.0, 3.0])

  def loss(p):
    logit = jnp.full(2, jnp.log(p / (1 - p)))
    return jnp.sum(weights * losses.binary_cross_entropy(logit, rates))

  best = (0.8 + 3 * 0.1) / 4
  slopes = jax.vmap(jax.grad(loss))(
    jnp.asarray([best - 0.01, best, best + 0.01])
  )
  assert slopes[0] < -0.1
  assert abs(slopes[1]) < 1e-5
  assert slopes[2] > 0.1


def test_value_is_a_weighted_sum_of_probabilities():
  logits = {"a": jnp.asarray([[0.0, 2.0]]), "b": jnp.asarray([[-1.0, 3.0]])}
  found = reward.value(logits, {"a": 2.0, "b": 0.5})
  sigmoid = lambda x: 1 / (1 + np.exp(-np.asarray(x)))
  expected = 2 * sigmoid([[0.0, 2.0]]) + 0.5 * sigmoid([[-1.0, 3.0]])
  np.testing.assert_allclose(found, expected, rtol=1e-6)
  with pytest.raises(ValueError, match=r"\['c'\].*has \['a', 'b'\]"):
    reward.value(logits, {"c": 1.0})


@pytest.mark.parametrize("name", MAKE)
def test_flops_agree_with_the_compiler(batch, name):
  # Wide: what is not a product, which the counter leaves out, is then little.
  model = MAKE[name](d_model=256, d_ff=512)
  B, S, T = 2, 64, 24
  sized = lambda n: jax.ShapeDtypeStruct((B, n), jnp.int32)
  shapes = batch.replace(
    items=sized(S), segment=sized(S), targets=sized(T),
    features={name: sized(S) for name in batch.features},
    visible_from=sized(T), visible_until=sized(T),
  )  # fmt: skip
  items = tiny.catalogue()
  variables = jax.eval_shape(model.init, jax.random.key(0), shapes, items)
  compiled = jax.jit(model.apply).lower(variables, shapes, items).compile()
  counted = registry.forward_flops(model, B, S, T)
  assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.03)
  kernels = sum(
    leaf.size
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"])
    if "kernel" in jax.tree_util.keystr(path)
    and "project" not in jax.tree_util.keystr(path)
  )
  assert registry.block_parameters(model) == pytest.approx(kernels, rel=0.02)
