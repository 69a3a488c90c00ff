"""The joint step: its gradient by hand, its sampler, its meshes, its effect."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from onerec_jax import config as config_lib
from onerec_jax import model_configs, partitioning
from onerec_jax.alignment import learner, objectives
from onerec_jax.alignment.requests import JointBatch
from onerec_jax.alignment_config import AlignmentConfig
from onerec_jax.data.batch import Catalogue
from onerec_jax.inference import prefix_index
from onerec_jax.training import loop, step
from tests import tiny
from tests.training.test_step import _host_calls

SPREAD = 0.4
"""Of the ratios in the gradient's test, in nats: some are clipped."""


lazy = functools.partial(tiny.lazy_decoder, num_layers=1)


def world(model):
  catalogue = tiny.catalogue()
  codes = np.asarray(catalogue.codes)
  index = prefix_index.build(codes, model.codebook_sizes)
  return tiny.params(model), catalogue, index


def by_table(values, histories, candidates):
  """Of sessions the sum over their items."""
  del histories
  shape = (*candidates.shape[:2], -1)
  return jnp.sum(values[candidates].reshape(shape), axis=-1)


def reward_of(seed):
  values = np.random.default_rng(seed).normal(size=tiny.NUM_ITEMS + 1)
  return jax.tree_util.Partial(by_table, jnp.asarray(values, jnp.float32))


def requests_of(batch):
  """What the targets see; sessions ask as their first targets do."""
  return tiny.separate(batch)[0]


# The gradient, in two passes and without a shared context.


def answers_by_hand(model, params, requests, codes, catalogue):
  """Log-probabilities [B, R], every answer in a row of its own."""
  B, R, N, L = codes.shape
  alone = jax.tree.map(lambda x: jnp.repeat(x, R, axis=0), requests)
  first = len(catalogue.codes)
  alone = alone.replace(
    targets=jnp.arange(first, first + B * R * N).reshape(B * R, N),
    visible_from=jnp.repeat(alone.visible_from, N, axis=1),
    visible_until=jnp.repeat(alone.visible_until, N, axis=1),
  )
  more = jnp.concatenate([catalogue.codes, codes.reshape(-1, L)])
  zeros = jnp.zeros(B * R * N, jnp.int32)
  features = {
    name: jnp.concatenate([values, zeros])
    for name, values in catalogue.features.items()
  }
  logits = model.apply({"params": params}, alone, Catalogue(more, features))
  return tokens_by_hand(logits, more[alone.targets]).sum((1, 2)).reshape(B, R)


def tokens_by_hand(logits, codes):
  """log p of each code [B, T, L], softmax over all codes."""
  levels = []
  for level, values in enumerate(logits):
    p = jnp.exp(values) / jnp.sum(jnp.exp(values), axis=-1, keepdims=True)
    chosen = jax.nn.one_hot(codes[..., level], values.shape[-1])
    levels.append(jnp.log(jnp.sum(p * chosen, axis=-1)))
  return jnp.stack(levels, axis=-1)


def clipped_by_hand(new, old, advantage):
  """ECPO in probabilities."""
  policy, fixed = jnp.exp(new), jax.lax.stop_gradient(jnp.exp(new))
  denominator = jnp.maximum(fixed / 1.3, jnp.exp(old))
  ratio = policy / denominator
  kept = jnp.clip(ratio, 0.8, 1.2)
  return -jnp.minimum(ratio * advantage, kept * advantage)


def feedback_by_hand(tokens, advantage):
  """GBPO in probabilities, π_old = sg π."""
  p, fixed = jnp.exp(tokens), jax.lax.stop_gradient(jnp.exp(tokens))
  bad = jnp.maximum(fixed, 1 - fixed)
  denominator = jnp.where(advantage[..., None] < 0, bad, fixed)
  return jnp.mean(-p / denominator * advantage[..., None], axis=-1)


