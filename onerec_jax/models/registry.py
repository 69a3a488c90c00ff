"""From a model config and the data's sizes to a model."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from onerec_jax import config as config_lib
from onerec_jax import model_configs
from onerec_jax.models import (
  context,
  decoder_only,
  encoder_decoder,
  fused_attention,
  layers,
  lazy_decoder,
  moe,
  p_score,
  reward,
  sasrec,
  session_decoder,
  session_reward,
  two_tower,
)

Model = (
  lazy_decoder.LazyDecoder
  | encoder_decoder.EncoderDecoder
  | session_decoder.SessionDecoder
  | decoder_only.DecoderOnly
  | sasrec.SASRec
  | two_tower.TwoTower
  | reward.RewardModel
)

_CLASSES = {
  model_configs.LazyDecoderConfig: lazy_decoder.LazyDecoder,
  model_configs.EncoderDecoderConfig: encoder_decoder.EncoderDecoder,
  model_configs.SessionDecoderConfig: session_decoder.SessionDecoder,
  model_configs.DecoderOnlyConfig: decoder_only.DecoderOnly,
  model_configs.SASRecConfig: sasrec.SASRec,
  model_configs.TwoTowerConfig: two_tower.TwoTower,
  model_configs.SessionRewardConfig: session_reward.SessionReward,
  model_configs.PScoreConfig: p_score.PScore,
}
_COUNTERS = {
  lazy_decoder.LazyDecoder: lazy_decoder,
  encoder_decoder.EncoderDecoder: encoder_decoder,
  session_decoder.SessionDecoder: session_decoder,
  decoder_only.DecoderOnly: decoder_only,
  sasrec.SASRec: sasrec,
  two_tower.TwoTower: two_tower,
  session_reward.SessionReward: session_reward,
  p_score.PScore: p_score,
}
"""Model → the module that counts its FLOPs and parameters."""


def compute_dtype(name: str) -> Any:
  """`auto`: bfloat16 on accelerators, float32 on CPU, where it is slower.

  Raises:
    ValueError: neither `auto` nor a floating dtype of JAX.
  """
  if name == "auto":
    return jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
  if name not in ("float32", "bfloat16"):
    raise ValueError(
      f"model.compute_dtype {name!r}: want auto, float32 or bfloat16"
    )
  return jnp.dtype(name)


def attention_kernel(name: str) -> str:
  """`auto`: the fused kernel where it is one, on TPUs.

  Raises:
    ValueError: neither `auto` nor a kind of attention.
  """
  if name == "auto":
    return "fused" if jax.default_backend() == "tpu" else "plain"
  _one_of("attention", name, fused_attention.CROSS_ATTENTION)
  return name


def create(
  config: model_configs.ModelConfig,
  num_items: int,
  codebook_sizes: tuple[int, ...],
  features: dict[str, int],
  item_features: dict[str, int],
  pathways: config_lib.PathwaysConfig | None = None,
) -> Model:
  """Builds the model a config names.

  Args:
    config: the model's part of the config.
    num_items: I.
    codebook_sizes: K of each level of the semantic IDs.
    features: event and user features of the data → number of values.
    item_features: likewise of the items.
    pathways: what rows hold; None: the plain history.

  Raises:
    ValueError: sizes that do not fit each other, named.
  """
  pathways = pathways or config_lib.PathwaysConfig()
  _check_names(features, item_features)
  if isinstance(config, model_configs.GeneratorConfig) and (
    config.feature_embed_dim == 0
  ):
    features, item_features = {}, {}
  _divides(config, "d_model", "num_heads")
  values = dict(
    vars(config),
    dtype=compute_dtype(config.compute_dtype),
    num_items=num_items,
    features=tuple(sorted(features.items())),
  )
  del values["system"], values["compute_dtype"]
  if needs_semantic_ids(config):
    _check_reader(config)
    values |= {
      "codebook_sizes": tuple(codebook_sizes),
      "item_features": tuple(sorted(item_features.items())),
      # Copies: the configs stay free to change.
      "pathways": dataclasses.replace(pathways),
    }
  elif pathways.on:
    raise ValueError(
      f"model.system={config.system} reads the plain history alone; leave "
      "pipeline.pathways at 0, or take a generator"
    )
  if isinstance(config, model_configs.TwoTowerConfig):
    _check_two_tower(config)
    values["item_features"] = tuple(sorted(item_features.items()))
  if isinstance(config, model_configs.GeneratorConfig):
    _check_generator(config)
    values |= {
      "attention": attention_kernel(config.attention),
      "moe": dataclasses.replace(config.moe),
    }
  if isinstance(config, model_configs.RewardConfig):
    _check_reward(config)
  return _CLASSES[type(config)](**values)


def _check_names(features: Iterable[str], item_features: Iterable[str]) -> None:
  """Raises ValueError where a feature of each kind has one name."""
  # The two share a name space of parameters with the user token's.
  names = [*features, *(f"item_{name}" for name in item_features), "user_token"]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise ValueError(
      f"two features are called {twice[0]!r}; rename the column and prepare "
      "the data again"
    )


def _check_two_tower(config: model_configs.TwoTowerConfig) -> None:
  """Raises ValueError for a temperature that scores cannot have."""
  if config.temperature <= 0:
    raise ValueError(f"model.temperature={config.temperature} must be above 0")


def _divides(config: model_configs.ModelConfig, whole: str, part: str) -> None:
  if getattr(config, part) < 1:
    raise ValueError(f"model.{part}={getattr(config, part)} must be at least 1")
  if getattr(config, whole) % getattr(config, part):
    raise ValueError(
      f"model.{whole}={getattr(config, whole)} is no multiple of "
      f"model.{part}={getattr(config, part)}"
    )


def _one_of(name: str, value: str, known: Iterable[str]) -> None:
  if value not in known:
    raise ValueError(f"model.{name}={value!r}: want one of {sorted(known)}")


def _check_reader(
  config: model_configs.GeneratorConfig | model_configs.RewardConfig,
) -> None:
  """Raises ValueError unless a user's context can be read."""
  if config.lifelong_queries < 1 or config.lifelong_layers < 1:
    raise ValueError(
      f"model.lifelong_queries={config.lifelong_queries} and model."
      f"lifelong_layers={config.lifelong_layers} must be at least 1"
    )
  if config.item_table_rows % layers.TABLE_MULTIPLE:
    raise ValueError(
      f"model.item_table_rows={config.item_table_rows} is no multiple of "
      f"{layers.TABLE_MULTIPLE}"
    )


