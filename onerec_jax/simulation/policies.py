"""Policies choose what is shown, and say with what probability they did.

A Plackett–Luce policy has a weight w_i for every item of a request and fills
the slots one by one without replacement, so the probability of item i in slot
j, given the items before it, is

  π(i | earlier) = w_i / Σ_{k not in earlier} w_k     (0 for earlier items)

and a request's probability is the product over its slots.
"""

import dataclasses
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Float64, Int32

from onerec_jax.simulation import affinity, streams
from onerec_jax.simulation.state import State
from onerec_jax.simulation.world import World

_BLOCK = 64
# Far enough below 1 that rounding cannot lead past the last weight.
_BELOW_ONE = 1.0 - 2.0**-40
_COLD = 0.1
"""Added to relative popularity: what an item nobody has seen starts from."""


class Slate(NamedTuple):
  """What requests are shown.

  Attributes:
    items: item numbers (from 0), no item twice in a request.
    log_probability: natural log of the probability of each item in its slot
      given the user's state and the earlier slots; NaN where unknown.
  """

  items: Int32[np.ndarray, "B slots"]
  log_probability: Float32[np.ndarray, "B slots"]


@runtime_checkable
class Policy(Protocol):
  """Anything that fills the slots of one request of each given user."""

  def __call__(
    self,
    state: State,
    users: Int32[np.ndarray, "B"],
    noise: Float64[np.ndarray, "B slots"],
  ) -> Slate:
    """Chooses.

    Args:
      state: as of this request; `recent_items` and `recent_clicks` are what a
        recommender may know of the users, the rest only an oracle.
      users: user numbers, each at most once.
      noise: uniform in [0, 1), the user's own: a policy that draws from
        nothing else is reproducible however the users are chunked, and two
        policies can be compared under common random numbers.
    """
    ...


@runtime_checkable
class PlackettLucePolicy(Policy, Protocol):
  """A policy with known weights, as the truth needs (truth.py)."""

  def weights(
    self, state: State, users: Int32[np.ndarray, "B"]
  ) -> Float32[np.ndarray, "B I"]:
    """Weights of the first slot; 0 for what cannot be shown."""
    ...


@dataclasses.dataclass(frozen=True)
class LoggingPolicy:
  """Softmax of estimated utility and popularity; what makes the logs.

    log w = (utility with x + error for x + c·log(popularity + 0.1)) / τ

  with a fixed error per user, the popularity of this morning (so clicks feed
  back into exposure), c = `popularity_weight` and τ = `temperature`. Items
  not yet launched or shown of late have weight 0.
  """

  world: World
  error: Float32[np.ndarray, "U D"]

  @classmethod
  def create(cls, world: World) -> "LoggingPolicy":
    """The logging policy of a world; its error is part of the world's seed."""
    config = world.config
    rng = streams.stream(config.seed, streams.ESTIMATES)
    shape = (config.num_users, config.latent_size)
    error = rng.standard_normal(shape, np.float32)
    length = config.estimate_noise / np.sqrt(config.latent_size)
    return cls(world, error * np.float32(length))

  def weights(
    self, state: State, users: Int32[np.ndarray, "B"]
  ) -> Float32[np.ndarray, "B I"]:
    """Weights with the largest of each row scaled to 1."""
    config = self.world.config
    interests = state.interests[users] + self.error[users]
    of_users = affinity.user_factors(self.world, state, users, interests)
    of_items = self.world.item_factors.copy()
    popularity = np.log(state.popularity + _COLD)
    # The column before last meets the 1 of the user's factors.
    of_items[:, -2] += config.popularity_weight * popularity
    of_items[self.world.item_launch > state.day, -2] = -np.inf
    logits = (of_users / np.float32(config.temperature)) @ of_items.T
    recent = state.recent_items[users]
    row, column = np.nonzero(recent >= 0)
    logits[row, recent[row, column]] = -np.inf
    logits -= logits.max(axis=1, keepdims=True)
    return np.exp(logits, out=logits)

  def __call__(
    self,
    state: State,
    users: Int32[np.ndarray, "B"],
    noise: Float64[np.ndarray, "B slots"],
  ) -> Slate:
    """Draws from Plackett–Luce."""
    return sample(self.weights(state, users), noise)


