"""Experts in the lazy decoder, from the loads to the training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from onerec_jax import config as config_lib
from onerec_jax import model_configs
from onerec_jax.models import registry
from onerec_jax.training import losses, optimizer, state, step
from tests import tiny

RATE = 0.0625


@pytest.fixture(scope="module")
def model():
  """Two scanned blocks, both of experts."""
  return tiny.lazy_decoder(
    scan_layers=True, constrained_softmax=False, moe=tiny.experts()
  )


@pytest.fixture(scope="module")
def loads(model):
  """[MoE layers, E] of the forward pass alone."""
  _, sown = jax.jit(
    lambda p, b, c: model.apply({"params": p}, b, c, mutable=["loads"])
  )(tiny.params(model), tiny.batch(), tiny.catalogue())
  (found,) = jax.tree.leaves(sown["loads"])
  return np.asarray(found)


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


def _biases(params):
  return np.asarray(params["scanned"]["block"]["ffn"]["balance_bias"])


def test_every_real_code_is_a_load(loads):
  """k experts for each of the L codes of each target; padding is none."""
  assert loads.shape == (2, 4)
  k, L = 2, len(tiny.CODEBOOK_SIZES)
  assert loads.sum(axis=1).tolist() == [k * L * len(tiny.SEES)] * 2
  assert not np.array_equal(loads[0], loads[1])


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_step_moves_the_biases_by_the_rate_alone(
  model, loads, stepped, microbatches
):
  """Towards the mean of the whole batch's loads, whatever its pieces.

  Exactly so: no gradient and no weight decay moves them.
  """
  before = tiny.params(model)
  after, sums = stepped[microbatches]
  mean = loads.mean(axis=1, keepdims=True)
  assert (loads > mean).any(axis=1).all()
  expected = _biases(before) + np.float32(RATE) * np.sign(mean - loads)
  np.testing.assert_array_equal(_biases(after), expected)
  assert "loads" not in sums
  found = float(sums["max_expert_load"])
  assert found == pytest.approx((loads / mean).max(), rel=1e-6)
  # Whereas all else learns, the router too.
  router = [
    p["scanned"]["block"]["ffn"]["router"]["kernel"] for p in (before, after)
  ]
  assert not np.array_equal(*router)


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
