"""One day of the world, and several.

Users do not touch each other within a day (popularity is the morning's), so
a day is played in rounds, the r-th request of every user at once, and a round
in chunks of users. All randomness is drawn per day and round for all users,
so neither chunks nor earlier days change it.
"""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64
from rich import progress

from onerec_jax.simulation import feedback as feedback_lib
from onerec_jax.simulation import streams
from onerec_jax.simulation.policies import Policy, Slate
from onerec_jax.simulation.state import (
  DAY_MS,
  DAY_ZERO_MS,
  State,
  next_morning,
)
from onerec_jax.simulation.world import World

MAX_REQUESTS = 64
"""Of one user on one day."""
SWIPE_MS = 500
"""Between the end of one item and the start of the next."""

_WAKING_MS = (7 * 3_600_000, 22 * 3_600_000)
# Entries of a chunk's users × items matrices (16 MiB each).
_CHUNK_ENTRIES = 1 << 22

Observer = Callable[
  [State, np.ndarray, np.ndarray, Slate, feedback_lib.Feedback, np.ndarray],
  None,
]
"""Sees (state, users, request ids, slate, feedback, times) of every chunk: the
state as it was at the requests, and when each slot was shown, int64 ms."""


@dataclasses.dataclass(frozen=True)
class Events:
  """The log: one row an impression, in order of time.

  Attributes:
    user: user number, from 0.
    item: item number, from 0.
    timestamp: ms since 1970, when the item was shown.
    request: unique number of the request.
    position: slot in the request, from 0.
    play_time: ms.
    log_probability: of the item in its slot given the earlier slots, under
      the policy that showed it; NaN where unknown.
    location: km; where the user was.
    click: the positive feedback.
    flags: name → whether it happened.
    satisfaction: the true probability of the click; not for any log.
  """

  user: Int32[np.ndarray, "N"]
  item: Int32[np.ndarray, "N"]
  timestamp: Int64[np.ndarray, "N"]
  request: Int64[np.ndarray, "N"]
  position: Int32[np.ndarray, "N"]
  play_time: Int64[np.ndarray, "N"]
  log_probability: Float32[np.ndarray, "N"]
  location: Float32[np.ndarray, "N 2"]
  click: Bool[np.ndarray, "N"]
  flags: dict[str, np.ndarray]
  satisfaction: Float32[np.ndarray, "N"]

  def __len__(self) -> int:
    return len(self.user)

  def take(self, rows: np.ndarray) -> "Events":
    """The given rows (numbers, a mask or a slice)."""
    values = {
      f.name: getattr(self, f.name)[rows]
      for f in dataclasses.fields(self)
      if f.name != "flags"
    }
    flags = {name: flag[rows] for name, flag in self.flags.items()}
    return Events(flags=flags, **values)


def concatenate(parts: list[Events]) -> Events:
  """Logs one after the other; at least one."""
  values = {
    f.name: np.concatenate([getattr(p, f.name) for p in parts])
    for f in dataclasses.fields(Events)
    if f.name != "flags"
  }
  flags = {
    name: np.concatenate([p.flags[name] for p in parts])
    for name in parts[0].flags
  }
  return Events(flags=flags, **values)


