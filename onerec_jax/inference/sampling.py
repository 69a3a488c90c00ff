"""Samples semantic IDs from a generator; the beams of a row share its context.

Constrained, the next code is drawn among those that continue to an allowed
item, so that every sample is an item; free, among all K, and what comes out may
be no item (V1, arXiv 2506.13695 §2.5, calls such IDs illegal and rewards legal
ones). Draws are independent, hence may repeat: `beam_search` gives different
items.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Int, Shaped

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
  draw = _drawing(model, index, constrained)
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
    of_level = jax.random.fold_in(key, level)
    previous, node, log_probability = draw(
      count, temperature, level, node, logits, of_level
    )
    if level == 0:
      # All samples come from the one BOS.
      parent = jnp.zeros((rows, count), jnp.int32)
      cache = beam_search.reorder(cache, parent)
    drawn.append(previous)
    log_probabilities.append(log_probability)
  return Samples(
    jnp.stack(drawn, axis=-1),
    prefix_index.leaf_items(index, node),
    jnp.stack(log_probabilities, axis=-1),
  )


def _drawing(
  model: nn.Module, index: PrefixIndex, constrained: bool
) -> Callable[..., tuple[Array, Array, Array]]:
  """What draws the codes of a level; raises as `sample` does."""
  if constrained:
    return functools.partial(_draw_item_code, index, model.constrained_softmax)
  beam_search.check_softmax(model)
  return functools.partial(_draw_any_code, index)


def _draw_item_code(
  index: PrefixIndex,
  constrained_softmax: bool,
  count: int,
  temperature: float,
  level: int,
  node: Int[Array, "B W"],
  logits: Float[Array, "B W K"],
  key: jax.Array,
) -> tuple[Int[Array, "B R"], Int[Array, "B R"], Float[Array, "B R"]]:
  """Codes that continue to allowed items; results as of `_draw_any_code`."""
  codes, child, log_probability = beam_search.continuations(
    index, level, node, logits, constrained_softmax
  )
  alive = prefix_index.is_alive(index, level, child)
  allowed = jnp.where(alive, log_probability, -jnp.inf)
  place = _draw(key, allowed / temperature, count)
  return (*(_pick(x, place) for x in (codes, child, log_probability)),)


def _draw_any_code(
  index: PrefixIndex,
  count: int,
  temperature: float,
  level: int,
  node: Int[Array, "B W"],
  logits: Float[Array, "B W K"],
  key: jax.Array,
) -> tuple[Int[Array, "B R"], Int[Array, "B R"], Float[Array, "B R"]]:
  """Draws from all K: (codes, where they lead or −1, log-probabilities)."""
  log_probability = jax.nn.log_softmax(logits.astype(jnp.float32))
  chosen = _draw(key, log_probability / temperature, count)
  node = jnp.broadcast_to(node, chosen.shape)
  node = prefix_index.follow(index, level, node, chosen)
  return chosen, node, _pick(log_probability, chosen)


def _pick(
  values: Shaped[Array, "B W C"], place: Int[Array, "B R"]
) -> Shaped[Array, "B R"]:
  """values[b, r, place[b, r]]; W is R, or 1 where all share one row."""
  if values.shape[1] == 1:
    return jnp.take_along_axis(values[:, 0], place, axis=-1)
  return jnp.take_along_axis(values, place[..., None], axis=-1)[..., 0]


def _draw(
  key: jax.Array, logits: Float[Array, "B W C"], count: int
) -> Int[Array, "B R"]:
  """Draws `count` of C for each row; W is R, or 1 where all share one row.

  A uniform number is looked up in the running sum of the probabilities, first
  over blocks of about √C, then within the one it falls into. A Gumbel number
  for each of C (jax.random.categorical) is many times the work.

  A choice of probability 0 is never drawn, unless all have it: then the last.
  """
  B, W, C = logits.shape
  size = math.isqrt(C - 1) + 1
  peak = jnp.max(logits, axis=-1, keepdims=True)
  weights = jnp.exp(logits - jnp.where(jnp.isfinite(peak), peak, 0.0))
  weights = jnp.pad(weights, ((0, 0), (0, 0), (0, size * size - C)))
  weights = weights.reshape(B, W, size, size)
  sums = jnp.sum(weights, axis=-1)
  at = jax.random.uniform(key, (B, count)) * jnp.sum(sums, axis=-1)
  block, rest = _falls(sums, at)
  own = jnp.arange(W)  # W = 1 broadcasts over the draws
  inner = jax.vmap(lambda weights, block: weights[own, block])(weights, block)
  place, _ = _falls(inner, rest)
  return jnp.minimum(block * size + place, C - 1)


def _falls(
  weights: Float[Array, "B W n"], at: Float[Array, "B R"]
) -> tuple[Int[Array, "B R"], Float[Array, "B R"]]:
  """The weight within which `at` falls in their running sum, and how far in."""
  running = jnp.cumsum(weights, axis=-1)
  # Sums differ in their last digits by their order: stay inside this one.
  at = jnp.minimum(at, jnp.nextafter(running[..., -1], 0.0))
  place = jnp.sum(running <= at[..., None], axis=-1)
  place = jnp.minimum(place, weights.shape[-1] - 1)
  rest = at - _pick(running, place) + _pick(weights, place)
  return place, jnp.maximum(rest, 0.0)
