"""The decoder-only model against loops in numpy, and its own promises."""

import flax
import jax
import pytest

from onerec_jax.models import registry
from tests import tiny
from tests.models import decoder_only_oracle as oracle
from tests.models import numpy_parts as parts


@pytest.mark.parametrize(
  "changes",
  [
    {"num_layers": 1},
    {"num_layers": 3, "item_embedding": False, "num_heads": 2},
    {"num_layers": 2},
    {
      "num_layers": 3,
      "moe": tiny.experts(dense_layers=1, shared_experts=1),
    },
    {"moe": tiny.experts(router="softmax", every=2)},
  ],
  ids=lambda changes: "-".join(f"{k}" for k in changes),
)
def test_equals_whole_sequences_in_numpy(changes):
  model = tiny.decoder_only(**changes)
  parts.assert_equals_library(
    model, oracle.forward, tiny.batch(), tiny.catalogue()
  )


def test_context_and_codes_share_their_weights():
  """4·d² + 3·d·F and two norms a block, nothing else."""
  model = tiny.decoder_only(num_layers=3)
  D, F = model.d_model, model.d_ff
  params = tiny.params(model)
  blocks = [name for name in params if name.startswith("blocks_")]
  assert sorted(blocks) == ["blocks_0", "blocks_1", "blocks_2"]
  matrices = 0
  for name in blocks:
    block = flax.traverse_util.flatten_dict(params[name], sep="/")
    assert {name: x.shape for name, x in block.items()} == {
      "norm/scale": (D,),
      "qkv/kernel": (D, 3 * D),
      "out/kernel": (D, D),
      "ffn_norm/scale": (D,),
      "ffn/wi/kernel": (D, 2 * F),
      "ffn/wo/kernel": (F, D),
    }
    matrices += sum(x.size for x in block.values() if x.ndim == 2)
  assert registry.block_parameters(model) == matrices


def test_a_blocks_experts_see_the_context_and_the_codes():
  """Loads of both: k for each real position and for each real code."""
  model = tiny.decoder_only(num_layers=3, moe=tiny.experts(dense_layers=1))
  batch = tiny.batch()
  _, sown = jax.jit(
    lambda p, b, c: model.apply({"params": p}, b, c, mutable=["loads"])
  )(tiny.params(model), batch, tiny.catalogue())
  found = {
    name: float(block["ffn"]["load"].sum())
    for name, block in sown["loads"].items()
  }
  codes = 2 * 3 * len(tiny.SEES)
  positions = 2 * int((batch.segment > 0).sum())
  # The last block runs the context no further than its keys and values.
  assert found == {"blocks_1": positions + codes, "blocks_2": codes}
