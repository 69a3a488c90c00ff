"""What changes from day to day, and saving it."""

import dataclasses
import io

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from onerec_jax import files
from onerec_jax.simulation import streams
from onerec_jax.simulation.world import World, draw_interests, draw_locations

DAY_ZERO_MS = 1_704_067_200_000
"""The world begins on 1 January 2024, 00:00 UTC."""
DAY_MS = 86_400_000

_FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class State:
  """The morning of a day; inside a day, as of the request at hand.

  Attributes:
    day: the day that the next step plays.
    interests: lasting interest of each user, unit length.
    mood: what the user clicked of late, length about 1; 0 in the morning.
    location: km; where the user is this day.
    clock: ms since 1970; the end of the user's last impression.
    popularity: relative clicks of each item (mean 1), up to this morning.
    recent_items: the user's last impressions, oldest first; −1 is none.
    recent_clicks: whether those were clicked.
  """

  day: int
  interests: Float32[np.ndarray, "U D"]
  mood: Float32[np.ndarray, "U D"]
  location: Float32[np.ndarray, "U 2"]
  clock: Int64[np.ndarray, "U"]
  popularity: Float32[np.ndarray, "I"]
  recent_items: Int32[np.ndarray, "U window"]
  recent_clicks: Bool[np.ndarray, "U window"]

  @classmethod
  def initial(cls, world: World) -> "State":
    """The morning of day 0."""
    config = world.config
    users = np.arange(config.num_users, dtype=np.int32)
    rng = streams.stream(config.seed, streams.DRIFT, 0)
    interests = draw_interests(world, users, rng)
    window = (config.num_users, world.repeat_window)
    return cls(
      day=0,
      interests=interests,
      mood=np.zeros_like(interests),
      location=draw_locations(world, 0),
      clock=np.full(config.num_users, DAY_ZERO_MS, np.int64),
      popularity=world.item_popularity.copy(),
      recent_items=np.full(window, -1, np.int32),
      recent_clicks=np.zeros(window, bool),
    )

  def copy(self) -> "State":
    """A state that shares no array with this one."""
    arrays = {
      f.name: getattr(self, f.name).copy()
      for f in dataclasses.fields(self)
      if f.name != "day"
    }
    return State(day=self.day, **arrays)

  def save(self, path: files.PathLike) -> None:
    """Writes an .npz, whole or not at all."""
    buffer = io.BytesIO()
    values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
    np.savez(buffer, format_version=_FORMAT_VERSION, **values)
    files.write_bytes(path, buffer.getvalue())

  @classmethod
  def load(cls, path: files.PathLike) -> "State":
    """Reads what `save` wrote.

    Raises:
      ValueError: another format version.
    """
    with np.load(path, allow_pickle=False) as saved:
      version = int(saved["format_version"])
      if version != _FORMAT_VERSION:
        raise ValueError(
          f"{path} has format version {version}, this code reads "
          f"{_FORMAT_VERSION}; simulate the days again from State.initial"
        )
      values = {f.name: saved[f.name] for f in dataclasses.fields(cls)}
    return cls(**(values | {"day": int(values["day"])}))


def next_morning(
  world: World, evening: State, clicks: Int64[np.ndarray, "I"]
) -> State:
  """The state after a night: interests drift, moods fade, news spread.

  x ← unit(√(1 − δ²)·x + δ·fresh) with the user's own δ; popularity ←
  0.7·popularity + 0.3·clicks / mean clicks (clicks of the day).
  """
  users = np.arange(world.config.num_users, dtype=np.int32)
  day = evening.day + 1
  rng = streams.stream(world.config.seed, streams.DRIFT, day)
  fresh = draw_interests(world, users, rng)
  share = world.user_drift[:, None]
  interests = np.sqrt(1 - share**2) * evening.interests + share * fresh
  interests /= np.linalg.norm(interests, axis=1, keepdims=True)
  relative = clicks / max(clicks.mean(), 1.0 / len(clicks))
  popularity = 0.7 * evening.popularity + 0.3 * relative
  return dataclasses.replace(
    evening,
    day=day,
    interests=interests,
    mood=np.zeros_like(evening.mood),
    location=draw_locations(world, day),
    popularity=popularity.astype(np.float32),
  )
