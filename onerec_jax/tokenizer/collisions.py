"""Items that would share a semantic ID, told apart."""

import numpy as np
import scipy.optimize
from jaxtyping import Float, Int

Codebooks = list[Float[np.ndarray, "_ D"]]


def group_ids(codes: Int[np.ndarray, "I L"]) -> Int[np.ndarray, "I"]:
  """A number for each distinct row, in lexicographic order."""
  if codes.shape[1] == 0:
    return np.zeros(len(codes), np.int64)
  return np.unique(codes, axis=0, return_inverse=True)[1].reshape(-1)


def _decode(
  codes: Int[np.ndarray, "I L"], codebooks: Codebooks
) -> Float[np.ndarray, "I D"]:
  return sum(book[code] for code, book in zip(codes.T, codebooks))


def _distances(
  residual: Float[np.ndarray, "I D"], codebook: Float[np.ndarray, "K D"]
) -> Float[np.ndarray, "I K"]:
  """Squared distances less ‖residual‖², which changes no comparison."""
  return np.square(codebook).sum(1)[None] - 2 * residual @ codebook.T


def add_rank_level(codes: Int[np.ndarray, "I L"]) -> Int[np.ndarray, "I L2"]:
  """Appends each item's rank within its group (TIGER's fourth code).

  Ranks follow item order; the level's size is the largest group.
  """
  group = group_ids(codes)
  order = np.argsort(group, kind="stable")
  starts = np.searchsorted(group[order], group[order])
  rank = np.empty(len(codes), np.int32)
  rank[order] = np.arange(len(codes)) - starts
  return np.concatenate([codes, rank[:, None]], axis=1)


def cap_prefixes(
  vectors: Float[np.ndarray, "I D"],
  prefixes: Int[np.ndarray, "I L"],
  codebooks: Codebooks,
  capacity: int,
) -> Int[np.ndarray, "I L"]:
  """Moves items until no prefix has more than `capacity` (INFERRED).

  The members farthest from their prefix's centroid leave an over-full group,
  each for the nearest other code of the same level with room under the same
  earlier codes.

  Args:
    vectors: [I, D].
    prefixes: [I, l] codes of the levels so far.
    codebooks: of those levels.
    capacity: IDs under a prefix, K^(L − l).

  Raises:
    ValueError: no code with room is left under the earlier codes.
  """
  group = group_ids(prefixes)
  sizes = np.bincount(group)
  if sizes.max() <= capacity:
    return prefixes
  prefixes = prefixes.copy()
  parents = group_ids(prefixes[:, :-1])
  num_codes = len(codebooks[-1])
  for parent in np.unique(parents[sizes[group] > capacity]):
    members = np.flatnonzero(parents == parent)
    if len(members) > num_codes * capacity:
      raise ValueError(
        f"{len(members)} items share the codes "
        f"{prefixes[members[0], :-1].tolist()}, under which there are "
        f"{num_codes} × {capacity} IDs; raise tokenizer.num_codes or "
        "tokenizer.num_levels"
      )
    residual = (
      vectors[members] - _decode(prefixes[members, :-1], codebooks[:-1])
      if prefixes.shape[1] > 1
      else vectors[members]
    )
    cost = _distances(residual, codebooks[-1])
    prefixes[members, -1] = _fill(cost, prefixes[members, -1], capacity)
  return prefixes


def _fill(
  cost: Float[np.ndarray, "I K"], codes: Int[np.ndarray, "I"], capacity: int
) -> Int[np.ndarray, "I"]:
  """Keeps the nearest `capacity` of each code and moves the others."""
  codes = codes.copy()
  own = cost[np.arange(len(codes)), codes]
  order = np.lexsort((own, codes))
  rank = np.arange(len(codes)) - np.searchsorted(codes[order], codes[order])
  room = capacity - np.bincount(codes, minlength=cost.shape[1]).clip(
    max=capacity
  )
  for member in order[rank >= capacity]:
    codes[member] = np.argmin(np.where(room > 0, cost[member], np.inf))
    room[codes[member]] -= 1
  return codes


