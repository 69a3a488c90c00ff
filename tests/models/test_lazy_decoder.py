"""The lazy decoder against loops in numpy, and its promises one by one."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.models import lazy_decoder
from tests import tiny
from tests.models import lazy_decoder_oracle as oracle

MASKED = -1e8
"""Biases below this are hidden positions."""


@pytest.fixture(scope="module")
def batch():
  return tiny.batch()


@pytest.fixture(scope="module")
def catalogue():
  return tiny.catalogue()


@pytest.fixture(scope="module")
def model():
  return tiny.lazy_decoder(kv_split=2, kv_layers=2)


@pytest.mark.parametrize(
  ("num_layers", "kv_layers", "kv_split", "num_kv_heads", "item_embedding"),
  [
    (1, 1, 1, 4, True),
    (2, 1, 2, 2, False),
    (3, 2, 1, 1, True),
    (3, 3, 2, 4, True),
    (5, 2, 2, 2, True),
  ],
)
def test_equals_loops_in_numpy(
  batch, catalogue, num_layers, kv_layers, kv_split, num_kv_heads,
  item_embedding,
):  # fmt: skip
  model = tiny.lazy_decoder(
    num_layers=num_layers,
    kv_layers=kv_layers,
    kv_split=kv_split,
    num_kv_heads=num_kv_heads,
    item_embedding=item_embedding,
  )
  params = tiny.params(model)
  found = oracle.logits_of(model, params, batch, catalogue)
  for (row, target), (token, events) in tiny.SEES.items():
    expected = oracle.forward(
      model, params, batch, catalogue, row, target, token, events
    )
    for level, logits in enumerate(expected):
      np.testing.assert_allclose(
        found[level][row, target], logits, atol=2e-4, rtol=2e-4
      )


def test_layers_read_the_context_in_order():
  """⌊l · L_kv / N⌋ with l from 0, V2 §3.3; Table 3's rows at 18 layers."""
  for num_layers, kv_layers, expected in [
    (18, 1, [0] * 18),
    (18, 3, [0] * 6 + [1] * 6 + [2] * 6),
    (18, 9, [layer // 2 for layer in range(18)]),
    (18, 18, list(range(18))),
    (5, 2, [0, 0, 0, 1, 1]),
  ]:
    model = tiny.lazy_decoder(num_layers=num_layers, kv_layers=kv_layers)
    assert [model.kv_layer(i) for i in range(num_layers)] == expected


@pytest.mark.parametrize("kv_split", [1, 2])
@pytest.mark.parametrize("kv_layers", [1, 3])
def test_split_context(kv_layers, kv_split):
  width = 4
  features = jnp.arange(kv_layers * kv_split * width * 6).reshape(2, 3, -1)
  chunks = lazy_decoder.split_context(
    features.astype(jnp.float32), kv_layers, kv_split
  )
  assert chunks.shape == (kv_layers, kv_split, 2, 3, width)
  for kv in range(kv_layers):
    for split in range(kv_split):
      start = (kv * kv_split + split) * width
      np.testing.assert_array_equal(
        chunks[kv, split], features[..., start : start + width]
      )


@pytest.mark.parametrize("kv_split", [1, 2])
def test_values_are_keys_iff_not_split(batch, catalogue, kv_split):
  model = tiny.lazy_decoder(kv_split=kv_split)
  params = tiny.params(model)
  context = model.apply({"params": params}, batch, catalogue, method="encode")
  assert context.keys.shape == (1, 2, 12, 2, 4)
  assert np.array_equal(context.keys, context.values) == (kv_split == 1)
  width = params["project"]["kernel"].shape[1]
  assert width == 1 * kv_split * 2 * 4  # S_kv · L_kv · G · Z


def test_blocks_project_no_keys_or_values_of_the_context(model):
  """W_q and W_o only; 6·d² + 3·d·F and three norms, nothing else."""
  D, F = model.d_model, model.d_ff
  block = flax.traverse_util.flatten_dict(
    tiny.params(model)["layers_0"], sep="/"
  )
  assert {name: x.shape for name, x in block.items()} == {
    "cross_norm/scale": (D,),
    "cross_q/kernel": (D, D),
    "cross_o/kernel": (D, D),
    "self_norm/scale": (D,),
    "self_qkv/kernel": (D, 3 * D),
    "self_o/kernel": (D, D),
    "ffn_norm/scale": (D,),
    "ffn/wi/kernel": (D, 2 * F),
    "ffn/wo/kernel": (F, D),
  }


def test_each_level_has_a_head_of_its_own(model, batch, catalogue):
  params = tiny.params(model)
  before = oracle.logits_of(model, params, batch, catalogue)
  for level, size in enumerate(tiny.CODEBOOK_SIZES):
    own = params["codes"]
    assert own[f"heads_{level}"]["kernel"].shape == (model.d_model, size)
    for name in (f"heads_{level}", f"norms_{level}"):
      changed = jax.tree.map(lambda x: -2 * x, own[name])
      changed = {**params, "codes": {**own, name: changed}}
      after = oracle.logits_of(model, changed, batch, catalogue)
      same = [np.array_equal(a, b) for a, b in zip(after, before)]
      assert same == [other != level for other in range(3)], name


def _sums(model, batch, catalogue):
  """params → [B, T, L]: a fixed random projection of each level's logits."""
  rng = np.random.default_rng(5)
  weights = [rng.normal(size=(1, 1, k)) for k in tiny.CODEBOOK_SIZES]

  def sums(params):
    logits = model.apply({"params": params}, batch, catalogue)
    return jnp.stack(
      [jnp.sum(x * w, axis=-1) for x, w in zip(logits, weights)], axis=-1
    )

  return sums


@pytest.fixture(scope="module")
def sensitivity(model, batch, catalogue):
  """Gradients [B, T, L, rows] of logits by item row and by code row."""
  params = tiny.params(model)
  sums = _sums(model, batch, catalogue)
  names = ["embedding", "codes"]

  def part(tables):
    return sums({**params, **tables})

  jacobian = tiny.jit(jax.jacrev(part))({name: params[name] for name in names})
  norms = jax.tree.map(lambda x: np.linalg.norm(x, axis=-1), jacobian)
  return norms["embedding"]["item"]["table"], [
    norms["codes"][f"tables_{level}"]["table"] for level in range(2)
  ]


def test_a_target_depends_on_what_it_sees_alone(batch, sensitivity):
  by_item, _ = sensitivity
  for (row, target), (_, events) in tiny.SEES.items():
    seen = {int(batch.items[row, s]) for s in events}
    for level in range(3):
      depends = set(np.flatnonzero(by_item[row, target, level]).tolist())
      assert depends == seen


def test_a_level_depends_on_the_codes_before_it(batch, catalogue, sensitivity):
  _, by_code = sensitivity
  for row, target in tiny.SEES:
    codes = catalogue.codes[batch.targets[row, target]]
    for level in range(3):
      for earlier, gradient in enumerate(by_code):
        depends = np.flatnonzero(gradient[row, target, level]).tolist()
        expected = [int(codes[earlier])] if earlier < level else []
        assert depends == expected


def test_no_context_position_attends_another(model, batch, catalogue):
  """A position's keys and values change only with its own event."""
  params = tiny.params(model)
  encode = tiny.jit(
    lambda b: model.apply({"params": params}, b, catalogue, method="encode")
  )
  before = encode(batch)
  for position in (3, 9):
    items = batch.items.at[0, position].set(batch.items[1, 4])
    after = encode(batch.replace(items=items))
    for one, other in (
      (before.keys, after.keys),
      (before.values, after.values),
    ):
      differs = np.any(np.asarray(one != other), axis=(0, 3, 4))
      assert np.argwhere(differs).tolist() == [[0, position]]
    np.testing.assert_array_equal(before.bias, after.bias)


def test_packed_rows_equal_separate_rows(model, batch, catalogue):
  params = tiny.params(model)
  packed = oracle.logits_of(model, params, batch, catalogue)
  alone, places = tiny.separate(batch)
  found = oracle.logits_of(model, params, alone, catalogue)
  for level in range(3):
    for i, place in enumerate(places):
      np.testing.assert_allclose(
        found[level][i, 0], packed[level][place], atol=1e-4
      )


def test_empty_histories_and_padding_are_finite(model, batch, catalogue):
  """Also the gradient, and also a row of nothing at all."""
  params = tiny.params(model)
  empty = batch.replace(
    items=batch.items.at[0].set(0),
    segment=batch.segment.at[0].set(0),
    targets=batch.targets.at[0].set(0),
    visible_until=batch.visible_until.at[0].set(0),
  )
  sums = _sums(model, empty, catalogue)
  values, grads = tiny.jit(
    lambda p: (sums(p), jax.grad(lambda q: jnp.sum(sums(q)))(p))
  )(params)
  assert np.isfinite(values).all()
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))


