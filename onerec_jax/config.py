"""The config tree: plain mutable dataclasses, so that flags can override.

Every default of the project stands here and nowhere else. An experiment file
returns a `Config`; `--config.model.num_layers=4` changes one field, and an
unknown field is an error that names it.
"""

import dataclasses
import json
from typing import Any

from onerec_jax import files
from onerec_jax.alignment_config import AlignmentConfig
from onerec_jax.model_configs import (
  SYSTEMS,
  LazyDecoderConfig,
  ModelConfig,
)


@dataclasses.dataclass
class SimulationConfig:
  """The simulated world (onerec_jax/simulation)."""

  num_users: int = 1000
  num_items: int = 1000
  num_days: int = 7
  """Days simulated; new items are launched over days 1 … num_days − 1."""
  seed: int = 0
  num_topics: int = 25
  latent_size: int = 16
  """Width of interests and item latents."""
  slots: int = 5
  """Items shown to one request (a session in OneRec's words)."""
  requests_per_day: float = 5.0
  """Mean over users; each user has an own rate."""
  new_items: float = 0.3
  """Share of the items that are launched after day 0."""
  repeat_window: int = 256
  """Items among a user's last so many impressions are not shown again (at
  most half of the items there on day 0)."""
  affinity: float = 3.0
  """Utility of an item right on a user's lasting interest."""
  momentum: float = 6.0
  """Utility of an item right on what the user clicked just before."""
  momentum_decay: float = 0.5
  """Share of the momentum that one more request leaves."""
  drift: float = 0.1
  """Share of an interest's direction that is new each day; 0: none."""
  redundancy: float = 0.5
  """Utility lost per earlier item of the same topic in one request."""
  geo_radius_km: float = 6.0
  """Distance at which the odds of a click have fallen by √e."""
  temperature: float = 1.0
  """Of the logging policy's softmax."""
  popularity_weight: float = 0.5
  """Of log popularity in the logging policy's score."""
  estimate_noise: float = 0.3
  """Length of the logging policy's error on a unit interest."""


@dataclasses.dataclass
class PrepareConfig:
  """Raw files → tables → per-user examples in shards."""

  dataset: str = "movielens_100k"
  """A module of onerec_jax/data/datasets; `tables` reads the three below."""
  data_dir: str = ""
  """Where raw files lie; empty: $ONEREC_DATA, the user's cache, download."""
  events: str = ""
  """Dataset `tables`: CSV or Parquet of events."""
  items: str = ""
  """Dataset `tables`: CSV or Parquet of items; optional."""
  users: str = ""
  """Dataset `tables`: CSV or Parquet of users; optional."""
  where: str = ""
  """SQL condition on event columns; rows that fail it are left out."""
  min_user_events: int = 1
  """Users with fewer events are left out (counted in the manifest)."""
  min_item_events: int = 1
  """Events of items with fewer events are left out, before users are."""
  user_ids: bool = False
  """The user's id is a static feature (OneRec-V1 §2.2)."""
  positive: str = ""
  """SQL condition on event columns: which events are positive feedback; empty:
  by the feedback there is (data/marks.py)."""
  session: str = ""
  """SQL condition on aggregates of a request's events: which requests are
  sessions to learn from; empty: every request."""
  request_gap_ms: int = 0
  """Events without a request id that are at most so far apart are one request
  of the user; 0: each is a request of its own."""
  split: str = "leave_one_out"
  """`leave_one_out` or `time`."""
  validation_from_ms: int = 0
  """Split `time`: events from here on are validation; 0: the last 20%."""
  test_from_ms: int = 0
  """Split `time`: events from here on are test; 0: the last 10%."""
  on_bad_row: str = "error"
  """`error` or `skip` (the count goes into the manifest)."""
  num_shards: int = 8
  engine: str = "duckdb"
  """What runs the SQL: `duckdb`, or `spark` for a cluster; same shards."""
  simulation: SimulationConfig = dataclasses.field(
    default_factory=SimulationConfig
  )


@dataclasses.dataclass(unsafe_hash=True)
class PathwaysConfig:
  """Lengths of the user pathways (OneRec-V1 §2.2); 0 switches one off.

  With all of them off the context is the plain history: what came before, up to
  `pipeline.max_history`. Hashable, since modules hold a copy of it.
  """

  short: int = 0
  """The latest events; the report: 20."""
  positive: int = 0
  """The latest events marked positive (`prepare.positive`); the report: 256."""
  lifelong: int = 0
  """Representatives of the whole history; the report: 2,000."""

  @property
  def on(self) -> bool:
    """Whether the context is pathways and not the plain history."""
    return self.positions > 1

  @property
  def positions(self) -> int:
    """S of a row: the user token, then the pathways."""
    return 1 + self.short + self.positive + self.lifelong


