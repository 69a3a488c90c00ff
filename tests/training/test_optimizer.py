"""The learning-rate rule against V2's Table 5, schedules, decay mask."""

import numpy as np
import optax
import pytest

from onerec_jax import config as config_lib
from onerec_jax.training import optimizer

# V2 Table 5: nominal parameters → learning rate.
TABLE_5 = {
  1e8: 5.00e-4, 2e8: 3.54e-4, 5e8: 2.24e-4, 1e9: 1.58e-4,
  2e9: 1.12e-4, 4e9: 7.91e-5, 8e9: 5.59e-5,
}  # fmt: skip


@pytest.mark.parametrize(("parameters", "rate"), TABLE_5.items())
def test_rule_gives_the_papers_column(parameters, rate):
  found = optimizer.paper_learning_rate(int(parameters))
  assert abs(found - rate) < 0.005 * rate


def test_schedules():
  config = config_lib.OptimizerConfig(learning_rate=1.0, warmup_steps=10)
  cosine = optimizer.make_schedule(config, 1, 110)
  assert float(cosine(5)) == pytest.approx(0.5)
  assert float(cosine(10)) == pytest.approx(1.0)
  assert float(cosine(60)) == pytest.approx(0.5)
  assert float(cosine(110)) == pytest.approx(0.0, abs=1e-7)
  config.schedule = "constant"
  constant = optimizer.make_schedule(config, 1, 110)
  assert float(constant(5)) == pytest.approx(0.5)
  assert float(constant(110)) == pytest.approx(1.0)
  config.schedule = "linear"
  with pytest.raises(ValueError, match="linear"):
    optimizer.make_schedule(config, 1, 110)


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
@pytest.mark.parametrize(("warmup", "steps"), [(0, 5), (0, 1), (100, 1)])
def test_without_room_to_warm_up_the_first_step_has_the_peak(
  schedule, warmup, steps
):
  config = config_lib.OptimizerConfig(
    learning_rate=0.5, schedule=schedule, warmup_steps=warmup
  )
  found = optimizer.make_schedule(config, 1, steps)
  assert float(found(0)) == pytest.approx(0.5)


def test_only_matrices_decay_and_gradients_are_clipped():
  """With zero gradients AdamW moves a parameter by decay alone."""
  params = {
    "wi": {"kernel": np.ones((2, 2), np.float32)},
    "norm": {"scale": np.ones(2, np.float32)},
    "item": {"table": np.ones((3, 2), np.float32)},
  }
  config = config_lib.OptimizerConfig(weight_decay=0.5)
  tx = optimizer.make_optimizer(config, optax.constant_schedule(0.1))
  zeros = {k: {n: 0 * v for n, v in d.items()} for k, d in params.items()}
  updates, _ = tx.update(zeros, tx.init(params), params)
  np.testing.assert_allclose(updates["wi"]["kernel"], -0.05, rtol=1e-6)
  np.testing.assert_allclose(updates["norm"]["scale"], 0.0)
  np.testing.assert_allclose(updates["item"]["table"], 0.0)