def assign_last_level(
  vectors: Float[np.ndarray, "I D"],
  codes: Int[np.ndarray, "I L"],
  codebooks: Codebooks,
) -> Int[np.ndarray, "I L"]:
  """Gives the members of each prefix group different last codes.

  Within a group the codes are those of least total squared distance (the
  linear assignment problem); a group whose nearest codes already differ
  keeps them, since nothing is nearer.

  Args:
    vectors: [I, D].
    codes: [I, L], the last ones nearest; those are replaced.
    codebooks: of all levels; no prefix group may exceed the last one's K.
  """
  prefixes = codes[:, :-1]
  residual = vectors
  if prefixes.shape[1]:
    residual = vectors - _decode(prefixes, codebooks[:-1])
  group = group_ids(prefixes)
  order = np.argsort(group, kind="stable")
  clash = np.zeros(group.max() + 1, bool)
  full = group_ids(codes)
  clash[group[np.bincount(full)[full] > 1]] = True
  codes = codes.copy()
  for members in np.split(order, np.flatnonzero(np.diff(group[order])) + 1):
    if clash[group[members[0]]]:
      cost = _distances(residual[members], codebooks[-1])
      codes[members, -1] = scipy.optimize.linear_sum_assignment(cost)[1]
  return codes


def _taken(
  codes: Int[np.ndarray, "I L"],
) -> dict[tuple[int, ...], set[int]]:
  """Prefix → last codes in use."""
  taken: dict[tuple[int, ...], set[int]] = {}
  for *prefix, last in codes.tolist():
    taken.setdefault(tuple(prefix), set()).add(last)
  return taken


def _no_room(number: int, prefix: tuple[int, ...]) -> ValueError:
  return ValueError(
    f"new item {number} (from 0) finds no free semantic ID under the codes "
    f"{prefix}; tokenize the whole catalogue again, with more codes or levels"
  )


def place_new(
  vectors: Float[np.ndarray, "I D"],
  nearest: Int[np.ndarray, "I L"],
  known: Int[np.ndarray, "I2 L"],
  codebooks: Codebooks,
) -> Int[np.ndarray, "I L"]:
  """Free IDs for new items: the nearest prefix with room, then last code.

  Args:
    vectors: [I, D] of the new items.
    nearest: [I, L] their arg-min codes.
    known: codes in use.
    codebooks: of all levels.

  Raises:
    ValueError: all prefixes that share the earlier codes are full.
  """
  taken = _taken(known)
  placed = np.empty_like(nearest)
  size = len(codebooks[-1])
  for number, (vector, codes) in enumerate(zip(vectors, nearest.tolist())):
    for prefix in _prefixes(vector, codes[:-1], codebooks):
      used = taken.setdefault(prefix, set())
      if len(used) < size:
        break
    else:
      raise _no_room(number, tuple(codes[:-2]))
    left = vector[None]
    if prefix:
      left = left - _decode(np.array([prefix]), codebooks)
    cost = _distances(left, codebooks[-1])[0]
    cost[list(used)] = np.inf
    last = int(np.argmin(cost))
    used.add(last)
    placed[number] = (*prefix, last)
  return placed


def _prefixes(
  vector: Float[np.ndarray, "D"], codes: list[int], codebooks: Codebooks
) -> list[tuple[int, ...]]:
  """Prefixes that differ from `codes` in their last level only, by distance."""
  if not codes:
    return [()]
  left = vector[None]
  if len(codes) > 1:
    left = left - _decode(np.array([codes[:-1]]), codebooks)
  cost = _distances(left, codebooks[len(codes) - 1])[0]
  return [(*codes[:-1], int(code)) for code in np.argsort(cost, kind="stable")]


def rank_new(
  vectors: Float[np.ndarray, "I D"],
  nearest: Int[np.ndarray, "I L"],
  known: Int[np.ndarray, "I2 L2"],
  codebooks: Codebooks,
  group_size: int,
) -> Int[np.ndarray, "I L2"]:
  """IDs with the next free rank for new items, where ranks tell apart.

  Args:
    vectors: [I, D] of the new items.
    nearest: [I, L] their arg-min codes.
    known: codes in use, the rank level included.
    codebooks: of the fitted levels.
    group_size: ranks there are.

  Raises:
    ValueError: all IDs that share the earlier codes are full.
  """
  taken = _taken(known)
  placed = []
  for number, (vector, codes) in enumerate(zip(vectors, nearest.tolist())):
    for prefix in _prefixes(vector, codes, codebooks):
      used = taken.setdefault(prefix, set())
      if len(used) < group_size:
        break
    else:
      raise _no_room(number, tuple(codes[:-1]))
    # Ranks are given in order, so those in use are 0 … n − 1.
    placed.append((*prefix, len(used)))
    used.add(len(used))
  return np.array(placed, np.int32)
