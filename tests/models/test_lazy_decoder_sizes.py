"""Parameters and multiply-adds of the lazy decoder."""

import flax
import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from onerec_jax import config as config_lib
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.models import registry

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
  config = config_lib.LazyDecoderConfig(
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
  blocks = flax.traverse_util.flatten_dict(shapes["layers"])
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


@pytest.mark.parametrize("changes", [{}, {"kv_layers": 2, "kv_split": 2}])
def test_flops_agree_with_the_compiler(changes):
  config = config_lib.LazyDecoderConfig(
    num_layers=2, d_model=256, num_heads=4, num_kv_heads=4, d_ff=512,
    dropout=0.0, **changes,
  )  # fmt: skip
  B, S, T, K = 2, 64, 16, 64
  model = registry.create(config, 100, (K,) * 3, {"a": 3}, {"b": 4})
  zeros = lambda n: jax.ShapeDtypeStruct((B, n), jnp.int32)
  batch = Batch(
    zeros(S), zeros(S), {"a": zeros(S)}, zeros(T), zeros(T), zeros(T)
  )
  catalogue = Catalogue(
    jax.ShapeDtypeStruct((101, 3), jnp.int32),
    {"b": jax.ShapeDtypeStruct((101,), jnp.int32)},
  )
  variables = jax.eval_shape(model.init, jax.random.key(0), batch, catalogue)
  compiled = jax.jit(model.apply).lower(variables, batch, catalogue).compile()
  counted = registry.forward_flops(model, B, S, T)
  assert compiled.cost_analysis()["flops"] == pytest.approx(counted, rel=0.03)
