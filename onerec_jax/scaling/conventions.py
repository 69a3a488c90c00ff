"""How the papers count parameters, FLOPs and activations.

One function a convention: it says what it counts and what it leaves out. The
papers do not use one throughout, so paper_tables.py says which reproduces
which table. Beside them stand the counts of our own models
(models/registry.py): every matrix product, attention scores included.

All FLOPs are of one training sample, a target item: forward and backward
(three times the forward pass), six for each parameter a token passes. Targets
impressed together share their context, so a sample pays for a fifth of it.
Sections, tables and appendices named are those of OneRec-V2 (arXiv
2508.20900) and of the OneRec technical report (V1, arXiv 2506.13695).
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import linen as nn

from onerec_jax import config as config_lib
from onerec_jax import model_configs
from onerec_jax.data import batch as batch_lib
from onerec_jax.models import registry
from onerec_jax.scaling import sizes
from onerec_jax.training import state

TARGETS = 5
"""Targets that share one context."""
BATCH = 512
"""Targets of the batch whose activations and keys the paper reports."""
POSITIONS = 512
"""Context positions of the paper's experiments."""
LEVELS = 3
CODES = 8192


def nominal(name: str) -> float:
  """The parameters a size of V2's Table 5 is named after: "0.1B" → 1e8."""
  return 1e9 * float(name.removesuffix("B"))


# --- V2 Table 1: round numbers of parameters --------------------------------


def round_encoder_decoder(
  parameters: float, positions: int
) -> tuple[float, float]:
  """FLOPs of (encoding, decoding), half the parameters in the encoder.

  Every encoder parameter meets a fifth of the context; so does the tenth of
  the decoder that projects its keys and values; the rest meets the codes. No
  embeddings, head or attention scores (V2 appendix B).
  """
  half = parameters / 2
  context = positions / TARGETS
  return 6 * (half + 0.1 * half) * context, 6 * 0.9 * half * LEVELS


def round_decoder_only(
  parameters: float, positions: int
) -> tuple[float, float]:
  """FLOPs of (encoding, decoding) where all parameters meet both.

  No embeddings, head or attention scores (V2 appendix B).
  """
  return 6 * parameters * positions / TARGETS, 6 * parameters * LEVELS


def round_lazy(parameters: float) -> float:
  """FLOPs of a lazy decoder whose context is free: all in decoding."""
  return 6 * parameters * LEVELS


# --- V2 Tables 2-4 ----------------------------------------------------------


def _head(size: sizes.Size) -> int:
  return LEVELS * CODES * size.d_model


def encoder_decoder_flops(name: str, encoder_layers: int) -> float:
  """FLOPs of the encoder-decoder rows of Table 2, from the shapes.

  An encoder block has 16·d² parameters and meets a fifth of the context; a
  decoder block has 18·d² and meets the codes; a head a level. Neither the
  cross-attention's projection of keys and values nor any score is in it,
  which Table 1 counts in part: the true cost is higher.
  """
  size = sizes.SIZES[name]
  encoder = 16 * size.d_model**2 * encoder_layers * POSITIONS / TARGETS
  decoder = 18 * size.d_model**2 * (size.num_layers - encoder_layers) * LEVELS
  return 6 * (encoder + decoder + _head(size))


def decoder_only_flops(name: str) -> float:
  """FLOPs of the naive rows of Table 2, from the nominal size.

  All nominal parameters meet a fifth of the context and the codes; a head a
  level; no scores.
  """
  tokens = POSITIONS / TARGETS + LEVELS
  return 6 * (nominal(name) * tokens + _head(sizes.SIZES[name]))


def lazy_flops(name: str, kv_chunks: int = 1, kv_heads: int = 0) -> float:
  """FLOPs of the lazy rows of Tables 2-4, from the nominal size.

  All nominal parameters meet the codes; one linear layer from the embeddings
  of a position's codes to d_context meets a fifth of the context; a head a
  level; no scores.

  Args:
    name: of the size.
    kv_chunks: S_kv · L_kv: key and value layers.
    kv_heads: G_kv; 0: as many as heads.
  """
  size = sizes.SIZES[name]
  fan_in = LEVELS * size.sid_embed_dim
  width = kv_chunks * _key_width(size, kv_heads)
  context = fan_in * width * POSITIONS / TARGETS
  return 6 * (nominal(name) * LEVELS + context + _head(size))


def _key_width(size: sizes.Size, kv_heads: int) -> float:
  return size.d_model * (kv_heads or size.num_heads) / size.num_heads


def key_value_elements(name: str, kv_heads: int = 0) -> float:
  """Elements of one key layer for a batch of BATCH targets; as `lazy_flops`."""
  width = _key_width(sizes.SIZES[name], kv_heads)
  return BATCH / TARGETS * POSITIONS * width


def lazy_activations(name: str, kv_chunks: int = 1, kv_heads: int = 0) -> float:
  """Activations of a batch, in elements: 23·d a block and code, and the keys.

  INFERRED: 23 is the whole number that fits the three lazy rows of Table 2;
  the rest of Tables 3 and 4 follows from it.
  """
  size = sizes.SIZES[name]
  blocks = 23 * size.d_model * size.num_layers * LEVELS * BATCH
  return blocks + kv_chunks * key_value_elements(name, kv_heads)