def assert_agree(model, config, group, streams, catalogue, index, by_hand):
  """The learner's gradient of the mean loss is the reference's.

  Args:
    group: without what the sampler thought of its answers, which is made up
      here and differs from the policy by SPREAD, and without its scale.
    streams: fields of the joint batch beside its group.
    by_hand: (params, new, old) → the loss but for its next-token part.
  """
  batch = tiny.batch_of(model)
  count = np.sum(np.asarray(batch.targets) > 0)
  loss = functools.partial(learner.joint_loss, model, config)

  def ours(params, group):
    joint = JointBatch(**vars(batch), group=group, **streams)
    return loss(params, joint, catalogue, index, None)["loss"] / count

  def reference(params, old):
    new = answers_by_hand(model, params, group.requests, group.codes, catalogue)
    logits = model.apply({"params": params}, batch, catalogue)
    tokens = tokens_by_hand(logits, catalogue.codes[batch.targets])
    next_token = jnp.sum((batch.targets > 0) * -tokens.mean(-1)) / count
    return next_token + by_hand(tokens, new, old), new

  params, shape = tiny.params(model), group.codes.shape[:2]
  want = jax.jit(jax.grad(reference, has_aux=True))
  # Once for the policy's own log-probabilities, which no sampler changes.
  _, new = want(params, np.zeros(shape, np.float32))
  spread = np.random.default_rng(5).normal(0, SPREAD, shape)
  old = np.asarray(new + spread, np.float32)
  scale = np.full(len(old), count / len(old), np.float32)
  got = jax.jit(jax.grad(ours))(params, group.replace(old=old, scale=scale))
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
    got, want(params, old)[0],
  )  # fmt: skip


def group_of(codes, advantages):
  """Answers to what each target of `tiny.batch` sees."""
  return objectives.Group(
    requests_of(tiny.batch()), jnp.asarray(codes, jnp.int32), None,
    np.ones(codes.shape[:2], bool), np.asarray(advantages, np.float32), None,
    scale=None,
  )  # fmt: skip


def test_the_gradient_of_three_streams_by_hand():
  """Next token + ECPO with the format reward + GBPO, in one backward pass."""
  model = lazy(constrained_softmax=False)
  _, catalogue, index = world(model)
  config = AlignmentConfig(
    objective="ecpo", weight=0.7, feedback="like", feedback_weight=0.3,
    constrained=False, search="sample", format_samples=2, format_weight=1.5,
  )  # fmt: skip
  rng = np.random.default_rng(1)
  # Any codes, be they items or not.
  codes = np.stack(
    [rng.integers(0, size, (7, 6, 1)) for size in tiny.CODEBOOK_SIZES], axis=-1
  )
  group = group_of(codes, rng.normal(size=(7, 6)))
  judged = rng.integers(0, 2, (7, 6)).astype(np.float32)
  targets = tiny.batch().targets
  advantages = jnp.asarray(rng.integers(-1, 2, targets.shape), jnp.float32)

  def by_hand(tokens, new, old):
    preferred = clipped_by_hand(new, old, group.advantages).mean()
    legal = clipped_by_hand(new, old, judged).sum(1).mean() / 2
    shown = targets > 0
    of_feedback = feedback_by_hand(tokens, advantages) * shown
    return (
      0.7 * (preferred + 1.5 * legal) + 0.3 * of_feedback.sum() / shown.sum()
    )

  assert_agree(
    model, config, group.replace(format=judged), {"advantages": advantages},
    catalogue, index, by_hand,
  )  # fmt: skip


def test_the_gradient_of_pairs_of_sessions_by_hand():
  """DPO of whole sessions; a request without a pair gives none."""
  # Dense: quicker to compile.
  model = tiny.session_decoder(
    decoder_layers=1, constrained_softmax=False, moe=model_configs.MoEConfig()
  )
  _, catalogue, index = world(model)
  config = AlignmentConfig(objective="dpo", weight=0.7, beta=0.3)
  items = np.random.default_rng(1).integers(1, tiny.NUM_ITEMS + 1, (7, 2, 2))
  usable = np.array([1, 1, 0, 1, 0, 1, 1], np.float32)
  group = group_of(
    np.asarray(catalogue.codes)[items], np.stack([usable] * 2, axis=1)
  )

  def by_hand(tokens, new, old):
    del tokens
    ratio = jnp.exp(new - old) ** 0.3
    right = ratio[:, 0] / (ratio[:, 0] + ratio[:, 1])
    return 0.7 * jnp.mean(usable * -jnp.log(right))

  assert_agree(model, config, group, {}, catalogue, index, by_hand)


