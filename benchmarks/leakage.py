"""Asks a model about times: parts of benchmarks/data_organisation.py.

Probabilities come from teacher forcing over the whole catalogue, so that no
search hides anything.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from onerec_jax import config as config_lib
from onerec_jax.data import rows as rows_lib
from onerec_jax.data import shards, splits
from onerec_jax.data.batch import Batch
from onerec_jax.inference import assemble, beam_search


class Asker:
  """Log-probabilities of every item, by the model of some parameters."""

  def __init__(self, system: assemble.System):
    self._system = system
    self.levels = system.catalogue.codes.shape[1]
    self._items = jnp.arange(1, system.prepared.num_items + 1)[None]
    self._scores = jax.jit(
      functools.partial(beam_search.exact_scores, system.model, chunk=512)
    )

  def __call__(self, params: Any, batch: Batch) -> np.ndarray:
    """[B, I] in the order of items 1 … I."""
    rows = len(batch.items)
    found = self._scores(
      params,
      jax.tree.map(jnp.asarray, batch),
      jax.tree.map(jnp.asarray, self._system.catalogue),
      self._system.index,
      jnp.broadcast_to(self._items, (rows, self._items.shape[1])),
    )
    return np.asarray(found)


@dataclasses.dataclass
class Quality:
  """On events after the training events."""

  events: int
  loss: float
  recall_at_10: float


def quality(ask: Asker, params: Any, batches: list[tuple]) -> Quality:
  """Loss in nats a code, and recall over all items, nothing filtered."""
  losses_, hits = [], []
  for batch, queries in batches:
    real = queries.target > 0
    scores = ask(params, batch)[real]
    own = scores[np.arange(len(scores)), queries.target[real] - 1]
    losses_.append(-own)
    hits.append((scores > own[:, None]).sum(axis=1) < 10)
  found = np.concatenate(losses_)
  return Quality(
    len(found),
    float(found.mean()) / ask.levels,
    float(np.concatenate(hits).mean()),
  )


@dataclasses.dataclass
class Probe:
  """What a model trained to the middle of the stream has of its second half.

  Attributes:
    unknown_mass: probability for items without an event in the first half.
    future_taste: rank correlation over the known items of mean probability
      and popularity in the second half, given popularity in the first.
  """

  unknown_mass: float
  future_taste: float


@dataclasses.dataclass
class Middle:
  """The middle of the stream, by time of the training events.

  Attributes:
    time: ms.
    before: [I] events of each item before it.
    after: [I] training events after it.
    batches: contexts of users who have events on both sides.
  """

  time: float
  before: np.ndarray
  after: np.ndarray
  batches: list[Batch]


def middle(
  prepared: shards.PreparedData, settings: config_lib.PipelineConfig, users: int
) -> Middle:
  """Finds the middle; `users` are asked for at most."""
  records = [prepared.user(user) for user in range(len(prepared))]
  training = [r.split == splits.TRAIN for r in records]
  times = np.concatenate([r.timestamps[t] for r, t in zip(records, training)])
  items = np.concatenate([r.items[t] for r, t in zip(records, training)])
  at = float(np.median(times))
  counts = [
    np.bincount(items[side], minlength=prepared.num_items + 1)[1:]
    for side in (times < at, times >= at)
  ]
  asked = []
  for record, own in zip(records, training):
    until = int((record.timestamps[own] < at).sum())
    if 0 < until < own.sum():
      asked.append((record, until))
  rng = np.random.default_rng(0)
  chosen = rng.permutation(len(asked))[:users]
  batches = []
  for start in range(0, len(chosen), 32):
    part = [asked[i] for i in chosen[start : start + 32]]
    batches.append(
      rows_lib.request_batch(
        [rows_lib.before(prepared, *pair) for pair in part],
        sorted(rows_lib.feature_sizes(prepared)),
        settings,
        32,
      )
    )
  return Middle(at, *counts, batches)


def probe(ask: Asker, params: Any, where: Middle) -> Probe:
  """Asks a model about the middle of the stream."""
  scores = np.concatenate(
    [ask(params, b)[np.asarray(b.segment)[:, 0] > 0] for b in where.batches]
  )
  mean = np.exp(scores.astype(np.float64)).mean(axis=0)
  known = where.before > 0
  x, y, z = (_ranks(v[known]) for v in (mean, where.after, where.before))
  correlation = np.corrcoef([x, y, z])
  xy, xz, yz = correlation[0, 1], correlation[0, 2], correlation[1, 2]
  partial = (xy - xz * yz) / np.sqrt((1 - xz**2) * (1 - yz**2))
  return Probe(float(mean[~known].sum()), float(partial))


def _ranks(values: np.ndarray) -> np.ndarray:
  """Ranks; equal values share the mean of theirs."""
  _, inverse, counts = np.unique(
    values, return_inverse=True, return_counts=True
  )
  ends = np.cumsum(counts)
  return (ends - (counts + 1) / 2)[inverse]
