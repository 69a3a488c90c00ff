"""Parameters of the lazy decoder at the paper's sizes."""

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from onerec_jax import model_configs
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.models import registry
from tests import tiny

TABLE_5 = {
  # Nominal size: d_model, layers, heads, embed_dim; V2 Table 5.
  0.1e9: (640, 12, 10, 32),
  0.2e9: (896, 12, 14, 45),
  0.5e9: (1408, 14, 11, 70),
  1e9: (1792, 18, 14, 90),
  2e9: (2304, 22, 18, 115),
  4e9: (2944, 26, 23, 147),
  8e9: (3584, 34, 28, 179),
}


@pytest.mark.parametrize("nominal", TABLE_5)
def test_sizes_of_the_paper(nominal):
  d_model, num_layers, heads, embed_dim = TABLE_5[nominal]
  config = model_configs.LazyDecoderConfig(
    num_layers=num_layers,
    d_model=d_model,
    num_heads=heads,
    num_kv_heads=heads,
    d_ff=4 * d_model,
    sid_embed_dim=embed_dim,
    item_embedding=False,
    scan_layers=True,
  )
  model = registry.create(config, 100, (8192,) * 3, {}, {})
  zeros = jnp.zeros((1, 4), jnp.int32)
  batch = Batch(zeros, zeros, {}, zeros, zeros, zeros)
  catalogue = Catalogue(jnp.zeros((101, 3), jnp.int32), {})
  shapes = jax.eval_shape(
    lambda key: nn.unbox(model.init(key, batch, catalogue)["params"]),
    jax.random.key(0),
  )
  blocks = flax.traverse_util.flatten_dict(shapes["scanned"])
  matrices = sum(x.size for x in blocks.values() if x.ndim == 3)
  assert matrices == 18 * d_model**2 * num_layers
  assert matrices == registry.block_parameters(model)
  rest = sum(x.size for x in blocks.values() if x.ndim != 3)
  assert rest == 3 * d_model * num_layers  # norms
  # The paper names its models to a tenth of a billion below one billion.
  step = 1e8 if nominal < 1e9 else 1e9
  assert round(matrices / step) * step == nominal
  assert shapes["project"]["kernel"].shape == (
    3 * embed_dim + config.feature_embed_dim,
    d_model,
  )
  for level in range(3):
    assert shapes["codes"][f"heads_{level}"]["kernel"].shape == (
      d_model,
      8192,
    )


@pytest.mark.parametrize("scan_layers", [False, True])
def test_experts_of_the_paper(scan_layers):
  """4.07B in matrices of blocks, 0.4996B of them active, routers apart."""
  experts = model_configs.MoEConfig(
    num_experts=53,
    experts_per_token=3,
    shared_experts=1,
    d_ff=1408,
    dense_layers=2,
  )
  config = model_configs.LazyDecoderConfig(
    num_layers=14, d_model=1408, num_heads=11, num_kv_heads=11,
    d_ff=4 * 1408, moe=experts, scan_layers=scan_layers,
  )  # fmt: skip
  model = registry.create(config, 100, (8192,) * 3, {}, {})
  sizes = tiny.block_matrices(model)
  routers = sum(size for name, size in sizes.items() if "router" in name)
  matrices = sum(sizes.values()) - routers
  assert routers == 12 * 53 * 1408
  assert matrices == (14 * 6 + 2 * 12 + 12 * 54 * 3) * 1408**2
  assert matrices / 1e9 == pytest.approx(4.07, abs=0.005)
  # Of 53 routed experts 3: 50 are not met. Every token meets the routers.
  active = matrices - 12 * 50 * 3 * 1408**2
  assert active / 1e9 == pytest.approx(0.4996, abs=5e-5)
  assert registry.block_parameters(model) == active + routers
