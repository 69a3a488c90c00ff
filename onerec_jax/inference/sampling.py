"""Samples semantic IDs from a generator; the beams of a row share its context.

Constrained, the next code is drawn among those that continue to an allowed
item, so that every sample is an item; free, among all K, and what comes out may
be no item (V1, arXiv 2506.13695 §2.5, calls such IDs illegal and rewards legal
ones). Draws are independent, hence may repeat: `beam_search` gives different
items.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Int, Shaped

from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.inference import beam_search, prefix_index
from onerec_jax.inference.prefix_index import PrefixIndex


@struct.dataclass
class Samples:
  """Semantic IDs drawn for each row.

  Attributes:
    codes: [B, R, L].
    items: [B, R] the item of each; 0 where it is none.
    log_probability: [B, R, L] the model's, of each code, in nats: what the
      loss of the same codes would be, at any temperature.
  """

  codes: Any
  items: Any
  log_probability: Any


def sample(
  model: nn.Module,
  params: Any,
  batch: Batch,
  catalogue: Catalogue,
  index: PrefixIndex,
  key: jax.Array,
  count: int,
  constrained: bool = True,
  temperature: float = 1.0,
) -> Samples:
  """Draws semantic IDs code by code. Pure, with static shapes.

  Args:
    model: generative, with `encode`, `decode_step`, `constrained_softmax`.
    params: its parameters.
    batch: rows with T = 1.
    catalogue: what `encode` needs of the items.
    index: over the catalogue; may be restricted.
    key: of the draws.
    count: R.
    constrained: only codes that continue to an allowed item.
    temperature: logits are divided by it for the draw.

  Raises:
    ValueError: free sampling from a model whose softmax is constrained: an
      ID that is no item has no probability there.
  """
  if model.constrained_softmax and not constrained:
    raise ValueError(
      "free sampling needs a model with a softmax over all codes: train it "
      "with model.constrained_softmax=False"
    )
  variables = {"params": params}
  context = model.apply(variables, batch, catalogue, method="encode")
  rows = batch.items.shape[0]
  node = jnp.zeros((rows, 1), jnp.int32)
  previous = cache = None
  drawn, log_probabilities = [], []
  for level in range(index.num_levels):
    logits, cache = model.apply(
      variables, level, previous, cache, context, method="decode_step"
    )
    child = _children(index, level, node, logits.shape[-1])
    logits = logits.astype(jnp.float32)
    allowed = jnp.where(
      prefix_index.is_alive(index, level, child), logits, -jnp.inf
    )
    if level == 0:
      # All samples come from the one BOS.
      parent = jnp.zeros((rows, count), jnp.int32)
      cache = beam_search.reorder(cache, parent)
      logits, allowed, child = (
        jnp.broadcast_to(x, (rows, count, x.shape[-1]))
        for x in (logits, allowed, child)
      )
    chosen = jax.random.categorical(
      jax.random.fold_in(key, level),
      (allowed if constrained else logits) / temperature,
    )
    normalised = jnp.where(child >= 0, logits, -jnp.inf)
    scores = normalised if model.constrained_softmax else logits
    log_probabilities.append(_pick(jax.nn.log_softmax(scores), chosen))
    node, previous = _pick(child, chosen), chosen
    drawn.append(chosen)
  return Samples(
    jnp.stack(drawn, axis=-1),
    prefix_index.leaf_items(index, node),
    jnp.stack(log_probabilities, axis=-1),
  )


def _pick(
  values: Shaped[Array, "B R K"], chosen: Int[Array, "B R"]
) -> Shaped[Array, "B R"]:
  return jnp.take_along_axis(values, chosen[..., None], axis=-1)[..., 0]


def _children(
  index: PrefixIndex, level: int, node: Int[Array, "B W"], size: int
) -> Int[Array, "B W K"]:
  """The edge of every code of the level; −1 where it leads nowhere."""
  codes, child = prefix_index.children(index, level, node)
  if codes.shape[-1] == size:
    return child
  place = jnp.where(child >= 0, codes, size)
  edges = jnp.full((*node.shape, size + 1), -1, jnp.int32)
  edges = jnp.put_along_axis(edges, place, child, axis=-1, inplace=False)
  return edges[..., :size]
