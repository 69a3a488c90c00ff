"""Experts in the lazy decoder and V1's encoder-decoder, loads to step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import traverse_util

from onerec_jax import config as config_lib
from onerec_jax import model_configs
from onerec_jax.models import registry
from onerec_jax.training import losses, optimizer, state, step
from tests import tiny

RATE = 0.0625
CHANGES = {"constrained_softmax": False, "moe": tiny.experts()}
MODELS = {
  # Two scanned blocks; one of the encoder and one of the decoder.
  "lazy_decoder": lambda: tiny.lazy_decoder(scan_layers=True, **CHANGES),
  "encoder_decoder": lambda: tiny.encoder_decoder(
    decoder_layers=1, causal_encoder=False, feed_forward="mlp",
    moe_encoder=True, **CHANGES,
  ),
}  # fmt: skip
CODES = len(tiny.CODEBOOK_SIZES) * len(tiny.SEES)
EVENTS = int((tiny.batch().segment > 0).sum())
TOKENS = {
  "lazy_decoder": {"scanned/block": [CODES, CODES]},
  "encoder_decoder": {"encoder_0": EVENTS, "decoder_0": CODES},
}
"""Real tokens that each block, or each of a stack, routes to its experts."""


@pytest.fixture(scope="module", params=MODELS)
def name(request):
  return request.param


@pytest.fixture(scope="module")
def model(name):
  return MODELS[name]()


def _of_experts(tree, *names):
  """Block → numpy array [E], of a stack [layers, E], from its experts."""
  return {
    "/".join(path[: -len(names) - 1]): np.asarray(x)
    for path, x in traverse_util.flatten_dict(tree).items()
    if path[-len(names) :] == names
  }


@pytest.fixture(scope="module")
def loads(model):
  """Of the forward pass alone."""
  _, sown = jax.jit(
    lambda p, b, c: model.apply({"params": p}, b, c, mutable=["loads"])
  )(tiny.params(model), tiny.batch(), tiny.catalogue())
  return _of_experts(sown["loads"], "load")


@pytest.fixture(scope="module")
def stepped(model):
  """Microbatches → (parameters, sums) after one step."""
  config = config_lib.OptimizerConfig(
    learning_rate=1e-2, schedule="constant", warmup_steps=0, weight_decay=0.1
  )
  schedule = optimizer.make_schedule(config, 1, 10)
  params, zero = tiny.params(model), jnp.zeros((), jnp.int32)
  optimizers = {
    1: optimizer.make_optimizer(config, schedule),
    2: optax.sgd(0.1),  # as good as any here, and quick to compile
  }

  @jax.jit
  def run(params):
    return {
      microbatches: step.train_step(
        state.TrainState(zero, params, tx.init(params), zero),
        tiny.batch(), tiny.catalogue(), None,
        loss_fn=losses.make_loss(model), tx=tx, seed=0,
        microbatches=microbatches, balance_rate=RATE,
      )
      for microbatches, tx in optimizers.items()
    }  # fmt: skip

  return {n: (new.params, sums) for n, (new, sums) in run(params).items()}


def test_every_real_token_is_a_load(name, loads):
  """k experts for each code of each target, and event; padding is none."""
  k = 2
  found = {block: x.sum(axis=-1).tolist() for block, x in loads.items()}
  assert found == {
    block: (k * np.asarray(tokens)).tolist()
    for block, tokens in TOKENS[name].items()
  }
  # Blocks choose for themselves.
  rows = np.concatenate([x.reshape(-1, 4) for x in loads.values()])
  assert len(np.unique(rows, axis=0)) == len(rows)


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_moves_the_biases_by_the_rate_alone(
  model, loads, stepped, microbatches
):
  """Towards the mean of the whole batch's loads, whatever its pieces.

  Exactly so: no gradient and no weight decay moves them.
  """
  before = tiny.params(model)
  after, sums = stepped[microbatches]
  biases = [_of_experts(p, "balance_bias") for p in (before, after)]
  routers = [_of_experts(p, "router", "kernel") for p in (before, after)]
  assert biases[0].keys() == loads.keys() == routers[0].keys()
  largest = 0.0
  for block, load in loads.items():
    mean = load.mean(axis=-1, keepdims=True)
    assert (load > mean).any(axis=-1).all()
    expected = biases[0][block] + np.float32(RATE) * np.sign(mean - load)
    np.testing.assert_array_equal(biases[1][block], expected)
    largest = max(largest, (load / mean).max())
    # Whereas all else learns, the router too.
    assert not np.array_equal(routers[0][block], routers[1][block])
  assert "loads" not in sums
  assert float(sums["max_expert_load"]) == pytest.approx(largest, rel=1e-6)


def test_a_dense_model_has_no_loads():
  model = tiny.lazy_decoder(num_layers=1, constrained_softmax=False)
  sums = jax.eval_shape(
    losses.make_loss(model), tiny.params(model), tiny.batch(),
    tiny.catalogue(), None, None,
  )  # fmt: skip
  assert set(sums) == {
    "loss", "count", "loss_level_1", "loss_level_2", "loss_level_3"
  }  # fmt: skip


def test_the_rate_is_the_configs():
  config = model_configs.LazyDecoderConfig()
  config.moe.balance_rate = 0.25
  assert registry.balance_rate(config) == 0.25
  assert registry.balance_rate(model_configs.SASRecConfig()) == 0.0
