"""A generator as a policy: log-probabilities of what it might have answered.

Answers share the context of their row, so a group of R costs R targets and one
context. An ID that is no item is looked up like one: for a step it is a row of
the catalogue (`with_codes`), and no model needs to know.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.inference.prefix_index import PrefixIndex
from onerec_jax.training import losses


def log_probabilities(
  model: nn.Module,
  params: Any,
  batch: Batch,
  catalogue: Catalogue,
  index: PrefixIndex,
  key: jax.Array | None = None,
) -> Float[Array, "B T L"]:
  """Of each code of each target, in nats, teacher-forced.

  Args:
    model: generative.
    params: its parameters.
    batch: contexts and targets; padding targets get numbers without meaning.
    catalogue: the targets' codes.
    index: for a constrained softmax.
    key: of dropout; None: none.
  """
  levels, _ = losses.code_losses(model, params, batch, catalogue, index, key)
  return -jnp.stack(levels, axis=-1)


def group_log_probabilities(
  model: nn.Module,
  params: Any,
  requests: Batch,
  catalogue: Catalogue,
  codes: Int[Array, "B R L"],
  index: PrefixIndex,
) -> Float[Array, "B R L"]:
  """`log_probabilities` of R answers to each request, at less work.

  They share their request's context and its BOS (Generator.group_logits).

  Args:
    model: generative, of one item an answer.
    params: its parameters.
    requests: with T = 1.
    catalogue: the items.
    codes: the answers, be they items or not.
    index: for a constrained softmax.
  """
  first, *rest = model.apply(
    {"params": params}, requests, catalogue, codes, method="group_logits"
  )
  valid = [None] * codes.shape[-1]
  if model.constrained_softmax:
    valid = losses.valid_codes(index, codes)
    valid[0] = valid[0][:, 0]
  # All answers' first codes are judged by the same logits.
  of_first = jax.vmap(losses.cross_entropy, (None, 1, None), 1)
  levels = [of_first(first[:, 0], codes[..., 0], valid[0])]
  for level, logits in enumerate(rest, 1):
    levels.append(losses.cross_entropy(logits, codes[..., level], valid[level]))
  return -jnp.stack(levels, axis=-1)


def with_codes(
  batch: Batch, catalogue: Catalogue, codes: Int[Array, "B R L"]
) -> tuple[Batch, Catalogue]:
  """Rows with these semantic IDs as targets, be they items or not.

  Args:
    batch: contexts, T = 1.
    catalogue: the items.
    codes: what each row might be answered.

  Returns:
    The batch with T = R, and the catalogue with B · R more rows: the IDs, of
    no features.
  """
  rows, count, levels = codes.shape
  first = catalogue.codes.shape[0]
  targets = first + jnp.arange(rows * count, dtype=jnp.int32)
  batch = batch.replace(
    targets=targets.reshape(rows, count),
    visible_from=jnp.broadcast_to(batch.visible_from, (rows, count)),
    visible_until=jnp.broadcast_to(batch.visible_until, (rows, count)),
  )
  more = codes.reshape(-1, levels).astype(catalogue.codes.dtype)
  catalogue = Catalogue(
    jnp.concatenate([catalogue.codes, more]),
    {
      name: jnp.pad(values, (0, rows * count))
      for name, values in catalogue.features.items()
    },
  )
  return batch, catalogue