def step(
  world: World,
  state: State,
  policy: Policy,
  observe: Observer | None = None,
  chunk_size: int = 0,
) -> tuple[State, Events]:
  """Plays the day `state.day`.

  Args:
    world: the world.
    state: a morning; it is not changed.
    policy: fills the slots of every request.
    observe: called for every chunk of requests.
    chunk_size: users at once; 0: what keeps a users × items matrix at 16 MiB.
      Results do not depend on it beyond float32 rounding of matrix products.

  Returns:
    The next morning, and the day's log.

  Raises:
    ValueError: the policy shows an item that is not there, or one twice.
  """
  config = world.config
  chunk_size = chunk_size or max(1, _CHUNK_ENTRIES // config.num_items)
  visits = streams.stream(config.seed, streams.VISITS, state.day)
  counts, starts = _visits(world, state.day, visits)
  slates = streams.stream(config.seed, streams.SLATES, state.day)
  answers = streams.stream(config.seed, streams.FEEDBACK, state.day)
  shape = (config.num_users, config.slots)
  now = state.copy()
  parts = [_no_events(config.slots)]
  for r in range(int(counts.max())):
    noise = slates.random(shape)
    uniforms = answers.random((*shape, feedback_lib.NUM_UNIFORMS), np.float32)
    normals = answers.standard_normal(shape, np.float32)
    here = np.flatnonzero(counts > r).astype(np.int32)
    for first in range(0, len(here), chunk_size):
      users = here[first : first + chunk_size]
      slate = policy(now, users, noise[users])
      _check_slate(world, now, users, slate)
      given = feedback_lib.draw(
        world, now, users, slate.items, uniforms[users], normals[users]
      )
      request = (state.day * MAX_REQUESTS + r) * config.num_users
      requests = request + users.astype(np.int64)
      shown = _times(now, users, starts[users, r], given.play_time)
      if observe is not None:
        observe(now, users, requests, slate, given, shown)
      parts.append(_log(now, users, requests, shown, slate, given))
      _remember(world, now, users, shown, slate.items, given)
  events = concatenate(parts)
  events = events.take(np.argsort(events.timestamp, kind="stable"))
  clicks = np.bincount(events.item[events.click], minlength=config.num_items)
  return next_morning(world, now, clicks.astype(np.int64)), events


def run(
  world: World,
  policy: Policy,
  num_days: int | None = None,
  state: State | None = None,
  observe: Observer | None = None,
) -> tuple[State, Events]:
  """Plays days from a state (the beginning) on, `config.num_days` of them."""
  state = State.initial(world) if state is None else state
  num_days = world.config.num_days if num_days is None else num_days
  parts = [_no_events(world.config.slots)]
  for _ in progress.track(
    range(num_days), description="simulating days", transient=True
  ):
    state, events = step(world, state, policy, observe)
    parts.append(events)
  return state, concatenate(parts)


def _visits(
  world: World, day: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
  """Requests of each user this day, and their times in order."""
  counts = np.minimum(rng.poisson(world.user_rate), MAX_REQUESTS)
  times = rng.integers(*_WAKING_MS, (len(counts), int(counts.max(initial=0))))
  # Slots beyond a user's count go to the end, then the others are in order.
  times[np.arange(times.shape[1]) >= counts[:, None]] = DAY_MS
  return counts, DAY_ZERO_MS + day * DAY_MS + np.sort(times, axis=1)


def _times(
  state: State, users: np.ndarray, start: np.ndarray, play_time: np.ndarray
) -> np.ndarray:
  """When each slot is shown: one after the other, never before the last."""
  start = np.maximum(start, state.clock[users])
  before = np.cumsum(play_time + SWIPE_MS, axis=1) - play_time
  return start[:, None] + before


def _remember(
  world: World,
  state: State,
  users: np.ndarray,
  shown: np.ndarray,
  items: np.ndarray,
  given: feedback_lib.Feedback,
) -> None:
  """Writes the requests into a state that `step` owns.

  mood ← ρ·mood + (1 − ρ)·mean latent of the clicked items (if any).
  """
  state.clock[users] = shown[:, -1] + given.play_time[:, -1] + SWIPE_MS
  weight = given.click.astype(np.float32)
  latents = world.item_latent[items]
  mean = np.einsum("bs,bsd->bd", weight, latents)
  mean /= np.maximum(weight.sum(axis=1, keepdims=True), 1)
  left = np.float32(world.config.momentum_decay)
  state.mood[users] = left * state.mood[users] + (1 - left) * mean
  window = state.recent_items.shape[1]
  for array, new in (
    (state.recent_items, items),
    (state.recent_clicks, given.click),
  ):
    longer = np.concatenate([array[users], new], axis=1)
    array[users] = longer[:, longer.shape[1] - window :]


def _log(
  state: State,
  users: np.ndarray,
  requests: np.ndarray,
  shown: np.ndarray,
  slate: Slate,
  given: feedback_lib.Feedback,
) -> Events:
  slots = slate.items.shape[1]
  return Events(
    user=np.repeat(users, slots),
    item=slate.items.ravel(),
    timestamp=shown.ravel(),
    request=np.repeat(requests, slots),
    position=np.tile(np.arange(slots, dtype=np.int32), len(users)),
    play_time=given.play_time.ravel(),
    log_probability=slate.log_probability.ravel(),
    location=np.repeat(state.location[users], slots, axis=0),
    click=given.click.ravel(),
    flags={name: flag.ravel() for name, flag in given.flags.items()},
    satisfaction=given.satisfaction.ravel(),
  )


def _no_events(slots: int) -> Events:
  """An empty log, so that a day without requests has the columns too."""
  none = np.zeros((0, slots), np.float32)
  names = ("long_view", "dislike", *feedback_lib.RATES)
  given = feedback_lib.Feedback(
    none, none > 0, none.astype(np.int64), {n: none > 0 for n in names}
  )
  return Events(
    user=np.zeros(0, np.int32),
    item=np.zeros(0, np.int32),
    timestamp=np.zeros(0, np.int64),
    request=np.zeros(0, np.int64),
    position=np.zeros(0, np.int32),
    play_time=np.zeros(0, np.int64),
    log_probability=np.zeros(0, np.float32),
    location=np.zeros((0, 2), np.float32),
    click=np.zeros(0, bool),
    flags={n: f.ravel() for n, f in given.flags.items()},
    satisfaction=np.zeros(0, np.float32),
  )


def _check_slate(
  world: World, state: State, users: np.ndarray, slate: Slate
) -> None:
  items = slate.items
  shape = (len(users), world.config.slots)
  if items.shape != shape or slate.log_probability.shape != shape:
    raise ValueError(
      f"the policy gave items {items.shape} and log-probabilities "
      f"{slate.log_probability.shape}; both must be {shape}, users × slots"
    )
  there = (items >= 0) & (items < world.config.num_items)
  launched = world.item_launch[np.where(there, items, 0)] <= state.day
  ordered = np.sort(items, axis=1)
  once = (ordered[:, 1:] != ordered[:, :-1]).all(axis=1)
  wrong = ~(there & launched).all(axis=1) | ~once
  if wrong.any():
    row = int(wrong.argmax())
    raise ValueError(
      f"the policy shows user {int(users[row])} the items "
      f"{items[row].tolist()} on day {state.day}: each must be one of the "
      f"{world.config.num_items} items, launched by then (world.item_launch), "
      "and stand there once"
    )