@dataclasses.dataclass
class LifelongConfig:
  """Compression of lifelong histories (data/lifelong.py)."""

  every: int = 1000
  """Events of a user from one snapshot of the history to the next."""
  max_events: int = 100_000
  """The latest so many events are compressed."""
  max_items: int = 20
  """M: larger clusters are split."""
  iterations: int = 10
  """Of each k-means."""
  seed: int = 0


@dataclasses.dataclass
class PipelineConfig:
  """Shards → batches. Several users share one row (see data/batch.py)."""

  batch_size: int = 16
  """Rows of the global batch."""
  row_positions: int = 128
  """Context positions of a row (S)."""
  row_targets: int = 128
  """Targets of a row (T)."""
  max_history: int = 50
  """The most recent events a target sees."""
  targets: str = "next_item"
  """`next_item`: a target sees all before it; `request`: the targets of one
  request see what came before the request; `session`: so too, in groups of
  `session_items`, of the requests that `prepare.session` marks alone;
  `exposed`: as `session`, of every request, for reward models; `history`: as
  `request`, and what they see are targets too (V2 §3.1)."""
  session_items: int = 5
  """Targets `session` and `exposed`: divides `row_targets`."""
  order: str = "shuffled"
  """Of rows: `shuffled` anew each epoch, or `time`, a stream over all users."""
  imitate: str = "all"
  """Which targets the next-token loss is on: `all`; those marked `positive`
  (prepare.positive); or `rsft`, those of the requests that were played longest
  (data/rsft.py). Held-out evaluation asks for the same."""
  labels: bool = False
  """Batches carry what came of showing each target (see data/batch.py), for
  reward models and feedback."""
  pathways: PathwaysConfig = dataclasses.field(default_factory=PathwaysConfig)
  """Instead of the plain history; needs targets of requests. A row is then one
  request, whatever `row_positions` and `max_history` say."""


@dataclasses.dataclass
class QFormerConfig:
  """Tokenizer vectors `aligned` (OneRec-V1 §2.1); they are N · D wide."""

  num_queries: int = 4
  """N."""
  num_layers: int = 4
  """N_c."""
  d_model: int = 64
  """Width of a query; the paper: 512."""
  num_heads: int = 4
  d_ff: int = 128
  temperature: float = 0.07
  """τ of the contrastive loss."""
  reconstruction: float = 1.0
  """Weight of the text-reconstruction loss."""
  learning_rate: float = 5e-3
  """Peak; falls to zero over the steps."""
  num_steps: int = 600
  batch_size: int = 512
  """Pairs."""


@dataclasses.dataclass
class TokenizerConfig:
  """Item vectors → semantic IDs."""

  vectors: str = "content"
  """`content` (TF-IDF of text + SVD), `embedding` (a given matrix),
  `collaborative` (training events only), `fused` (first and third) or
  `aligned` (content, by a Q-Former trained on what behaves alike)."""
  embedding: str = ""
  """Vectors `embedding`: .npy [I, D] in item-table order; empty: the items
  table's `embedding` column."""
  vector_size: int = 128
  """Width of the content and of the collaborative part."""
  window: int = 5
  """Collaborative: co-occurrence within this many events."""
  num_levels: int = 3
  num_codes: int = 256
  balance: str = "capped"
  """`none` (OneRec-V1), `equal` (OneRec Algorithm 1) or `capped` (at most
  `slack` × the mean size)."""
  slack: float = 1.2
  iterations: int = 20
  collisions: str = "assign"
  """`assign` the last level without collisions, `extra` level, or `keep`."""
  seed: int = 0
  qformer: QFormerConfig = dataclasses.field(default_factory=QFormerConfig)
  """Read where `vectors` is `aligned`."""


@dataclasses.dataclass
class OptimizerConfig:
  """AdamW and its schedule."""

  learning_rate: float = 0.0
  """Peak; 0: the paper's rule 5e-4 · √(1e8 / block parameters)."""
  schedule: str = "cosine"
  """`cosine` to zero over the run, or `constant`; both after warm-up."""
  warmup_steps: int = 100
  b1: float = 0.9
  b2: float = 0.95
  weight_decay: float = 0.1
  """On matrices; not on norms, biases and embedding tables."""
  clip_norm: float = 1.0
  table_optimizer: str = "adamw"
  """Of item-id tables: `adamw`, as the rest, or `rowwise_adagrad`: one number a
  row and no momentum (training/optimizer.py)."""
  table_learning_rate: float = 0.0
  """Peak of item-id tables, on the same schedule; 0: as the rest."""


