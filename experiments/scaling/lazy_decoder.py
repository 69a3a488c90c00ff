r"""The sizes of OneRec-V2's lazy decoder, 0.05B to 8B, set up alike.

python -m launch.compile_tpu --topology=v5p:4x4x4 \
  --config=experiments/scaling/lazy_decoder.py:8B

bounds the training step's MFU on 64 v5p chips at 99% (docs/tpu.md has the
table), in two minutes on two cores. A slice of 256 chips wants a larger batch:
with --config.pipeline.batch_size=65536 --config.mesh.fsdp=64
--config.model.num_kv_heads=4 it is 87% on v6e:16x16. `MoE-4B` is the size with
experts, whose weights want many tokens: --config.pipeline.batch_size=65536
--config.model.num_kv_heads=1 bound it at 72% on v5p:4x4x4, against 21% as it
stands. `1B:id100M` reads events by item id too, hashed into a table of 100M
rows (docs/id_tables.md).
"""

import re

from onerec_jax import config as config_lib
from onerec_jax import model_configs
from onerec_jax.scaling import sizes


def get_config(arg: str = "0.05B") -> config_lib.Config:
  size, _, table = arg.partition(":")
  name = f"lazy_decoder_{arg}".replace(":", "_")
  c = of_model(name, sizes.lazy_decoder(size))
  if size == sizes.EXPERTS:  # Narrow, but the state of 4B parameters.
    c.mesh.fsdp = 32
  if table:
    _add_id_table(c, table)
  return c


def _add_id_table(c: config_lib.Config, table: str) -> None:
  """Item ids hashed into so many million rows, over all chips."""
  rows = re.fullmatch(r"id(\d+)M", table)
  if rows is None:
    raise ValueError(f"{table!r}: want a table of rows, as id100M")
  c.model.item_embedding = True
  c.model.item_embed_dim = 64
  c.model.item_table_rows = int(rows[1]) * 1_000_000
  c.optimizer.table_optimizer = "rowwise_adagrad"
  c.optimizer.table_learning_rate = 0.05
  c.mesh.data, c.mesh.fsdp = 1, -1


def of_model(
  name: str, model: model_configs.GeneratorConfig
) -> config_lib.Config:
  """What the papers' models have in common: data, batch and schedule."""
  c = config_lib.Config(name=name)
  c.prepare.split = "time"
  c.tokenizer.num_levels = 3
  c.tokenizer.num_codes = 8192
  c.pipeline.targets = "request"
  # With the user token 512: a 513th position would cost a tile of 128 more.
  c.pipeline.max_history = 511
  c.pipeline.row_positions = 512
  c.pipeline.row_targets = 5
  c.pipeline.batch_size = 8192
  c.model = model
  c.model.remat = "dots"
  # The context's width must divide over up to 64 chips along fsdp.
  c.model.feature_embed_dim = 16 + -(3 * c.model.sid_embed_dim + 16) % 64
  c.optimizer.schedule = "constant"
  # Below 1B a chip holds the whole state.
  c.mesh.fsdp = 32 if c.model.d_model >= 1792 else 1
  c.evaluation.beam_width = 512
  return c
