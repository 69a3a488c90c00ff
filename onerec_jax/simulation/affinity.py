"""Utility: how much an item is worth to a user now; satisfaction is its odds.

  utility(u, i) = b + q·quality_i + ⟨a·x_u + m·mood_u, v_i⟩ − ½|z_u − p_i|²/r²

with lasting interest x, mood, item latent v, the user's location z and the
item's place p. It is bilinear in the user's and the item's *factors*, so a
block of users against all items is one matrix product:

  user: [a·x + m·mood, z/r, 1, −½|z/r|²]
  item: [v, p/r, b + q·quality − ½|p/r|², 1]   (World.item_factors)

Two things lower it further: an item among the user's recent impressions
(`REPEAT`), and earlier items of the same topic in the same request
(`redundancy` each).
"""

import numpy as np
from jaxtyping import Bool, Float32, Int32

from onerec_jax.simulation.state import State
from onerec_jax.simulation.world import World

REPEAT = 3.0
"""Utility lost by an item the user has been shown of late."""


def user_factors(
  world: World,
  state: State,
  users: Int32[np.ndarray, "B"],
  interests: Float32[np.ndarray, "B D"] | None = None,
) -> Float32[np.ndarray, "B factors"]:
  """The user's side of utility, with other interests if given."""
  config = world.config
  x = state.interests[users] if interests is None else interests
  wish = config.affinity * x + config.momentum * state.mood[users]
  place = state.location[users] / np.float32(config.geo_radius_km)
  one = np.ones((len(users), 1), np.float32)
  far = -0.5 * (place**2).sum(axis=1, keepdims=True)
  return np.concatenate([wish, place, one, far], axis=1, dtype=np.float32)


def utilities(
  world: World, state: State, users: Int32[np.ndarray, "B"]
) -> Float32[np.ndarray, "B I"]:
  """Utility of every item, alone in a request."""
  utility = user_factors(world, state, users) @ world.item_factors.T
  recent = state.recent_items[users]
  row, column = np.nonzero(recent >= 0)
  # Set, not subtracted in place: an item may stand in the window twice.
  item = recent[row, column]
  repeated = np.zeros(utility.shape, bool)
  repeated[row, item] = True
  return utility - REPEAT * repeated.astype(np.float32)


def pair_utilities(
  world: World,
  state: State,
  users: Int32[np.ndarray, "B"],
  items: Int32[np.ndarray, "B choices"],
) -> Float32[np.ndarray, "B choices"]:
  """Utility of given items of each user, each alone in a request."""
  factors = user_factors(world, state, users)
  utility = np.einsum("bf,bcf->bc", factors, world.item_factors[items])
  recent = state.recent_items[users]
  for choice in range(items.shape[1]):
    repeated = (recent == items[:, choice, None]).any(axis=1)
    utility[:, choice] -= REPEAT * repeated
  return utility


def slate_utilities(
  world: World,
  state: State,
  users: Int32[np.ndarray, "B"],
  items: Int32[np.ndarray, "B slots"],
) -> Float32[np.ndarray, "B slots"]:
  """Utility of the items of one request, in their order."""
  utility = pair_utilities(world, state, users, items)
  topic = world.item_topic[items]
  for slot in range(1, items.shape[1]):
    same = (topic[:, :slot] == topic[:, slot, None]).sum(axis=1)
    utility[:, slot] -= world.config.redundancy * same
  return utility


def redundant(
  world: World, earlier: Int32[np.ndarray, "B slots"]
) -> Float32[np.ndarray, "B I"]:
  """Utility every item loses behind the earlier items of a request."""
  same = np.zeros((len(earlier), world.config.num_topics), np.float32)
  rows = np.arange(len(earlier))
  for slot in range(earlier.shape[1]):
    same[rows, world.item_topic[earlier[:, slot]]] += 1
  return world.config.redundancy * same[:, world.item_topic]


def eligible(
  world: World, state: State, users: Int32[np.ndarray, "B"]
) -> Bool[np.ndarray, "B I"]:
  """Items that are launched and not among the user's recent impressions."""
  launched = world.item_launch <= state.day
  allowed = np.repeat(launched[None], len(users), axis=0)
  recent = state.recent_items[users]
  row, column = np.nonzero(recent >= 0)
  allowed[row, recent[row, column]] = False
  return allowed


def sigmoid(x: Float32[np.ndarray, "..."]) -> Float32[np.ndarray, "..."]:
  """1 / (1 + e^−x); below −80 it stays at e^−80, where float32 ends."""
  return 1 / (1 + np.exp(np.minimum(-x, np.float32(80))))
