"""From a config to a model."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from onerec_jax import model_configs
from onerec_jax.models import (
  decoder_only,
  encoder_decoder,
  lazy_decoder,
  registry,
  sasrec,
  session_decoder,
)
from tests import tiny

KINDS = [
  (model_configs.LazyDecoderConfig, lazy_decoder.LazyDecoder),
  (model_configs.EncoderDecoderConfig, encoder_decoder.EncoderDecoder),
  (model_configs.SessionDecoderConfig, session_decoder.SessionDecoder),
  (model_configs.DecoderOnlyConfig, decoder_only.DecoderOnly),
  (model_configs.SASRecConfig, sasrec.SASRec),
]


@pytest.mark.parametrize(("cls", "kind"), KINDS)
def test_every_field_of_the_config_reaches_the_model(cls, kind):
  config = cls()
  for field in dataclasses.fields(config):
    # Away from the default, so that a dropped field shows.
    value = getattr(config, field.name)
    if isinstance(value, bool):
      setattr(config, field.name, not value)
    elif isinstance(value, float):
      setattr(config, field.name, value + 0.0625)
    elif field.name == "attention":
      config.attention = "fused"
  model = registry.create(config, 10, (4, 5), {"b": 2, "a": 3}, {"c": 4})
  assert type(model) is kind
  assert model.num_items == 10
  assert model.features == (("a", 3), ("b", 2))
  for field in dataclasses.fields(config):
    if field.name not in ("system", "compute_dtype"):
      assert getattr(model, field.name) == getattr(config, field.name)
  generative = kind is not sasrec.SASRec
  assert registry.needs_semantic_ids(config) == generative
  if generative:
    assert model.codebook_sizes == (4, 5)
    assert model.item_features == (("c", 4),)
  hash(model)  # a static argument of jit


@pytest.mark.parametrize("cls", [cls for cls, _ in KINDS[:-1]])
def test_a_config_that_changes_leaves_its_model_alone(cls):
  config = cls()
  config.moe.num_experts, config.moe.router = 8, "sigmoid"
  make = lambda: registry.create(config, 10, (4, 5), {}, {})
  model, twin = make(), make()
  before = hash(model)
  config.moe.num_experts, config.moe.router = 16, "softmax"
  assert (model.moe.num_experts, model.moe.router) == (8, "sigmoid")
  assert hash(model) == before
  assert model == twin
  assert model != make()


def _moe(**changes):
  return {"moe": model_configs.MoEConfig(**{"num_experts": 4, **changes})}


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"d_model": 10, "num_heads": 4}, "d_model=10.*num_heads=4"),
    ({"num_heads": 4, "num_kv_heads": 3}, "num_heads=4.*num_kv_heads=3"),
    ({"kv_split": 3}, "kv_split=3"),
    ({"kv_split": 0}, "kv_split=0"),
    ({"num_layers": 2, "kv_layers": 3}, "kv_layers=3.*num_layers=\n?2"),
    ({"remat": "some"}, "remat='some'"),
    ({"compute_dtype": "float16"}, "compute_dtype 'float16'"),
    (
      {"scan_layers": True, **_moe(every=2)},
      r"scan_layers.*model\.moe\.every=2",
    ),
    (
      {"scan_layers": True, "num_layers": 2} | _moe(every=1, dense_layers=2),
      r"dense_layers=2 leave none of model\.num_layers=2",
    ),
    ({"kv_layers": 0}, r"kv_layers=0 from 1 to"),
    ({"num_heads": 0}, r"num_heads=0 must be at least 1"),
  ],
)
def test_sizes_that_do_not_fit_are_named(changes, message):
  config = model_configs.LazyDecoderConfig(**changes)
  with pytest.raises(ValueError, match=message):
    registry.create(config, 10, (4, 4), {}, {})


@pytest.mark.parametrize("cls", [cls for cls, _ in KINDS[:-1]])
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    (
      _moe(router="top"),
      r"model\.moe\.router='top'.*'sigmoid', 'softmax'",
    ),
    (
      _moe(experts_per_token=5),
      r"model\.moe\.experts_per_token=5.*model\.moe\.num_experts=4",
    ),
    (_moe(experts_per_token=0), r"model\.moe\.experts_per_token=0"),
    (_moe(every=0), r"model\.moe\.every=0"),
    ({"num_heads": 3}, r"d_model=128.*num_heads=3"),
    ({"remat": "some"}, "remat='some'.*'dots', 'full', 'none'"),
  ],
)
def test_what_generators_share_is_checked_in_all(cls, changes, message):
  with pytest.raises(ValueError, match=message):
    registry.create(cls(**changes), 10, (4, 4), {}, {})


def test_a_session_has_items():
  config = model_configs.SessionDecoderConfig(session_items=0)
  with pytest.raises(ValueError, match=r"model\.session_items=0"):
    registry.create(config, 10, (4, 4), {}, {})


def test_feed_forwards_are_named():
  config = model_configs.EncoderDecoderConfig(feed_forward="relu")
  with pytest.raises(
    ValueError, match=r"model\.feed_forward='relu'.*'mlp', 'swiglu'"
  ):
    registry.create(config, 10, (4, 4), {}, {})


def test_ids_alone():
  """No width for features: the model of data that have none."""
  ids = registry.create(
    model_configs.LazyDecoderConfig(feature_embed_dim=0),
    tiny.NUM_ITEMS, tiny.CODEBOOK_SIZES, {"click": 3}, {"category": 5},
  )  # fmt: skip
  assert (ids.features, ids.item_features) == ((), ())
  params = jax.eval_shape(
    lambda *args: nn.unbox(ids.init(*args)["params"]),
    jax.random.key(0), tiny.batch(), tiny.catalogue(),
  )  # fmt: skip
  # A checkpoint holds no arrays without entries.
  assert all(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("name", ["item_category", "user_token"])
def test_a_feature_name_that_is_taken_is_named(name):
  config = model_configs.LazyDecoderConfig()
  with pytest.raises(ValueError, match=name):
    registry.create(config, 10, (4, 4), {name: 3}, {"category": 5})


def test_compute_dtype():
  expected = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  assert registry.compute_dtype("auto") == expected
  assert registry.compute_dtype("bfloat16") == jnp.bfloat16
  assert registry.compute_dtype("float32") == jnp.float32


def test_block_parameters_of_sasrec():
  config = model_configs.SASRecConfig(
    num_layers=3, d_model=8, num_heads=2, d_ff=5
  )
  model = registry.create(config, 10, (), {}, {})
  # q, k, v, out: 4 · 8²; SwiGLU: 3 · 8 · 5.
  assert registry.block_parameters(model) == 3 * (256 + 120)
