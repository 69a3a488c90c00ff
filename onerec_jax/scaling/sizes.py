"""The sizes of the papers' models, as model configs.

OneRec-V2 (arXiv 2508.20900): lazy decoders of its Table 5, among them the one
with experts, and the encoder-decoders and naive decoders it compares them to.
OneRec-V1 (arXiv 2506.13695): the encoder-decoders of its Table 1.

None drops out anything, the loss is over all K codes (`constrained_softmax` is
ours), and the context is semantic IDs alone: a single pass over the data.
"""

import dataclasses
from typing import Any, NamedTuple

from onerec_jax import config as config_lib
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


EXPERTS = "MoE-4B"
"""V2's mixture of experts: 4.07B parameters in blocks, 0.4996B active."""
_EXPERTS_ON = "0.5B"


class ReportSize(NamedTuple):
  """A row of V1's Table 1; half the layers are the encoder's.

  INFERRED: where experts are used in both halves, every other block has them;
  their width is 2688 (⅔ · 4d to a multiple of 128), not the listed 2048. Only
  so are the two large sizes met.
  """

  nominal: float
  layers: int
  d_model: int
  heads: int
  moe: model_configs.MoEConfig = model_configs.MoEConfig()
  moe_encoder: bool = False


REPORT_SIZES = {
  "0.015B": ReportSize(0.015e9, 4, 128, 4),
  "0.121B": ReportSize(0.121e9, 8, 1024, 8),
  "0.935B": ReportSize(
    0.935e9, 8, 1024, 8, model_configs.MoEConfig(24, 2, d_ff=2688)
  ),
  "2.633B": ReportSize(
    2.633e9,
    24,
    1024,
    8,
    model_configs.MoEConfig(24, 4, d_ff=2688, every=2),
    True,
  ),
}
"""Name → row; the name is all parameters, most of them in unpublished tables
of ids: blocks hold .66M, 84M, .86B and 2.58B (`launch.paper_tables`)."""
REPORT_PATHWAYS = config_lib.PathwaysConfig(
  short=20, positive=256, lifelong=2000
)
"""What V1's encoders read, with the user token (V1 §2.2); the 128 queries and
two blocks of the Q-Former are the model config's defaults."""


def lazy_decoder(name: str) -> model_configs.LazyDecoderConfig:
  """The lazy decoder of a size.

  Args:
    name: a key of `SIZES`, or `EXPERTS`.

  Raises:
    ValueError: an unknown size.
  """
  if name == EXPERTS:
    return _with_experts(lazy_decoder(_EXPERTS_ON))
  shared = _shared(name)
  return model_configs.LazyDecoderConfig(
    num_layers=SIZES[name].num_layers,
    num_kv_heads=SIZES[name].num_heads,
    scan_layers=True,
    **shared,
  )


def _with_experts(
  config: model_configs.LazyDecoderConfig,
) -> model_configs.LazyDecoderConfig:
  """53 routed experts, 3 of them a token, and a shared one; V2 §3.4."""
  # Four of their width are the dense feed-forward's: as many active parameters.
  experts = model_configs.MoEConfig(
    num_experts=53,
    experts_per_token=3,
    shared_experts=1,
    d_ff=config.d_model,
    dense_layers=2,
  )
  return dataclasses.replace(config, moe=experts)


def encoder_decoder(
  name: str, encoder_layers: int = 0
) -> model_configs.EncoderDecoderConfig:
  """The encoder-decoder that V2 compares a lazy decoder to, or one of V1's.

  Args:
    name: a key of `SIZES`: width and blocks of V2's; or of `REPORT_SIZES`.
    encoder_layers: blocks of V2's that are the encoder's; 0: half of them.

  Raises:
    ValueError: an unknown size.
  """
  if name in REPORT_SIZES:
    return _report(REPORT_SIZES[name])
  shared = _shared(name)
  encoder_layers = encoder_layers or SIZES[name].num_layers // 2
  return model_configs.EncoderDecoderConfig(
    encoder_layers=encoder_layers,
    decoder_layers=SIZES[name].num_layers - encoder_layers,
    **shared,
  )


def decoder_only(name: str) -> model_configs.DecoderOnlyConfig:
  """The naive decoder that V2 compares a lazy decoder to.

  Args:
    name: a key of `SIZES`.

  Raises:
    ValueError: an unknown size.
  """
  shared = _shared(name)
  return model_configs.DecoderOnlyConfig(
    num_layers=SIZES[name].num_layers, **shared
  )


def _shared(name: str) -> dict[str, Any]:
  """The fields in which V2's three architectures of a size are equal."""
  if name not in SIZES:
    known = ", ".join([*SIZES, EXPERTS, *REPORT_SIZES])
    raise ValueError(f"no size {name!r} of this architecture; known: {known}")
  size = SIZES[name]
  return dict(
    d_model=size.d_model,
    num_heads=size.num_heads,
    d_ff=4 * size.d_model,
    sid_embed_dim=size.sid_embed_dim,
    item_embedding=False,
    dropout=0.0,
    constrained_softmax=False,
  )


def _report(size: ReportSize) -> model_configs.EncoderDecoderConfig:
  return model_configs.EncoderDecoderConfig(
    encoder_layers=size.layers // 2,
    decoder_layers=size.layers // 2,
    d_model=size.d_model,
    num_heads=size.heads,
    d_ff=2 * size.d_model,
    feed_forward="mlp",
    sid_embed_dim=size.d_model,
    item_embedding=False,
    dropout=0.0,
    constrained_softmax=False,
    moe=dataclasses.replace(size.moe),
    moe_encoder=size.moe_encoder,
  )
