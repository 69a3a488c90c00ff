"""Ranking metrics as pure functions on numpy arrays.

Letters here: Q queries, W slots of a ranked list (best first), I items. A
ranked list holds dense item ids; 0 is an empty slot (nothing was generated,
or what was generated is no item) and keeps its rank: an invalid output costs
a place. Every query has one target, so recall@k is the hit rate and the ideal
DCG is 1.

Items that share a semantic ID cannot be told apart by the model that
generates IDs, and counting a hit on the ID as a hit on the item inflates every
figure. `collision_credit` therefore gives three credits a slot, and recall,
NDCG and MRR are all linear in the credit.
"""

from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

Ranked = Int[np.ndarray, "Q W"]
PerQuery = Float[np.ndarray, "Q"]
Credit = Float[np.ndarray, "Q W"]


class Credits(NamedTuple):
  """What each slot of each list earns, float64 [Q, W].

  Attributes:
    expected: 1 / (items of the semantic ID) where the slot has the target's
      ID. It is the expected strict credit when each slot of an ID shows one
      of the ID's items, drawn uniformly without replacement.
    strict: 1 where the slot's item is the target itself.
    sid: 1 at the first slot with the target's ID.
  """

  expected: np.ndarray
  strict: np.ndarray
  sid: np.ndarray


def collision_credit(
  ranked: Ranked,
  target: Int[np.ndarray, "Q"],
  ranked_sid: Ranked,
  target_sid: Int[np.ndarray, "Q"],
  group_size: Int[np.ndarray, "N"],
) -> Credits:
  """Credits a ranked list when several items share a semantic ID.

  Args:
    ranked: [Q, W] item ids, 0 for an empty slot; no item twice in a list.
    target: [Q] the held-out items, from 1.
    ranked_sid: [Q, W] the number of each slot's semantic ID, 0 where empty.
    target_sid: [Q] the number of each target's semantic ID, from 1.
    group_size: [N] items of each semantic ID; entry 0 is padding.

  Returns:
    The three credits; equal to each other where no ID is shared.
  """
  same = (ranked_sid == target_sid[:, None]) & (ranked > 0)
  share = 1.0 / np.maximum(group_size[target_sid], 1)
  return Credits(
    expected=same * share[:, None],
    strict=((ranked == target[:, None]) & (ranked > 0)).astype(np.float64),
    sid=(same & (np.cumsum(same, axis=1) == 1)).astype(np.float64),
  )


def recall(credit: Credit, cutoff: int) -> PerQuery:
  """recall@k = Σ_{j<k} credit_j, per query."""
  return credit[:, :cutoff].sum(axis=1)


def ndcg(credit: Credit, cutoff: int) -> PerQuery:
  """NDCG@k = Σ_{j<k} credit_j / log2(j + 2), j from 0, per query."""
  credit = credit[:, :cutoff]
  return credit @ (1.0 / np.log2(np.arange(credit.shape[1]) + 2.0))


def mrr(credit: Credit, cutoff: int) -> PerQuery:
  """MRR@k = Σ_{j<k} credit_j / (j + 1), j from 0, per query."""
  credit = credit[:, :cutoff]
  return credit @ (1.0 / (np.arange(credit.shape[1]) + 1.0))


def drop_seen(
  ranked: Ranked, seen: list[np.ndarray], width: int
) -> Int[np.ndarray, "Q V"]:
  """Takes each query's seen items out of its list, order kept.

  Args:
    ranked: [Q, W] item ids; empty slots (0) stay where they are.
    seen: Q arrays of item ids, of any length.
    width: slots of the result.

  Returns:
    [Q, V] with V = width: what remains, moved up; 0 where the list has run out.
  """
  num_queries, num_slots = ranked.shape
  owner = np.repeat(np.arange(num_queries), [len(s) for s in seen])
  flat = np.concatenate([np.zeros(0, np.int64), *seen]).astype(np.int64)
  # One integer a (query, item), so that one set test serves all the queries.
  stride = 1 + max(ranked.max(initial=0), flat.max(initial=0))
  keys = np.arange(num_queries)[:, None] * stride + ranked
  kept = ~np.isin(keys, owner * stride + flat) | (ranked == 0)
  place = np.cumsum(kept, axis=1) - 1
  rows, slots = np.nonzero(kept & (place < width))
  result = np.zeros((num_queries, width), ranked.dtype)
  result[rows, place[rows, slots]] = ranked[rows, slots]
  return result


def valid_rate(ranked: Ranked, cutoff: int) -> PerQuery:
  """The share of the first k slots that hold an item, per query."""
  return (ranked[:, :cutoff] > 0).sum(axis=1) / float(cutoff)


def recommendation_counts(
  ranked: Ranked, num_items: int, cutoff: int
) -> Int[np.ndarray, "I1"]:
  """How often each item stands in a first-k list: [I + 1], entry 0 is 0."""
  counts = np.bincount(ranked[:, :cutoff].ravel(), minlength=num_items + 1)
  counts[0] = 0
  return counts


def coverage(counts: Int[np.ndarray, "I1"]) -> float:
  """The share of the catalogue recommended at least once.

  Args:
    counts: [I + 1] of `recommendation_counts`; entry 0 is not read.
  """
  return float(np.mean(counts[1:] > 0))


def gini(counts: Int[np.ndarray, "I1"]) -> float:
  """The Gini coefficient of recommendation counts over the catalogue.

  G = Σ_i (2i - I - 1) x_(i) / (I Σ x), x_(1) ≤ … ≤ x_(I): 0 when all items
  are recommended equally often, (I - 1) / I when only one is.

  Args:
    counts: [I + 1]; entry 0 is not read; never-recommended items count.

  Raises:
    ValueError: nothing was recommended.
  """
  ordered = np.sort(counts[1:]).astype(np.float64)
  num_items, total = len(ordered), ordered.sum()
  if total <= 0:
    raise ValueError(
      "the Gini coefficient of no recommendations is undefined; every slot of "
      "every list is empty (see valid_rate)"
    )
  weight = 2.0 * np.arange(1, num_items + 1) - num_items - 1
  return float(weight @ ordered / (num_items * total))


def popularity_percentile(
  counts: Int[np.ndarray, "I1"],
) -> Float[np.ndarray, "I1"]:
  """Each item's place by training events, in [0, 1]: [I + 1], entry 0 is 0.

  The share of the catalogue with fewer events plus half the share with as
  many (itself included), so the mean over the catalogue is exactly 1/2.

  Args:
    counts: [I + 1] training events; entry 0 is not read.
  """
  own = counts[1:]
  ordered = np.sort(own)
  fewer = np.searchsorted(ordered, own, side="left")
  upto = np.searchsorted(ordered, own, side="right")
  return np.concatenate([[0.0], (fewer + upto) / (2.0 * len(own))])


def mean_popularity(
  recommended: Int[np.ndarray, "I1"], percentile: Float[np.ndarray, "I1"]
) -> float:
  """The mean popularity percentile over all recommended slots.

  Args:
    recommended: [I + 1] of `recommendation_counts`.
    percentile: [I + 1] of `popularity_percentile`.

  Raises:
    ValueError: nothing was recommended.
  """
  total = recommended[1:].sum()
  if total <= 0:
    raise ValueError(
      "the popularity of no recommendations is undefined; every slot of "
      "every list is empty (see valid_rate)"
    )
  return float(recommended[1:] @ percentile[1:] / total)


def cold(
  target: Int[np.ndarray, "Q"], counts: Int[np.ndarray, "I1"], below: int
) -> Bool[np.ndarray, "Q"]:
  """Which queries' targets have fewer than `below` training events."""
  return counts[target] < below
