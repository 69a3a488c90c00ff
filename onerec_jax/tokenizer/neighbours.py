"""Whether codes of new items agree with those of their known neighbours."""

import math

import numpy as np
from jaxtyping import Float, Int

_ROWS = 256
"""Queries at once: the distances to all items must fit into memory."""


def nearest(
  queries: Float[np.ndarray, "Q D"],
  vectors: Float[np.ndarray, "I D"],
  count: int = 1,
) -> Int[np.ndarray, "Q N"]:
  """The `count` rows of `vectors` nearest to each query, in no order.

  Args:
    queries: [Q, D].
    vectors: [I, D].
    count: N, at most I.
  """
  norms = np.square(vectors).sum(axis=1)
  found = []
  for rows in np.array_split(queries, max(1, math.ceil(len(queries) / _ROWS))):
    distances = norms[None] - 2 * rows @ vectors.T
    found.append(np.argpartition(distances, count - 1, axis=1)[:, :count])
  return np.concatenate(found)


def agreement(
  codes: Int[np.ndarray, "Q L"],
  near: Int[np.ndarray, "Q N"],
  known: Int[np.ndarray, "I L"],
) -> tuple[float, float]:
  """The share of neighbours with an item's own codes, and by chance.

  Args:
    codes: of the new items, as many levels as are to agree.
    near: each one's neighbours, rows of `known`.
    known: codes of the known items, the same levels.

  Returns:
    The share, and what is to be expected were each new item given the codes
    of a known item drawn at random.
  """
  share = float((codes[:, None] == known[near]).all(axis=2).mean())
  _, group, counts = np.unique(
    known, axis=0, return_inverse=True, return_counts=True
  )
  chance = counts[group.reshape(-1)[near]] / len(known)
  return share, float(chance.mean())


def new_item_report(
  known_vectors: Float[np.ndarray, "I D"],
  known_codes: Int[np.ndarray, "I L"],
  vectors: Float[np.ndarray, "Q D"],
  codes: Int[np.ndarray, "Q L"],
) -> dict[str, int | float]:
  """For a quality report: `agreement` with the one nearest known item.

  Returns:
    `new_items`; `new_agreement` and `new_chance_agreement` on the first code.
  """
  near = nearest(vectors, known_vectors)
  share, chance = agreement(codes[:, :1], near, known_codes[:, :1])
  return {
    "new_items": len(codes),
    "new_agreement": share,
    "new_chance_agreement": chance,
  }
