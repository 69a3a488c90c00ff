"""From a model config and the data's sizes to a model."""

from typing import Any

import jax
import jax.numpy as jnp

from onerec_jax import config as config_lib
from onerec_jax.models import layers, lazy_decoder, sasrec

Model = lazy_decoder.LazyDecoder | sasrec.SASRec


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


def create(
  config: config_lib.LazyDecoderConfig | config_lib.SASRecConfig,
  num_items: int,
  codebook_sizes: tuple[int, ...],
  features: dict[str, int],
  item_features: dict[str, int],
) -> Model:
  """Builds the model a config names.

  Args:
    config: the model's part of the config.
    num_items: I.
    codebook_sizes: K of each level of the semantic IDs.
    features: event and user features of the data → number of values.
    item_features: likewise of the items.

  Raises:
    ValueError: sizes that do not fit each other, named.
  """
  if config.d_model % config.num_heads:
    raise ValueError(
      f"model.d_model={config.d_model} is no multiple of "
      f"model.num_heads={config.num_heads}"
    )
  # The two share a name space of parameters with the user token's.
  names = [*features, *(f"item_{name}" for name in item_features), "user_token"]
  twice = sorted({name for name in names if names.count(name) > 1})
  if twice:
    raise ValueError(
      f"two features are called {twice[0]!r}; rename the column and prepare "
      "the data again"
    )
  feature_sizes = tuple(sorted(features.items()))
  dtype = compute_dtype(config.compute_dtype)
  values = dict(vars(config), dtype=dtype)
  del values["system"], values["compute_dtype"]
  if isinstance(config, config_lib.SASRecConfig):
    return sasrec.SASRec(num_items=num_items, features=feature_sizes, **values)
  if config.num_heads % config.num_kv_heads:
    raise ValueError(
      f"model.num_heads={config.num_heads} is no multiple of "
      f"model.num_kv_heads={config.num_kv_heads}"
    )
  if config.kv_split not in (1, 2) or config.kv_layers > config.num_layers:
    raise ValueError(
      f"model.kv_split={config.kv_split} must be 1 or 2 and "
      f"model.kv_layers={config.kv_layers} at most model.num_layers="
      f"{config.num_layers}"
    )
  if config.remat not in layers.REMAT:
    raise ValueError(
      f"model.remat={config.remat!r}: want one of {list(layers.REMAT)}"
    )
  return lazy_decoder.LazyDecoder(
    codebook_sizes=tuple(codebook_sizes),
    num_items=num_items,
    features=feature_sizes,
    item_features=tuple(sorted(item_features.items())),
    **values,
  )


def needs_semantic_ids(
  config: config_lib.LazyDecoderConfig | config_lib.SASRecConfig,
) -> bool:
  """Whether the model generates codes."""
  return isinstance(config, config_lib.LazyDecoderConfig)


def forward_flops(
  model: Model, rows: int, positions: int, targets: int
) -> float:
  """Multiply-adds ×2 of one forward pass over a batch."""
  if isinstance(model, sasrec.SASRec):
    return sasrec.forward_flops(model, rows, positions, targets)
  return lazy_decoder.forward_flops(model, rows, positions, targets)


def block_parameters(model: Model) -> int:
  """Parameters of the blocks' matrices, the N of the learning-rate rule."""
  if isinstance(model, sasrec.SASRec):
    return model.num_layers * (
      4 * model.d_model**2 + 3 * model.d_model * model.d_ff
    )
  return lazy_decoder.block_parameters(
    model.d_model, model.d_ff, model.num_layers
  )
