"""What every generator of semantic IDs does alike.

It reads a context (the plain history, or the user pathways), runs its blocks
over the codes of each target, and gives logits; only what it makes of the
context and its blocks differ. A generator is a subclass with `encode` and
`_decode`, in a file of its own.
"""

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from onerec_jax import config as config_lib
from onerec_jax import model_configs
from onerec_jax.data import batch as batch_lib
from onerec_jax.models import attention, layers
from onerec_jax.models import context as context_lib
from onerec_jax.models import pathways as pathways_lib


class Generator(nn.Module):
  """The base; letters in dims.py, fields those of GeneratorConfig.

  Attributes:
    codebook_sizes: K of each level.
    num_items: I.
    features: (name, size) of event and user features.
    item_features: (name, size) of item features.
    pathways: lengths of the user pathways; all 0: the plain history.
    dtype: compute dtype of matrix products.
  """

  codebook_sizes: tuple[int, ...]
  num_items: int
  features: context_lib.FeatureSizes
  item_features: context_lib.FeatureSizes
  pathways: config_lib.PathwaysConfig
  d_model: int
  num_heads: int
  d_ff: int
  sid_embed_dim: int
  sid_embedding: str
  item_embedding: bool
  item_embed_dim: int
  item_table_rows: int
  feature_embed_dim: int
  dropout: float
  context_dropout: float
  constrained_softmax: bool
  remat: str
  attention: str
  lifelong_queries: int
  lifelong_layers: int
  moe: model_configs.MoEConfig
  dtype: Any

  projects_pathways: ClassVar[bool] = False
  """Whether positions of pathways, which are d_model wide, are projected like
  those of the plain history."""

  def setup(self):
    self.codes = context_lib.make_codes(self)
    self.embedding = context_lib.make_embedding(self, self.codes)
    self.project = layers.Linear(self.context_width, ("context", "projected"))
    if self.pathways.on:
      self.reader = pathways_lib.make(self)
    self.drop_events = context_lib.EventDropout(self.context_dropout)
    self.distance_bias = attention.DistanceBias(self.num_heads)
    self.drop = layers.Dropout(self.dropout)

  @property
  def context_width(self) -> int:
    """Width of what a context position is projected to."""
    return self.d_model

  def read(
    self, batch: batch_lib.Batch, catalogue: batch_lib.Catalogue
  ) -> context_lib.ContextInputs:
    """Embeds and projects every context position."""
    kept = self.drop_events(batch)
    x = self.drop(self.embedding(batch, catalogue)).astype(self.dtype)
    if not self.pathways.on:
      return context_lib.plain(batch, self.project(x), kept)
    inputs = self.reader.read(batch, x, kept)
    if not self.projects_pathways:
      return inputs
    return inputs.replace(features=self.project(inputs.features))

  def bias_of_targets(
    self, inputs: context_lib.ContextInputs
  ) -> Float[Array, "B H T S"]:
    """Distance bias of the context for each target, hidden positions masked."""
    return self.distance_bias(inputs.distance, inputs.visible, inputs.static)

  def encode(
    self, batch: batch_lib.Batch, catalogue: batch_lib.Catalogue
  ) -> Any:
    """What the blocks read of a row's context; shared by its targets."""
    raise NotImplementedError

  def _decode(
    self, x: Array, context: Any, real: Array, past: Any
  ) -> tuple[Array, Any]:
    """Runs the blocks over new code positions [B, T, N, D] of each target.

    Gives the hidden states, and what `past` is to the next positions.
    """
    raise NotImplementedError

  def __call__(
    self,
    batch: batch_lib.Batch,
    catalogue: batch_lib.Catalogue,
  ) -> tuple[Float[Array, "B T _"], ...]:
    """Teacher-forced logits [B, T, K_l] of every level, in float32."""
    context = self.encode(batch, catalogue)
    x = self.codes.inputs(jnp.take(catalogue.codes, batch.targets, axis=0))
    real = (batch.targets > 0).astype(jnp.float32)
    x, _ = self._decode(self.drop(x), context, real, None)
    return self.codes.all_logits(x)

  def decode_step(
    self,
    level: int,
    previous: Int[Array, "B W"] | None,
    cache: Any,
    context: Any,
  ) -> tuple[Float[Array, "B W _"], Any]:
    """Logits of one level for W beams of each request.

    Args:
      level: static.
      previous: the codes chosen at level − 1; None at level 0 (BOS, W = 1).
      cache: of the levels before, beams on axis 2 of every leaf; None at
        level 0.
      context: of `encode` with one target a row.

    Returns:
      Logits [B, W, K_level] in float32 and the cache.
    """
    x = self.codes.step_input(level, previous, context.bias.shape[0])
    x, cache = self._decode(x, context, jnp.ones(x.shape[:2]), cache)
    return self.codes.logits(level, x[:, :, 0]), cache

  def group_logits(
    self,
    batch: batch_lib.Batch,
    catalogue: batch_lib.Catalogue,
    codes: Int[Array, "B R L"],
  ) -> tuple[Float[Array, "B _ _"], ...]:
    """Teacher-forced logits of R answers to each request.

    All start at BOS, which is read once a request, not once an answer: of
    L = 3 codes a third of the work.

    Args:
      batch: requests, T = 1.
      catalogue: the items.
      codes: the answers' semantic IDs, be they items or not.

    Returns:
      Logits of every level in float32: [B, 1, K] of the first, [B, R, K] of
      the others.
    """
    context = self.encode(batch, catalogue)
    first, past = self.decode_step(0, None, None, context)
    _, answers, levels = codes.shape
    if levels == 1:
      return (first,)
    past = jax.tree.map(lambda x: jnp.repeat(x, answers, axis=2), past)
    x = self.codes.inputs(codes)[:, :, 1:]
    x, _ = self._decode(x, context, jnp.ones(x.shape[:2]), past)
    rest = (
      self.codes.logits(level, x[:, :, level - 1]) for level in range(1, levels)
    )
    return first, *rest


def context_cost(model: Generator, positions: int) -> tuple[int, int]:
  """Multiply-adds of reading a row's context, and positions it comes to.

  Args:
    model: the generator.
    positions: S of the batch.
  """
  if not model.pathways.on:
    width = context_lib.width(model)
    return positions * width * model.context_width, positions
  total, positions = pathways_lib.cost(model)
  if model.projects_pathways:
    total += positions * model.d_model * model.context_width
  return total, positions
