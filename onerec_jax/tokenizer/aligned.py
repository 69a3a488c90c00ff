"""Trains the Q-Former on pairs of items that behave alike (OneRec-V1 §2.1).

Two losses: items of a pair lie close (contrastive, within the batch), and an
item's words can be told from its vector (reconstruction).
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import struct, traverse_util
from jaxtyping import Array, Float, Int

from onerec_jax import config as config_lib
from onerec_jax.data.batch import Leaf
from onerec_jax.models import layers
from onerec_jax.tokenizer import content as content_lib
from onerec_jax.tokenizer import qformer
from onerec_jax.training import losses, optimizer

PREDICTED_TERMS = 8192
"""The reconstruction predicts the terms that most items have."""
LOG_EVERY = 50

OnStep = Callable[[int, int, float], None]
"""(steps done, steps in all, loss)."""
LossFn = Callable[[Any, "Items", Int[Array, "B 2"]], Float[Array, ""]]


@struct.dataclass
class Items:
  """The catalogue, as a step reads it.

  Attributes:
    table: float32 [C + 1, D], `qformer.term_table`.
    labels: int32 [C + 1], what the reconstruction calls each term (−1:
      nothing); row 0 is padding.
    terms: int32 [I, M], of `qformer.Words`.
    weights: float32 [I, M], likewise.
  """

  table: Leaf
  labels: Leaf
  terms: Leaf
  weights: Leaf


def contrastive_loss(
  first: Float[Array, "B D"],
  second: Float[Array, "B D"],
  pairs: Int[Array, "B 2"],
  temperature: float,
) -> Float[Array, ""]:
  """L_I2I: each pair's second item among the seconds of the batch.

  −mean log (exp(cos(i, j) / τ) / Σ_j' exp(cos(i, j') / τ)). A j' that is j
  again, or i itself, is no negative and is left out.

  Args:
    first: vectors of the pairs' first items, of length 1.
    second: of the second items.
    pairs: rows of both.
    temperature: τ.
  """
  i, j = pairs[:, :1], pairs[:, 1]
  negative = (j[None] != j[:, None]) & (j[None] != i)
  logits = first @ second.T / temperature
  return jnp.mean(
    losses.cross_entropy(logits, jnp.arange(len(pairs)), negative)
  )


def reconstruction_loss(
  logits: Float[Array, "B C"], labels: Int[Array, "B M"]
) -> Float[Array, ""]:
  """−log P(word | vector), the mean over an item's words, then over items.

  INFERRED: the caption loss −Σ_k log P(t^{k+1} | t^1 … t^k) with the words
  before taken out of the condition, so that the vector alone has to tell.

  Args:
    logits: of each term that is predicted.
    labels: an item's words among these, −1 where there is none.
  """
  there = labels >= 0
  picked = jnp.take_along_axis(logits, jnp.maximum(labels, 0), axis=1)
  word = jax.nn.logsumexp(logits, axis=1, keepdims=True) - picked
  total = jnp.sum(jnp.where(there, word, 0.0), axis=1)
  return jnp.mean(total / jnp.maximum(there.sum(axis=1), 1))


def fit(
  texts: list[str],
  content: content_lib.Content,
  pairs: Int[np.ndarray, "P 2"],
  config: config_lib.QFormerConfig,
  seed: int,
  on_step: OnStep = lambda step, steps, loss: None,
) -> tuple[qformer.Aligner, str]:
  """Minimises L_I2I + weight · L_reconstruction by AdamW.

  Args:
    texts: one an item.
    content: what places their words.
    pairs: rows of items (pairs.py), from training events only.
    config: the Q-Former's part of the config.
    seed: of the parameters and of the order of pairs.
    on_step: called every `LOG_EVERY` steps and at the end.

  Returns:
    The trained network, and a line that says what it was trained on: pairs
    with words on both sides.

  Raises:
    ValueError: a bad setting, or fewer than two such pairs.
    FloatingPointError: the loss is not finite.
  """
  module = qformer.create(config)
  _check(config)
  found = qformer.words(texts, content)
  given = len(pairs)
  pairs = pairs[(found.terms[:, 0] > 0)[pairs].all(axis=1)]
  if len(pairs) < 2:
    raise ValueError(
      "tokenizer.vectors=aligned needs two pairs of items that behave alike "
      f"and have text; the positive training events give {given} pairs, "
      f"{len(pairs)} of them with text: prepare again with a prepare.positive "
      "that marks more events (manifest.json counts marked_events), or set "
      "tokenizer.vectors=content"
    )
  labels, num_labels = predicted(content)
  table = qformer.term_table(content)
  items = Items(table, labels, found.terms, found.weights)
  head = layers.Linear(num_labels)
  keys = jax.random.split(jax.random.key(seed))
  width = config.num_queries * config.d_model
  params = {
    "qformer": qformer.init(module, table.shape[1], keys[0]),
    "head": nn.unbox(head.init(keys[1], jnp.zeros((1, width)))["params"]),
  }
  loss_fn = functools.partial(_loss, module=module, head=head, config=config)
  params = _train(
    params, loss_fn, jax.device_put(items), pairs, config, seed, on_step
  )
  flat = traverse_util.flatten_dict(params["qformer"], sep="/")
  arrays = {name: np.asarray(value) for name, value in flat.items()}
  line = f"aligned vectors (content, by a Q-Former of {len(pairs)} pairs)"
  return qformer.Aligner(arrays, config.num_heads), line


def _check(config: config_lib.QFormerConfig) -> None:
  if config.batch_size < 2:
    raise ValueError(
      f"tokenizer.qformer.batch_size is {config.batch_size}; a pair's "
      "negatives are the others of the batch: want at least 2"
    )
  if config.num_steps < 1:
    raise ValueError(
      f"tokenizer.qformer.num_steps is {config.num_steps}; want at least 1"
    )
  for name in ("temperature", "learning_rate"):
    if getattr(config, name) <= 0:
      raise ValueError(
        f"tokenizer.qformer.{name} is {getattr(config, name)}; want more than 0"
      )


def predicted(
  content: content_lib.Content,
) -> tuple[Int[np.ndarray, "C1"], int]:
  """`Items.labels`, and how many terms are predicted."""
  # The more items have a term the smaller its idf.
  kept = np.argsort(content.idf, kind="stable")[:PREDICTED_TERMS]
  labels = np.full(len(content.terms) + 1, -1, np.int32)
  labels[kept + 1] = np.arange(len(kept))
  return labels, len(kept)


def _loss(
  params: Any,
  items: Items,
  pairs: Int[Array, "B 2"],
  *,
  module: qformer.QFormer,
  head: layers.Linear,
  config: config_lib.QFormerConfig,
) -> Float[Array, ""]:
  rows = pairs.T.reshape(-1)
  terms = jnp.take(items.terms, rows, axis=0)
  weights = jnp.take(items.weights, rows, axis=0)
  vectors = qformer.apply(
    module, params["qformer"], items.table, terms, weights
  )
  first, second = jnp.split(vectors, 2)
  # Rows of length 1: scaled, the head reads entries of about 1.
  scaled = first * np.sqrt(first.shape[1], dtype=np.float32)
  logits = head.apply({"params": params["head"]}, scaled)
  labels = jnp.take(items.labels, terms[: len(pairs)], axis=0)
  alike = contrastive_loss(first, second, pairs, config.temperature)
  return alike + config.reconstruction * reconstruction_loss(logits, labels)


def _train(
  params: Any,
  loss_fn: LossFn,
  items: Items,
  pairs: Int[np.ndarray, "P 2"],
  config: config_lib.QFormerConfig,
  seed: int,
  on_step: OnStep,
) -> Any:
  """`num_steps` updates; the learning rate falls to zero over them."""
  settings = config_lib.OptimizerConfig(
    learning_rate=config.learning_rate, warmup_steps=config.num_steps // 10
  )
  tx = optimizer.make_optimizer(
    settings, optimizer.make_schedule(settings, 1, config.num_steps)
  )

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def step(params, state, items, batch):
    loss, grads = jax.value_and_grad(loss_fn)(params, items, batch)
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state, loss

  state = jax.jit(tx.init)(params)
  order = batches(pairs, config.batch_size, seed)
  for number in range(1, config.num_steps + 1):
    params, state, loss = step(params, state, items, next(order))
    if number % LOG_EVERY == 0 or number == config.num_steps:
      if not np.isfinite(loss):
        raise FloatingPointError(
          f"the Q-Former's loss is {loss} after {number} steps; lower "
          "tokenizer.qformer.learning_rate"
        )
      on_step(number, config.num_steps, float(loss))
  return params


def batches(
  pairs: Int[np.ndarray, "P 2"], size: int, seed: int
) -> Iterator[Int[np.ndarray, "B 2"]]:
  """Batches without end: each epoch in an order of its own, whole ones only.

  Args:
    pairs: all of them.
    size: of a batch; all pairs where there are fewer.
    seed: of the orders.
  """
  rng = np.random.default_rng(seed)
  size = min(size, len(pairs))
  while True:
    order = rng.permutation(len(pairs))
    for start in range(0, len(pairs) - size + 1, size):
      yield pairs[order[start : start + size]]