def encoder_decoder_activations(name: str, encoder_layers: int) -> float:
  """Elements: 20·d a block and context position, 23·d a block and code.

  INFERRED: 20 is the whole number that fits the six rows of Table 2; with
  keys and values of the cross-attention beside it they do not fit.
  """
  size = sizes.SIZES[name]
  positions = BATCH / TARGETS * POSITIONS
  encoder = 20 * size.d_model * encoder_layers * positions
  decoder_layers = size.num_layers - encoder_layers
  return encoder + 23 * size.d_model * decoder_layers * LEVELS * BATCH


def decoder_only_activations(name: str) -> float:
  """Elements: 18·d a block, for every context position and code.

  INFERRED: 18 is the whole number that fits the three naive rows of Table 2.
  """
  size = sizes.SIZES[name]
  tokens = BATCH / TARGETS * POSITIONS + BATCH * LEVELS
  return 18 * size.d_model * size.num_layers * tokens


# --- V2 Table 5 -------------------------------------------------------------


def dense_parameters(name: str) -> int:
  """Parameters of the blocks' matrices: 18·d² a block; no embeddings."""
  size = sizes.SIZES[name]
  return 18 * size.d_model**2 * size.num_layers


def expert_parameters(name: str) -> tuple[int, int]:
  """(total, active) of the mixture of experts built on a dense size.

  The first 2 blocks stay dense; the others have 53 routed experts and a
  shared one, each of width d, of which a token passes 3 and the shared one:
  as much as the dense block of width 4·d. Matrices of the blocks; routers and
  embeddings are left out.
  """
  size = sizes.SIZES[name]
  attention, expert = 6 * size.d_model**2, 3 * size.d_model**2
  dense, blocks = 2 * 18 * size.d_model**2, size.num_layers - 2
  return (
    dense + blocks * (attention + 54 * expert),
    dense + blocks * (attention + 4 * expert),
  )


def learning_rate(parameters: float) -> float:
  """The rule that all of Table 5 follows: 5e-4 · √(0.1B / N)."""
  return 5e-4 * (0.1e9 / parameters) ** 0.5


# --- V1 Table 1 -------------------------------------------------------------


def report_block_parameters(size: sizes.ReportSize) -> int:
  """All parameters of the blocks' matrices, as the report lists them.

  4·d² of attention an encoder block, 8·d² a decoder block; a feed-forward of
  two matrices to 2·d, or SwiGLU experts; routers left out.
  """
  half, square = size.layers // 2, size.d_model**2
  moe_blocks = 0
  if size.moe.num_experts:
    blocks = size.layers if size.moe_encoder else half
    moe_blocks = blocks // size.moe.every
  experts = size.moe.num_experts * 3 * size.d_model * size.moe.d_ff
  dense_blocks = size.layers - moe_blocks
  return 12 * half * square + 4 * dense_blocks * square + moe_blocks * experts


def report_parameters(size: sizes.ReportSize) -> int:
  """Blocks, two tables of all codes, and the pathways, as the report has them.

  Our own model has more: see `built_parameters`.

  INFERRED: which tables the report counts is not said; those of item, author
  and user ids are unpublished and left out. Pathways: two blocks of the
  lifelong compression, 8·d² each, and for each of three sequences an MLP from
  d + 512 + 5 · 128 features to d.
  """
  d = size.d_model
  tables = 2 * LEVELS * CODES * d
  pathways = 2 * 8 * d**2 + 3 * ((d + 512 + 5 * 128) * d + d**2)
  return report_block_parameters(size) + tables + pathways


# --- Our own counts ---------------------------------------------------------


def counted_flops(
  config: model_configs.GeneratorConfig, positions: int = POSITIONS
) -> float:
  """FLOPs of one sample by the model's own counter: all matrix products."""
  forward = registry.forward_flops(_build(config), 1, positions, TARGETS)
  return 3 * forward / TARGETS


def counted_parameters(
  config: model_configs.GeneratorConfig, all_experts: bool = False
) -> int:
  """Parameters of the blocks' matrices by the model's own counter.

  Args:
    config: the model.
    all_experts: count every expert, not only those a token passes through.
  """
  if all_experts:
    experts = config.moe
    experts = dataclasses.replace(
      experts, experts_per_token=experts.num_experts
    )
    config = dataclasses.replace(config, moe=experts)
  return registry.block_parameters(_build(config))


def built_parameters(
  config: model_configs.GeneratorConfig, pathways: config_lib.PathwaysConfig
) -> int:
  """All parameters of the model that a config builds, on rows of pathways.

  Over data without features: tables of ids are none of it.
  """
  int32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
  context, target = int32(1, pathways.positions), int32(1, 1)
  batch = batch_lib.Batch(context, context, {}, target, target, target)
  catalogue = batch_lib.Catalogue(int32(2, LEVELS), {})
  shapes = state.abstract_params(_build(config, pathways), batch, catalogue)
  return sum(leaf.size for leaf in jax.tree.leaves(nn.unbox(shapes)))


def _build(config, pathways=None):
  # The dtype changes no count, and `auto` would start an accelerator.
  config = dataclasses.replace(config, compute_dtype="float32")
  return registry.create(config, 1, (CODES,) * LEVELS, {}, {}, pathways)


def lazy_config(name: str, **changes: int) -> model_configs.LazyDecoderConfig:
  """The lazy decoder of a size, fields changed."""
  return dataclasses.replace(sizes.lazy_decoder(name), **changes)
