"""The models' part of the config tree (config.py)."""

import dataclasses


@dataclasses.dataclass(unsafe_hash=True)
class MoEConfig:
  """Experts instead of feed-forward blocks (models/moe.py).

  Hashable, since modules hold a copy of it.
  """

  num_experts: int = 0
  """Routed experts; 0: every block is dense."""
  experts_per_token: int = 2
  shared_experts: int = 0
  """Experts that every token passes through."""
  d_ff: int = 256
  """Width of one expert's SwiGLU."""
  dense_layers: int = 0
  """The first so many blocks stay dense."""
  every: int = 1
  """Of the others, one block in so many has experts."""
  router: str = "sigmoid"
  """`sigmoid`: affinities of the chosen renormalised (DeepSeek-V3, INFERRED
  for V2); `softmax`: over all experts, as it is (OneRec)."""
  balance_rate: float = 1e-3
  """Step of the loss-free balancing bias; 0: no balancing (OneRec)."""


@dataclasses.dataclass
class GeneratorConfig:
  """What the generators of semantic IDs share; letters in dims.py."""

  d_model: int = 128
  num_heads: int = 4
  d_ff: int = 256
  """Feed-forward width; V2's sizes use 4 × d_model, V1's 2 × d_model."""
  sid_embedding: str = "own"
  """Where the context reads semantic IDs from: tables of its `own`; `shared`
  with the decoder (V1 Table 5); `none`: not at all."""
  sid_embed_dim: int = 32
  """Width of one level's own embedding in the context."""
  item_embedding: bool = True
  """Adds an embedding of the item id to its semantic-ID embedding."""
  item_embed_dim: int = 0
  """Width of the item-id embedding; 0: d_model."""
  item_table_rows: int = 0
  """Ids are hashed into so many rows, a multiple of 128; 0: a row an item."""
  feature_embed_dim: int = 16
  """Width of one feature's embedding; 0: the context is ids alone."""
  dropout: float = 0.2
  context_dropout: float = 0.0
  """Share of history events hidden from attention while training."""
  constrained_softmax: bool = True
  """Softmax over the codes that continue to an item, not over all K."""
  remat: str = "none"
  """`none`, `full` or `dots` (keep matrix products)."""
  compute_dtype: str = "auto"
  """`auto`: bfloat16 on accelerators, float32 on CPU."""
  attention: str = "auto"
  """Of targets to their context: `plain`, or `fused`, one kernel for TPUs that
  gives the same; `auto`: fused on TPUs."""
  lifelong_queries: int = 128
  """N_q: positions that the lifelong pathway's Q-Former makes of a history."""
  lifelong_layers: int = 2
  """N_l, blocks of that Q-Former."""
  moe: MoEConfig = dataclasses.field(default_factory=MoEConfig)


@dataclasses.dataclass
class LazyDecoderConfig(GeneratorConfig):
  """OneRec-V2 (models/lazy_decoder.py)."""

  system: str = "lazy_decoder"
  num_layers: int = 1
  num_kv_heads: int = 4
  """G_kv of the paper."""
  kv_layers: int = 1
  """L_kv: how many distinct key/value layers the context gives."""
  kv_split: int = 1
  """S_kv: 1, values are the keys; 2, values are their own chunk."""
  scan_layers: bool = False
  """One compiled block for all layers."""


@dataclasses.dataclass
class EncoderDecoderConfig(GeneratorConfig):
  """OneRec-V1 (models/encoder_decoder.py)."""

  system: str = "encoder_decoder"
  encoder_layers: int = 1
  decoder_layers: int = 1
  feed_forward: str = "swiglu"
  """Of dense blocks: `swiglu` (three matrices), or `mlp` (two, V1's sizes)."""
  causal_encoder: bool = True
  """A context position attends to earlier ones only. The papers' encoder sees
  both ways, which leaks where one context serves targets of several times;
  False therefore needs `pipeline.targets=request`."""
  moe_encoder: bool = False
  """Whether `moe` holds for the encoder too (V1's 2.633B)."""


def _session_experts() -> MoEConfig:
  """OneRec's: 24, two of them a token, gates as they are, no balancing."""
  return MoEConfig(num_experts=24, router="softmax", balance_rate=0.0)