def _check_generator(config: model_configs.GeneratorConfig) -> None:
  """Raises ValueError where sizes do not fit each other."""
  _one_of("remat", config.remat, layers.REMAT)
  _check_item_input(config)
  experts = config.moe
  _one_of("moe.router", experts.router, moe.ROUTERS)
  if experts.num_experts and not (
    0 < experts.experts_per_token <= experts.num_experts and experts.every > 0
  ):
    raise ValueError(
      f"model.moe.experts_per_token={experts.experts_per_token} must be in "
      f"[1, model.moe.num_experts={experts.num_experts}] and "
      f"model.moe.every={experts.every} above 0"
    )
  if isinstance(config, model_configs.EncoderDecoderConfig):
    _one_of("feed_forward", config.feed_forward, encoder_decoder.DENSE)
  if isinstance(config, model_configs.SessionDecoderConfig) and (
    config.session_items < 1
  ):
    raise ValueError(
      f"model.session_items={config.session_items} must be at least 1"
    )
  if not isinstance(config, model_configs.LazyDecoderConfig):
    return
  _divides(config, "num_heads", "num_kv_heads")
  layers_of_keys = range(1, config.num_layers + 1)
  if config.kv_split not in (1, 2) or config.kv_layers not in layers_of_keys:
    raise ValueError(
      f"model.kv_split={config.kv_split} must be 1 or 2 and "
      f"model.kv_layers={config.kv_layers} from 1 to model.num_layers="
      f"{config.num_layers}"
    )
  if config.scan_layers and experts.num_experts and experts.every > 1:
    raise ValueError(
      f"model.scan_layers needs blocks alike, not model.moe.every="
      f"{experts.every}"
    )
  dense = experts.num_experts and experts.dense_layers >= config.num_layers
  if config.scan_layers and dense:
    raise ValueError(
      f"model.moe.dense_layers={experts.dense_layers} leave none of "
      f"model.num_layers={config.num_layers} to model.scan_layers"
    )


def _check_item_input(config: model_configs.GeneratorConfig) -> None:
  """Raises ValueError unless events are read by something that fits."""
  _one_of("sid_embedding", config.sid_embedding, context.SID_EMBEDDINGS)
  if config.sid_embedding == "none" and not config.item_embedding:
    raise ValueError(
      "model.sid_embedding=none and model.item_embedding=False leave nothing "
      "of an event's item; set one of them"
    )


def _check_reward(config: model_configs.RewardConfig) -> None:
  """Raises ValueError unless objectives and what goes with them fit."""
  names = config.objectives
  if not names or len({*names}) < len(names):
    raise ValueError(
      f"model.objectives={names} must be one or more different names"
    )
  if isinstance(config, model_configs.SessionRewardConfig):
    for name in names:
      _one_of("objectives", name, session_reward.OBJECTIVES)
    if config.session_size < 1 or config.session_seconds <= 0:
      raise ValueError(
        f"model.session_size={config.session_size} must be at least 1 and "
        f"model.session_seconds={config.session_seconds} above 0"
      )
  if isinstance(config, model_configs.PScoreConfig):
    if config.weights and len(config.weights) != len(names):
      raise ValueError(
        f"model.weights={config.weights} are not one for each of "
        f"model.objectives={names}"
      )
    if p_score.FUSED in names:
      raise ValueError(
        f"model.objectives={names}: {p_score.FUSED!r} is the P-Score's own name"
      )


def needs_semantic_ids(config: model_configs.ModelConfig) -> bool:
  """Whether the model reads or generates codes."""
  return isinstance(
    config, model_configs.GeneratorConfig | model_configs.RewardConfig
  )


def balance_rate(config: model_configs.ModelConfig) -> float:
  """Step of the experts' balancing biases; 0 where there are no experts."""
  experts = getattr(config, "moe", None)
  return experts.balance_rate if experts else 0.0


def forward_flops(
  model: Model, rows: int, positions: int, targets: int
) -> float:
  """Multiply-adds ×2 of one forward pass over a batch."""
  return _COUNTERS[type(model)].forward_flops(model, rows, positions, targets)


def group_flops(model: Model, rows: int, positions: int, answers: int) -> float:
  """`forward_flops` of answers to each row that share its BOS.

  One of L positions of all answers but one (Generator.group_logits).
  """
  one, apart = (
    forward_flops(model, rows, positions, targets) for targets in (1, answers)
  )
  return apart - (apart - one) / len(model.codebook_sizes)


def block_parameters(model: Model) -> int:
  """Active parameters of the blocks' matrices, N of the learning-rate rule."""
  return _COUNTERS[type(model)].block_parameters(model)