def test_context_dropout_hides_events_never_user_tokens(batch, catalogue):
  model = tiny.lazy_decoder(context_dropout=0.5)
  params = tiny.params(model)

  @tiny.jit
  def visible(key):
    rngs = None if key is None else {"dropout": key}
    context = model.apply(
      {"params": params}, batch, catalogue, method="encode", rngs=rngs
    )
    return context.bias[:, 0] > MASKED

  full = np.asarray(visible(None))
  kept = events = 0
  masks = set()
  for seed in range(20):
    mask = np.asarray(visible(jax.random.key(seed)))
    masks.add(mask.tobytes())
    for (row, target), (token, seen) in tiny.SEES.items():
      assert mask[row, target, token]
      kept += mask[row, target, seen].sum()
      events += len(seen)
    assert not (mask & ~full).any()
  assert len(masks) > 15
  assert 0.4 < kept / events < 0.6


def test_context_dropout_of_everything_leaves_the_user_token(batch, catalogue):
  model = tiny.lazy_decoder(context_dropout=1.0)
  params = tiny.params(model)
  found = oracle.logits_of(
    model, params, batch, catalogue, rngs={"dropout": jax.random.key(0)}
  )
  whole = oracle.logits_of(model, params, batch, catalogue)
  for (row, target), (token, events) in tiny.SEES.items():
    for logits, seen in ((found, []), (whole, events)):
      expected = oracle.forward(
        model, params, batch, catalogue, row, target, token, seen
      )
      for level in range(3):
        np.testing.assert_allclose(
          logits[level][row, target], expected[level], atol=2e-4, rtol=2e-4
        )


@pytest.mark.parametrize("rate", ["dropout", "context_dropout"])
def test_dropout_is_active_iff_a_key_is_given(batch, catalogue, rate):
  model = tiny.lazy_decoder(**{rate: 0.5})
  params = tiny.params(model)
  plain = oracle.logits_of(tiny.lazy_decoder(), params, batch, catalogue)
  silent = oracle.logits_of(model, params, batch, catalogue)
  assert all(map(np.array_equal, silent, plain))
  keys = [{"dropout": jax.random.key(i)} for i in (0, 0, 1)]
  one, same, other = (
    oracle.logits_of(model, params, batch, catalogue, rngs=key) for key in keys
  )
  assert all(map(np.array_equal, one, same))
  assert not np.allclose(one[0], other[0])
  assert not np.allclose(one[0], plain[0])