# The whole step.


def start(model, config, rate=0.0, sync_every=1, **options):
  """(state, jitted step, joint batch)."""
  params, catalogue, index = world(model)
  tx = optax.with_extra_args_support(optax.sgd(rate))
  zero = jnp.zeros((), jnp.int32)
  sampler = jax.device_put(jax.tree.map(np.array, params))
  state = learner.AlignState(zero, params, tx.init(params), zero, sampler)
  function = functools.partial(
    learner.align_step, model=model, config=config, sync_every=sync_every,
    seed=0, tx=tx, **options,
  )  # fmt: skip
  batch = tiny.batch_of(model)
  joint = JointBatch(**vars(batch), requests=requests_of(tiny.batch()))
  return state, function, joint, catalogue, index


def values(sums):
  return {k: float(v) / float(sums["count"]) for k, v in sums.items()}


def sampled(**options):
  """As `start`: drawn answers and feedback, with rows for eight devices."""
  config = AlignmentConfig(
    objective="ecpo", search="sample", group=8, weight=2.0, feedback="like"
  )
  state, function, joint, catalogue, index = start(
    lazy(), config, 0.1, 3, **options
  )
  eight = lambda tree: jax.tree.map(lambda x: np.concatenate([x] * 8)[:8], tree)
  likes = np.random.default_rng(0).integers(0, 2, (8, 5)).astype(np.float32)
  joint = eight(joint.replace(requests=None)).replace(
    requests=eight(joint.requests), labels={"like": likes}
  )
  return state, function, joint, catalogue, index


@functools.cache
def on_one_device():
  """The jitted step of `sampled`, which three tests share."""
  return jax.jit(sampled()[1])


def test_the_reward_rises_under_a_sampler_that_follows():
  """The sampler is the policy of the last sync, every third step, and answers:
  there the ratio is 1, and not in between. One program, whatever the reward."""
  state, _, joint, catalogue, index = sampled()
  compiled, seen, trace = on_one_device(), [], []
  for _ in range(30):
    seen.append(jax.device_get(state.params))
    state, sums = compiled(state, joint, catalogue, (index, reward_of(3)))
    trace.append(values(sums))
    age = round(trace[-1]["sampler_age"])
    jax.tree.map(np.testing.assert_array_equal, state.sampler, seen[-1 - age])
  ages, ratios, earned = (
    np.array([found[name] for found in trace])
    for name in ("sampler_age", "ratio_max", "reward_mean")
  )
  np.testing.assert_allclose(ages, [0, 1, 2] * 10, atol=1e-5)
  np.testing.assert_allclose(ratios[ages < 0.5], 1.0, atol=1e-4)
  assert ratios[ages > 0.5].min() > 1.01
  assert earned[-3:].mean() > earned[:3].mean() + 0.5
  # A reward is an argument: another is another gradient.
  norms = [
    float(
      compiled(state, joint, catalogue, (index, reward_of(seed)))[1][
        "grad_norm"
      ]
    )
    for seed in (0, 1)
  ]
  assert norms[0] != norms[1]
  assert compiled._cache_size() == 1


def test_the_margin_of_pairs_rises():
  """Between two copies the pairs move apart; then the reference follows."""
  model = lazy()
  config = AlignmentConfig(objective="dpo", weight=3.0, group=8)
  state, function, joint, catalogue, index = start(model, config, 0.3, 4)
  compiled, reward, trace = jax.jit(function), reward_of(3), []
  for _ in range(40):
    state, sums = compiled(state, joint, catalogue, (index, reward))
    trace.append(values(sums))
  earned = [found["reward_mean"] for found in trace]
  assert np.mean(earned[-4:]) > np.mean(earned[:4]) + 0.2
  for sync in range(0, 40, 4):
    margins = [found["margin"] for found in trace[sync : sync + 4]]
    assert abs(margins[0]) < 1e-3 < margins[-1]


