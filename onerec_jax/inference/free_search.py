"""Beam search over all codes: what comes out may be no item.

INFERRED: V1 (arXiv 2506.13695, §2.5) takes the beams of its rollouts and
rewards the legal ones, so its search there is not held to items. Serving uses
`beam_search`, which finds only items.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.inference import beam_search, prefix_index
from onerec_jax.inference.prefix_index import PrefixIndex


@struct.dataclass
class Beams:
  """The best semantic IDs of each row, best first.

  Attributes:
    codes: [B, W, L].
    items: [B, W] the item of each; 0 where it is none that is allowed.
    scores: [B, W] log-probability in nats, float32.
  """

  codes: Any
  items: Any
  scores: Any


def free_search(
  model: nn.Module,
  params: Any,
  batch: Batch,
  catalogue: Catalogue,
  index: PrefixIndex,
  width: int,
) -> Beams:
  """The `width` best of all K₁·…·K_L IDs found by beam search.

  Pure and with static shapes. A level looks at W · K continuations a row.

  Args:
    model: generative, with `encode`, `decode_step`, `constrained_softmax`.
    params: its parameters.
    batch: rows with T = 1.
    catalogue: what `encode` needs of the items.
    index: over the catalogue; restricted, all but allowed items count as none.
    width: W; the answer has min(W, K₁·…·K_L) columns.

  Raises:
    ValueError: the model's softmax is constrained: an ID that is no item has
      no probability there.
  """
  beam_search.check_softmax(model)
  variables = {"params": params}
  context = model.apply(variables, batch, catalogue, method="encode")
  rows = batch.items.shape[0]
  scores = jnp.zeros((rows, 1), jnp.float32)
  node = jnp.zeros((rows, 1), jnp.int32)
  codes = jnp.zeros((rows, 1, 0), jnp.int32)
  previous = cache = None
  for level in range(index.num_levels):
    logits, cache = model.apply(
      variables, level, previous, cache, context, method="decode_step"
    )
    scores, parent, previous = _best(scores, logits, width)
    node = jnp.take_along_axis(node, parent, axis=1)
    node = prefix_index.follow(index, level, node, previous)
    codes = jnp.take_along_axis(codes, parent[..., None], axis=1)
    codes = jnp.concatenate([codes, previous[..., None]], axis=2)
    if level + 1 < index.num_levels:
      cache = beam_search.reorder(cache, parent)
  return Beams(codes, prefix_index.leaf_items(index, node), scores)


def _best(
  scores: Float[Array, "B W"], logits: Float[Array, "B W K"], width: int
) -> tuple[Array, Array, Array]:
  """Scores of the best continuations, the beams they continue, and codes."""
  gain = jax.nn.log_softmax(logits.astype(jnp.float32))
  total = scores[:, :, None] + gain
  rows, beams, size = total.shape
  scores, chosen = beam_search.top_k(
    total.reshape(rows, -1), min(width, beams * size)
  )
  return scores, chosen // size, chosen % size
