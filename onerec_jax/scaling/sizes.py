"""The sizes of OneRec-V2's lazy decoder (arXiv 2508.20900, Table 5)."""

import dataclasses

from onerec_jax import model_configs


@dataclasses.dataclass(frozen=True)
class Size:
  """One row of the table.

  Attributes:
    d_model: D.
    num_layers: depth.
    num_heads: H; all of them are key/value heads too.
    sid_embed_dim: width of one level's embedding in the context.
  """

  d_model: int
  num_layers: int
  num_heads: int
  sid_embed_dim: int


SIZES = {
  # INFERRED: the paper trains 0.05B and leaves its row out of the table. This
  # one keeps the head width of its neighbours and the rule of their embedding
  # widths, round(d_model / 20): 18 · 512² · 11 = 51.9M.
  "0.05B": Size(512, 11, 8, 26),
  "0.1B": Size(640, 12, 10, 32),
  "0.2B": Size(896, 12, 14, 45),
  "0.5B": Size(1408, 14, 11, 70),
  "1B": Size(1792, 18, 14, 90),
  "2B": Size(2304, 22, 18, 115),
  "4B": Size(2944, 26, 23, 147),
  "8B": Size(3584, 34, 28, 179),
}
"""The paper's name, after parameters in blocks (18 · d² · layers) → shape."""


def lazy_decoder(name: str) -> model_configs.LazyDecoderConfig:
  """The model config of a size, with the paper's loss and no dropout.

  The loss is over all K codes (`constrained_softmax` is ours), the context is
  semantic IDs alone, and a single pass over the data needs no dropout.

  Args:
    name: a key of `SIZES`.

  Raises:
    ValueError: an unknown size.
  """
  if name not in SIZES:
    raise ValueError(f"no size {name!r}; known: {', '.join(SIZES)}")
  size = SIZES[name]
  return model_configs.LazyDecoderConfig(
    d_model=size.d_model,
    num_layers=size.num_layers,
    num_heads=size.num_heads,
    num_kv_heads=size.num_heads,
    d_ff=4 * size.d_model,
    sid_embed_dim=size.sid_embed_dim,
    item_embedding=False,
    dropout=0.0,
    constrained_softmax=False,
    scan_layers=True,
  )