@dataclasses.dataclass(frozen=True)
class UniformPolicy:
  """Every item that may be shown, equally likely."""

  world: World

  def weights(
    self, state: State, users: Int32[np.ndarray, "B"]
  ) -> Float32[np.ndarray, "B I"]:
    """1 or 0."""
    return affinity.eligible(self.world, state, users).astype(np.float32)

  def __call__(
    self,
    state: State,
    users: Int32[np.ndarray, "B"],
    noise: Float64[np.ndarray, "B slots"],
  ) -> Slate:
    """Draws without replacement."""
    return sample(self.weights(state, users), noise)


@dataclasses.dataclass(frozen=True)
class GreedyTruePolicy:
  """An oracle: slot by slot the item with the highest true satisfaction.

  Deterministic: every log-probability is 0.
  """

  world: World

  def __call__(
    self,
    state: State,
    users: Int32[np.ndarray, "B"],
    noise: Float64[np.ndarray, "B slots"],
  ) -> Slate:
    """Chooses; `noise` gives only the number of slots."""
    utility = affinity.utilities(self.world, state, users)
    utility[~affinity.eligible(self.world, state, users)] = -np.inf
    items = np.zeros(noise.shape, np.int32)
    for slot in range(noise.shape[1]):
      loss = affinity.redundant(self.world, items[:, :slot])
      items[:, slot] = (utility - loss).argmax(axis=1)
      np.put_along_axis(utility, items[:, slot, None], -np.inf, axis=1)
    return Slate(items, np.zeros(noise.shape, np.float32))


def sample(
  weights: Float32[np.ndarray, "B I"], noise: Float64[np.ndarray, "B slots"]
) -> Slate:
  """Plackett–Luce by inverse distribution functions, one number a slot.

  Args:
    weights: at least as many above 0 in each row as there are slots.
    noise: uniform in [0, 1); the only randomness.

  Raises:
    ValueError: a row has too few items to fill the slots.
  """
  rows, num_items = weights.shape
  blocks = -(-num_items // _BLOCK)
  padded = np.zeros((rows, blocks, _BLOCK), np.float32)
  padded.reshape(rows, blocks * _BLOCK)[:, :num_items] = weights
  sums = padded.sum(axis=2, dtype=np.float32).astype(np.float64)
  row = np.arange(rows)
  items = np.zeros(noise.shape, np.int32)
  log_probability = np.zeros(noise.shape, np.float32)
  for slot in range(noise.shape[1]):
    block, rest, total = _pick(sums, noise[:, slot])
    if not (total > 0).all():
      raise ValueError(
        f"only {slot} of {noise.shape[1]} slots can be filled: too few items "
        f"have a weight above 0 (row {int((total <= 0).argmax())}); simulate "
        "more items or fewer slots"
      )
    within, _, _ = _pick(padded[row, block].astype(np.float64), rest)
    items[:, slot] = block * _BLOCK + within
    log_probability[:, slot] = np.log(padded[row, block, within] / total)
    padded[row, block, within] = 0
    sums[row, block] = padded[row, block].sum(axis=1)
  return Slate(items, np.minimum(log_probability, 0))


def slate_log_probability(
  weights: Float32[np.ndarray, "B I"], items: Int32[np.ndarray, "B slots"]
) -> Float32[np.ndarray, "B slots"]:
  """Natural log of π(item | earlier slots), slot by slot, of given slates."""
  chosen = np.take_along_axis(weights, items, axis=1).astype(np.float64)
  total = weights.sum(axis=1, keepdims=True, dtype=np.float64)
  before = np.cumsum(chosen, axis=1) - chosen
  with np.errstate(divide="ignore"):
    return np.log(chosen / (total - before)).astype(np.float32)


def _pick(
  weights: Float64[np.ndarray, "B choices"], noise: Float64[np.ndarray, "B"]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """The choice, the noise left over in [0, 1), and the sum of the weights."""
  cumulative = np.cumsum(weights, axis=1)
  total = cumulative[:, -1]
  target = np.minimum(noise, _BELOW_ONE) * total
  # The first sum above the target: its weight is above 0.
  choice = (cumulative <= target[:, None]).sum(axis=1)
  choice = np.minimum(choice, weights.shape[1] - 1)
  row = np.arange(len(weights))
  weight = weights[row, choice]
  before = cumulative[row, choice] - weight
  with np.errstate(divide="ignore", invalid="ignore"):
    rest = np.nan_to_num((target - before) / weight)
  return choice, np.clip(rest, 0.0, _BELOW_ONE), total