@dataclasses.dataclass
class MeshConfig:
  """Devices along each axis; −1: all that remain."""

  data: int = -1
  fsdp: int = 1
  expert: int = 1
  tensor: int = 1


@dataclasses.dataclass
class TrainingConfig:
  """The loop."""

  num_epochs: float = 10.0
  num_steps: int = 0
  """Overrides num_epochs when above 0."""
  microbatches: int = 1
  """The batch is split into this many pieces, gradients summed."""
  seed: int = 0
  log_every: int = 50
  validate_every: int = 0
  """Steps; 0: once an epoch."""
  checkpoint_every: int = 0
  """Steps; 0: with each validation."""
  keep_checkpoints: int = 2
  patience: int = 0
  """Stop after so many validations without a better one; 0: never."""
  on_nan: str = "error"
  """`error`, or `skip` the update and count it."""
  profile_steps: int = 0
  """Traces so many steps from step 10 into <run>/profile."""


@dataclasses.dataclass
class EvaluationConfig:
  """Full ranking; both columns, unfiltered and seen-filtered, always."""

  beam_width: int = 50
  batch_size: int = 256
  cutoffs: tuple[int, ...] = (5, 10)
  select: str = "ndcg@10"
  """Validation metric (unfiltered) that picks the best checkpoint."""
  validation_users: int = 3000
  """Users sampled for validation while training; 0: all."""


@dataclasses.dataclass
class Config:
  """One experiment."""

  name: str = "lazy_decoder"
  """Of the run, under <workdir>/models."""
  prepare: PrepareConfig = dataclasses.field(default_factory=PrepareConfig)
  pipeline: PipelineConfig = dataclasses.field(default_factory=PipelineConfig)
  lifelong: LifelongConfig = dataclasses.field(default_factory=LifelongConfig)
  """Read where pipeline.pathways.lifelong is above 0."""
  tokenizer: TokenizerConfig = dataclasses.field(
    default_factory=TokenizerConfig
  )
  model: ModelConfig = dataclasses.field(default_factory=LazyDecoderConfig)
  optimizer: OptimizerConfig = dataclasses.field(
    default_factory=OptimizerConfig
  )
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  training: TrainingConfig = dataclasses.field(default_factory=TrainingConfig)
  alignment: AlignmentConfig = dataclasses.field(
    default_factory=AlignmentConfig
  )
  """Read by launch.align."""
  evaluation: EvaluationConfig = dataclasses.field(
    default_factory=EvaluationConfig
  )


def _typed(field: dataclasses.Field, value: Any) -> Any:
  # 8 and 8.0 epochs are one setting: one value, one fingerprint.
  return float(value) if field.type is float else value


def to_dict(config: Any) -> dict[str, Any]:
  """A JSON-ready nested dict of any config dataclass."""
  values = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      values[field.name] = to_dict(value)
    else:
      values[field.name] = json.loads(json.dumps(_typed(field, value)))
  return values


def from_dict(values: dict[str, Any]) -> Config:
  """The inverse of `to_dict`.

  Raises:
    ValueError: an unknown field or system, named.
  """

  def build(default: Any, values: dict[str, Any], path: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(default)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
      raise ValueError(f"unknown config field(s) {unknown} in {path}")
    built = {}
    for name, value in values.items():
      if isinstance(value, dict):
        if name == "model":
          if value.get("system") not in SYSTEMS:
            raise ValueError(
              f"unknown system {value.get('system')!r} in {path}.model; "
              f"known: {sorted(SYSTEMS)}"
            )
          value = build(SYSTEMS[value["system"]](), value, f"{path}.model")
        else:
          value = build(getattr(default, name), value, f"{path}.{name}")
      elif isinstance(value, list):
        value = tuple(value)
      built[name] = _typed(fields[name], value)
    return dataclasses.replace(default, **built)

  return build(Config(), values, "config")


def fingerprint(config: Any) -> str:
  """Twelve hex digits that name a config."""
  return files.fingerprint(to_dict(config))


def differences(old: Any, new: Any, path: str) -> str:
  """What changed between two dicts of configs under `path`, in five fields."""
  return "; ".join(_changes(old, new, f".{path}" if path else "")[:5])


def _changes(old: Any, new: Any, path: str) -> list[str]:
  if isinstance(old, dict) and isinstance(new, dict):
    return [
      line
      for key in sorted({*old, *new})
      for line in _changes(old.get(key), new.get(key), f"{path}.{key}")
    ]
  return [] if old == new else [f"{path[1:]}: {old!r} → {new!r}"]
