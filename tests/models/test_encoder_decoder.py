"""The encoder-decoder against loops in numpy, and its own promises."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import model_configs
from onerec_jax.models import registry
from tests import tiny
from tests.models import encoder_decoder_oracle as oracle
from tests.models import numpy_parts as parts


@pytest.fixture(scope="module")
def batch():
  return tiny.batch()


@pytest.fixture(scope="module")
def catalogue():
  return tiny.catalogue()


@pytest.mark.parametrize(
  "changes",
  [
    {"encoder_layers": 2, "decoder_layers": 1, "feed_forward": "mlp"},
    {"causal_encoder": False, "item_embedding": False, "num_heads": 2},
    {"encoder_layers": 2, "causal_encoder": False, "feed_forward": "mlp"},
    # Block 0 is dense, blocks 1 and 3 have experts.
    {
      "decoder_layers": 4,
      "moe": tiny.experts(
        router="softmax", dense_layers=1, every=2, shared_experts=1
      ),
    },
    {"encoder_layers": 2, "moe_encoder": True, "moe": tiny.experts()},
  ],
  ids=lambda changes: "-".join(changes),
)
def test_equals_loops_in_numpy(batch, catalogue, changes):
  model = tiny.encoder_decoder(**changes)
  parts.assert_equals_library(model, oracle.forward, batch, catalogue)


def test_experts_are_where_the_config_puts_them():
  def with_experts(**changes):
    model = tiny.encoder_decoder(encoder_layers=3, decoder_layers=4, **changes)
    params = tiny.params(model)
    found = {"encoder": [], "decoder": []}
    for name in params:
      part, _, layer = name.partition("_")
      if layer.isdigit() and "router" in params[name]["ffn"]:
        found[part].append(int(layer))
    return found

  own = tiny.experts(dense_layers=1, every=2)
  assert with_experts() == {"encoder": [], "decoder": []}
  assert with_experts(moe=own) == {"encoder": [], "decoder": [1, 3]}
  found = with_experts(moe=own, moe_encoder=True)
  assert found == {"encoder": [1], "decoder": [1, 3]}


def test_every_decoder_block_projects_the_context_anew(batch, catalogue):
  model = tiny.encoder_decoder()
  params = tiny.params(model)
  context = jax.jit(
    lambda p: model.apply({"params": p}, batch, catalogue, method="encode")
  )(params)
  assert context.keys.shape == context.values.shape == (2, 2, 12, 4, 4)
  assert not np.allclose(context.keys[0], context.keys[1])
  assert not np.allclose(context.keys[0], context.values[0])


@pytest.mark.parametrize("causal_encoder", [True, False])
def test_hidden_events_are_hidden_in_the_encoder_too(
  batch, catalogue, causal_encoder
):
  """All events dropped, a target sees its user token as if it were alone."""
  model = tiny.encoder_decoder(
    context_dropout=1.0, causal_encoder=causal_encoder
  )

  def alone(model, params, batch, catalogue, row, target, token, events):
    items = batch.items
    for s in parts.segment_of(batch, row, token)[1:]:
      items = items.at[row, s].set(0)
    segment = jnp.where(items > 0, batch.segment, 0)
    segment = segment.at[row, token].set(batch.segment[row, token])
    alone = batch.replace(items=items, segment=segment)
    # The distance of the last event is no longer there; nor does a user
    # token's bias depend on it.
    return oracle.forward(
      model, params, alone, catalogue, row, target, token, []
    )

  rngs = {"dropout": jax.random.key(0)}
  parts.assert_equals_library(model, alone, batch, catalogue, rngs=rngs)


@pytest.mark.parametrize(
  ("layers", "d_model", "heads", "millions"),
  # V1 Table 1's 0.015B and 0.121B; half the layers are the encoder's.
  [(4, 128, 4, 0.66), (8, 1024, 8, 84)],
)
def test_sizes_of_the_report(layers, d_model, heads, millions):
  config = model_configs.EncoderDecoderConfig(
    encoder_layers=layers // 2,
    decoder_layers=layers // 2,
    d_model=d_model,
    num_heads=heads,
    d_ff=2 * d_model,
    feed_forward="mlp",
  )
  model = registry.create(config, 100, (8192,) * 3, {}, {})
  matrices = sum(tiny.block_matrices(model).values())
  assert matrices == registry.block_parameters(model)
  assert matrices == layers // 2 * (4 + 8 + 2 * 4) * d_model**2
  assert matrices / 1e6 == pytest.approx(millions, rel=0.01)


def test_active_parameters_of_the_reports_experts():
  """0.935B: 24 experts in the decoder, 2 of them a token, width 2,688."""
  experts = model_configs.MoEConfig(
    num_experts=24, experts_per_token=2, d_ff=2688, router="softmax"
  )
  config = model_configs.EncoderDecoderConfig(
    encoder_layers=4, decoder_layers=4, d_model=1024, num_heads=8,
    d_ff=2048, feed_forward="mlp", moe=experts,
  )  # fmt: skip
  model = registry.create(config, 100, (8192,) * 3, {}, {})
  sizes = tiny.block_matrices(model)
  matrices = sum(sizes.values())
  routers = sum(size for name, size in sizes.items() if "router" in name)
  expert = 3 * 1024 * 2688
  dense = (4 * 4 + 4 * 8) * 1024**2 + 4 * 2 * 1024 * 2048
  assert routers == 4 * 24 * 1024
  assert matrices == dense + routers + 4 * 24 * expert
  # Routers are met by every token and count.
  assert registry.block_parameters(model) == dense + routers + 4 * 2 * expert
