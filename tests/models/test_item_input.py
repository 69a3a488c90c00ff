"""Events read by id, by semantic IDs, both, or by the decoder's own tables."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from onerec_jax import model_configs
from onerec_jax.models import context, id_table, registry
from tests import tiny
from tests.models import (
  decoder_only_oracle,
  encoder_decoder_oracle,
  lazy_decoder_oracle,
)
from tests.models import numpy_parts as parts


@pytest.mark.parametrize(
  ("make", "oracle", "fields"),
  [
    (tiny.lazy_decoder, lazy_decoder_oracle, {"sid_embedding": "none"}),
    (
      tiny.lazy_decoder,
      lazy_decoder_oracle,
      {"sid_embedding": "shared", "item_embed_dim": 5},
    ),
    (
      tiny.encoder_decoder,
      encoder_decoder_oracle,
      {"sid_embedding": "shared", "item_embedding": False},
    ),
    (tiny.decoder_only, decoder_only_oracle, {"sid_embedding": "shared"}),
  ],
)
def test_equals_loops_in_numpy(make, oracle, fields):
  model = make(**fields)
  parts.assert_equals_library(
    model, oracle.forward, tiny.batch(), tiny.catalogue()
  )
  shapes = jax.tree.map(np.shape, tiny.params(model))
  assert shapes["project"]["kernel"][0] == context.width(model)
  if fields["sid_embedding"] == "shared":
    D = model.d_model
    tables = [shapes["codes"][f"tables_{n}"]["table"] for n in range(3)]
    assert tables == [(size, D) for size in tiny.CODEBOOK_SIZES]
    assert "codes_0" not in shapes["embedding"]


def test_hashed_ids_read_what_a_table_of_all_ids_would():
  """A row an item that holds the sum of the two rows it hashes to."""
  hashed = tiny.lazy_decoder(item_table_rows=128)
  params = jax.tree.map(np.asarray, tiny.params(hashed))
  table = params["embedding"]["item"]["table"]
  assert table.shape == (128, hashed.d_model)
  ids = jnp.arange(tiny.NUM_ITEMS + 1)
  rows = [np.asarray(id_table.hash_rows(ids, 128, f)) for f in (0, 1)]
  whole = np.zeros_like(table)
  whole[ids] = table[rows[0]] + table[rows[1]]
  plain = params | {
    "embedding": params["embedding"] | {"item": {"table": whole}}
  }
  batch, catalogue = tiny.batch(), tiny.catalogue()
  found = parts.logits_of(hashed, params, batch, catalogue)
  expected = parts.logits_of(tiny.lazy_decoder(), plain, batch, catalogue)
  for a, b in zip(found, expected):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("fields", "message"),
  [
    ({"sid_embedding": "both"}, "sid_embedding='both': want one of"),
    ({"sid_embedding": "none", "item_embedding": False}, "leave nothing"),
    ({"item_table_rows": 100}, "item_table_rows=100 is no multiple of 128"),
  ],
)
def test_what_does_not_fit_is_refused(fields, message):
  config = model_configs.LazyDecoderConfig(**fields)
  with pytest.raises(ValueError, match=message):
    registry.create(config, 10, (4, 4, 4), {}, {})