@dataclasses.dataclass
class SessionDecoderConfig(EncoderDecoderConfig):
  """OneRec (models/session_decoder.py); `pipeline.targets` is `session`."""

  system: str = "session_decoder"
  session_items: int = 5
  """m, items of a session; 1: point-wise generation. Divides
  `pipeline.session_items`."""
  causal_encoder: bool = False
  moe: MoEConfig = dataclasses.field(default_factory=_session_experts)


@dataclasses.dataclass
class DecoderOnlyConfig(GeneratorConfig):
  """V2's naive decoder-only baseline (models/decoder_only.py)."""

  system: str = "decoder_only"
  num_layers: int = 1


@dataclasses.dataclass
class SASRecConfig:
  """The SASRec baseline (models/sasrec.py)."""

  system: str = "sasrec"
  num_layers: int = 2
  d_model: int = 64
  num_heads: int = 2
  d_ff: int = 256
  dropout: float = 0.3
  loss: str = "softmax"
  """`softmax`: cross-entropy over all items; `bce`: one sampled negative."""
  compute_dtype: str = "auto"


@dataclasses.dataclass
class TwoTowerConfig:
  """Retrieval by two towers (models/two_tower.py)."""

  system: str = "two_tower"
  d_model: int = 64
  num_heads: int = 2
  d_ff: int = 128
  dropout: float = 0.1
  temperature: float = 0.1
  """τ of the scores of unit vectors."""
  compute_dtype: str = "auto"


@dataclasses.dataclass
class RewardConfig:
  """What the reward models share (models/reward.py)."""

  d_model: int = 64
  num_heads: int = 2
  d_ff: int = 64
  """Width of feed-forwards and of each objective's tower."""
  num_layers: int = 2
  """Blocks of target attention."""
  sid_embed_dim: int = 16
  """Width of one semantic-ID level's embedding."""
  item_embed_dim: int = 0
  """Width of the item-id embedding; 0: d_model."""
  item_table_rows: int = 0
  """Ids are hashed into so many rows, a multiple of 128; 0: a row an item."""
  feature_embed_dim: int = 16
  dropout: float = 0.1
  context_dropout: float = 0.0
  """Share of history events hidden from attention while training."""
  lifelong_queries: int = 128
  """N_q: positions that the lifelong pathway's Q-Former makes of a history."""
  lifelong_layers: int = 2
  """N_l, blocks of that Q-Former."""
  compute_dtype: str = "auto"


@dataclasses.dataclass
class SessionRewardConfig(RewardConfig):
  """OneRec's reward model (models/session_reward.py).

  Needs `pipeline.targets=exposed` and `pipeline.labels`.
  """

  system: str = "session_reward"
  objectives: tuple[str, ...] = ("swt", "vtr", "wtr", "ltr")
  """Of session watch time, view, follow, like; those the data have."""
  session_size: int = 5
  """m, items of a session. Divides `pipeline.session_items`."""
  session_seconds: float = 120.0
  """Play time of a session at which its `swt` label is 1. Near the data's 90th
  percentile the label tells most sessions apart; far above, they are all near
  0, far below, all 1."""


@dataclasses.dataclass
class PScoreConfig(RewardConfig):
  """OneRec-V1's preference score (models/p_score.py).

  Needs `pipeline.labels`.
  """

  system: str = "p_score"
  objectives: tuple[str, ...] = (
    "click", "long_view", "like", "follow", "comment", "forward",
  )  # fmt: skip
  """Labels of the data (data/batch.py), a tower each."""
  weights: tuple[float, ...] = ()
  """w of each objective in the fused score's loss; empty: 1 for all."""


ModelConfig = GeneratorConfig | SASRecConfig | TwoTowerConfig | RewardConfig
SYSTEMS = {
  c.system: c
  for c in (
    LazyDecoderConfig,
    EncoderDecoderConfig,
    SessionDecoderConfig,
    DecoderOnlyConfig,
    SASRecConfig,
    TwoTowerConfig,
    SessionRewardConfig,
    PScoreConfig,
  )
}
"""`system` → its config."""