@pytest.mark.parametrize("search", ["sample", "beam"])
def test_free_answers_count_where_they_are_items(search):
  """Guards of free answers against the answers themselves."""
  model = lazy(constrained_softmax=False)
  config = AlignmentConfig(
    objective="ecpo", search=search, constrained=False, group=64,
    format_samples=64,
  )  # fmt: skip
  state, function, joint, catalogue, index = start(model, config)
  constant = jax.tree_util.Partial(
    lambda histories, items: jnp.where(items > 0, 2.0, jnp.nan)
  )
  _, sums = jax.jit(function)(state, joint, catalogue, (index, constant))
  found = values(sums)
  # 60 of 192 IDs are items; what is none has no reward, and costs none.
  assert 0.05 < found["legality"] < 0.95
  assert found["reward_mean"] == pytest.approx(2.0)
  assert found["zero_spread"] == pytest.approx(1.0)
  # No preference: what is left is the format reward, −(legal of K drawn) / K,
  # and here all are drawn.
  assert found["objective"] == pytest.approx(-found["legality"], rel=1e-4)
  assert found["loss"] == pytest.approx(
    found["next_token"] + 0.1 * found["objective"], rel=1e-4
  )


def test_no_stream_of_random_numbers_is_that_of_a_microbatch():
  """Against the keys that step.train_step splits, of any number of pieces."""
  key = jax.random.fold_in(jax.random.key(7), 3)
  pieces = jax.random.key_data(jax.random.split(key, 1024))
  own = jax.random.key_data(jnp.stack(learner.streams(7, jnp.int32(3))))
  keys = np.concatenate([jax.random.key_data(key)[None], pieces, own])
  assert len(np.unique(keys, axis=0)) == len(keys)


def test_microbatches_give_the_step_of_the_whole_batch():
  state, in_two, joint, *tables = sampled(microbatches=2)
  catalogue, index = tables
  found = [
    step(state, joint, catalogue, (index, reward_of(0)))
    for step in (on_one_device(), jax.jit(in_two))
  ]
  close = functools.partial(np.testing.assert_allclose, atol=1e-5)
  jax.tree.map(close, *(after.params for after, _ in found))
  whole, pieces = (values(sums) for _, sums in found)
  assert whole == pytest.approx(pieces, rel=1e-3, abs=1e-4)


def test_eight_devices_equal_one():
  """Draws, rewards, both streams and the sampler; no word to the host."""
  state, function, joint, catalogue, index = sampled()
  tables = catalogue, (index, reward_of(2))
  one, trace = state, []
  for _ in range(4):
    one, sums = on_one_device()(one, joint, *tables)
    trace.append(values(sums))
  mesh = partitioning.make_mesh(config_lib.MeshConfig(4, 2, 1, 1))
  # Copies: the step donates its state, and others use these parameters.
  state, tables = jax.device_put(
    (jax.tree.map(np.array, state), tables), partitioning.replicated(mesh)
  )
  joint = loop.put_batch(joint, partitioning.batch_sharding(mesh))
  with jax.set_mesh(mesh):
    shardings = jax.tree.map(lambda x: x.sharding, state)
    jitted = step.compile_step(function, shardings, mesh, *tables)
    compiled = jitted.lower(state, joint, *tables).compile()
    for expected in trace:
      with jax.transfer_guard("disallow"):
        state, sums = compiled(state, joint, *tables)
      assert values(sums) == pytest.approx(expected, rel=1e-4, abs=1e-4)
  assert not _host_calls(compiled.as_text())
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, atol=1e-5),
    jax.device_get(one),
    jax.device_get(state),
  )
