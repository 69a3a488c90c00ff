"""The lazy decoder against loops in numpy, and its promises one by one."""

import flax
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax.models import lazy_decoder
from tests import tiny
from tests.models import lazy_decoder_oracle as oracle
from tests.models import numpy_parts as parts

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
  parts.assert_equals_library(model, oracle.forward, batch, catalogue)


def test_experts_equal_loops_in_numpy(batch, catalogue):
  """Block 0 is dense, blocks 1 and 3 have experts."""
  experts = tiny.experts(dense_layers=1, every=2, shared_experts=1)
  model = tiny.lazy_decoder(num_layers=4, moe=experts)
  params = tiny.params(model)
  has_experts = ["router" in params[f"layers_{i}"]["ffn"] for i in range(4)]
  assert has_experts == [False, True, False, True]
  parts.assert_equals_library(model, oracle.forward, batch, catalogue)


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
  context = jax.jit(
    lambda p: model.apply({"params": p}, batch, catalogue, method="encode")
  )(params)
  assert context.keys.shape == (1, 2, 12, 2, 4)
  keys, values = context.layer(0)
  assert np.array_equal(keys, values) == (kv_split == 1)
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
  before = parts.logits_of(model, params, batch, catalogue)
  for level, size in enumerate(tiny.CODEBOOK_SIZES):
    own = params["codes"]
    assert own[f"heads_{level}"]["kernel"].shape == (model.d_model, size)
    for name in (f"heads_{level}", f"norms_{level}"):
      changed = jax.tree.map(lambda x: -2 * x, own[name])
      changed = {**params, "codes": {**own, name: changed}}
      after = parts.logits_of(model, changed, batch, catalogue)
      same = [np.array_equal(a, b) for a, b in zip(after, before)]
      assert same == [other != level for other in range(3)], name


def test_no_context_position_attends_another(model, batch, catalogue):
  """A position's keys and values change only with its own event."""
  params = tiny.params(model)
  encode = jax.jit(
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
  packed = parts.logits_of(model, params, batch, catalogue)
  alone, places = tiny.separate(batch)
  found = parts.logits_of(model, params, alone, catalogue)
  for level in range(3):
    for i, place in enumerate(places):
      np.testing.assert_allclose(
        found[level][i, 0], packed[level][place], atol=1e-4
      )


def test_context_dropout_hides_events_never_user_tokens(batch, catalogue):
  model = tiny.lazy_decoder(context_dropout=0.5)
  params = tiny.params(model)

  @jax.jit
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

  def token_alone(*arguments):
    return oracle.forward(*arguments[:-1], [])

  rngs = {"dropout": jax.random.key(0)}
  parts.assert_equals_library(model, token_alone, batch, catalogue, rngs=rngs)
  parts.assert_equals_library(model, oracle.forward, batch, catalogue)
