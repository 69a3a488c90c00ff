"""A recommender as a policy of the simulated world: it serves, and remembers.

`Histories` is what a recommender knows of each user: the prepared log, and
whatever the user was shown since, left out, marked and bucketed as preparation
does it (data/prepare.py), so that a model reads today's events as it read those
it was trained on. `RecommenderPolicy` asks a model with these histories, and
lets it choose only what may be shown: items that are launched and not within
the world's repeat window.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int32

from onerec_jax import config as config_lib
from onerec_jax.data import features, marks, shards
from onerec_jax.data import rows as rows_lib
from onerec_jax.data.datasets import simulator
from onerec_jax.simulation import affinity
from onerec_jax.simulation.feedback import Feedback
from onerec_jax.simulation.policies import Slate
from onerec_jax.simulation.state import State
from onerec_jax.simulation.world import World

Answer = Callable[
  [Sequence[rows_lib.History], np.ndarray], tuple[np.ndarray, np.ndarray]
]
"""(histories, allowed bool [B, I + 1]) → (dense items [B, slots] of which none
comes twice in a row, log-probability of each [B, slots], NaN unknown)."""


class Histories:
  """What is known of every user of a world.

  Args:
    prepared: of the world's log.
    config: how it was prepared.
    world: the world.
    until_ms: stored events from here on are not known yet; None: all are.

  Raises:
    ValueError: data of another world, or with items in another order.
  """

  def __init__(
    self,
    prepared: shards.PreparedData,
    config: config_lib.PrepareConfig,
    world: World,
    until_ms: int | None = None,
  ):
    if config.simulation != world.config:
      raise ValueError(
        f"{prepared.directory} was made by another world than the one to be "
        f"served: {config.simulation} is not {world.config}"
      )
    check(prepared, world)
    self._prepared, self._where = prepared, config.where.strip()
    self._known: list[rows_lib.History] = []
    self._last = np.full(world.config.num_users, -1, np.int64)
    place = {
      int(raw[1:]): index
      for index, raw in enumerate(prepared.users["raw_id"].to_pylist())
    }
    newcomers = None
    for user in range(world.config.num_users):
      if user in place:
        record = prepared.user(place[user])
        number = len(record.items)
        if until_ms is not None:
          number = int(np.searchsorted(record.timestamps, until_ms))
        self._known.append(rows_lib.before(prepared, record, number))
        if number:
          self._last[user] = record.timestamps[number - 1]
        continue
      if newcomers is None:
        newcomers = simulator.users_table(world).to_pylist()
      self._known.append(self._newcomer(newcomers[user]))

  def of(self, users: Int32[np.ndarray, "B"]) -> list[rows_lib.History]:
    """What is known of these users now."""
    return [self._known[user] for user in users.tolist()]

  def observe(
    self,
    state: State,
    users: np.ndarray,
    requests: np.ndarray,
    slate: Slate,
    given: Feedback,
    shown: np.ndarray,
  ) -> None:
    """Remembers what users were shown; a simulation.step.Observer."""
    del state, requests
    kept, columns = self._kept(slate, given)
    bucketed = self._bucket(users, kept, columns, shown)
    positive = _holds(self._prepared.manifest, columns, kept.shape)
    items = (slate.items + 1).astype(np.int32)
    for row, user in enumerate(users.tolist()):
      mine = kept[row]
      if not mine.any():
        continue
      old = self._known[user]
      new = old._replace(
        items=np.concatenate([old.items, items[row, mine]]),
        positive=np.concatenate([old.positive, positive[row, mine]]),
        features={
          name: np.concatenate([values, bucketed[name][row, mine]])
          for name, values in old.features.items()
        },
      )
      if self._prepared.snapshots is not None:
        lifelong = self._prepared.snapshots.of_history(new.items, new.features)
        new = new._replace(lifelong=lifelong)
      self._known[user] = new
      self._last[user] = shown[row, mine][-1]

  def _newcomer(self, columns: dict[str, str]) -> rows_lib.History:
    """A user without a stored event."""
    none = np.zeros(0, np.int32)
    manifest = self._prepared.manifest
    return rows_lib.History(
      none,
      dict.fromkeys(manifest["event_features"], none),
      np.zeros(0, bool),
      features.user_features(manifest["bucketing"], columns),
    )

  def _kept(
    self, slate: Slate, given: Feedback
  ) -> tuple[Bool[np.ndarray, "B slots"], dict[str, np.ndarray]]:
    """Which slots preparation would keep, and all their columns, flat."""
    slots = np.broadcast_to(
      np.arange(slate.items.shape[1], dtype=np.float64), slate.items.shape
    )
    named = {
      "position": slots,
      "play_time_ms": given.play_time,
      "log_probability": slate.log_probability,
      "click": given.click,
      **given.flags,
    }
    columns = {n: v.astype(np.float64).ravel() for n, v in named.items()}
    if not self._where:
      return np.ones(slate.items.shape, bool), columns
    condition = {**self._prepared.manifest, "positive": self._where}
    return _holds(condition, columns, slate.items.shape), columns

  def _bucket(
    self,
    users: np.ndarray,
    kept: np.ndarray,
    columns: dict[str, np.ndarray],
    shown: np.ndarray,
  ) -> dict[str, np.ndarray]:
    """Event feature → int32 [B, slots], gaps between kept events alone."""
    last = np.where(kept, shown, -1)
    before = np.concatenate([self._last[users, None], last[:, :-1]], axis=1)
    before = np.maximum.accumulate(before, axis=1)
    gap = np.where(before < 0, np.nan, shown - before)
    found = features.event_features(
      self._prepared.manifest["bucketing"],
      {**columns, "gap": gap.ravel()},
      shown.ravel(),
    )
    return {n: values.reshape(kept.shape) for n, values in found.items()}


def _holds(
  manifest: dict[str, Any], columns: dict[str, np.ndarray], shape: tuple
) -> np.ndarray:
  """Where the manifest's condition holds, by slot."""
  values = {name: column.tolist() for name, column in columns.items()}
  found = marks.positive_events(manifest, values, math.prod(shape))
  return found.reshape(shape)


def check(prepared: shards.PreparedData, world: World) -> None:
  """Refuses data whose dense item i + 1 is not item i of the world.

  Raises:
    ValueError: it is not.
  """
  raw = prepared.items["raw_id"].to_pylist()
  if raw != [f"i{item}" for item in range(world.config.num_items)]:
    raise ValueError(
      f"the {len(raw)} items of {prepared.directory} are not the "
      f"{world.config.num_items} of the simulated world in their order; "
      "prepare the data set 'simulator' with the same prepare.simulation"
    )


@dataclasses.dataclass(frozen=True)
class RecommenderPolicy:
  """Asks a recommender; a simulation.policies.Policy.

  Its log-probabilities are those the recommender gives, of each item as the
  model would have generated it, whatever else was allowed.
  """

  world: World
  histories: Histories
  answer: Answer

  def __call__(
    self,
    state: State,
    users: Int32[np.ndarray, "B"],
    noise: Float64[np.ndarray, "B slots"],
  ) -> Slate:
    """The best items; `noise` gives only the number of slots.

    Raises:
      ValueError: a slot stays empty.
    """
    allowed = np.zeros((len(users), self.world.config.num_items + 1), bool)
    allowed[:, 1:] = affinity.eligible(self.world, state, users)
    items, log_probability = self.answer(self.histories.of(users), allowed)
    items, log_probability = (
      x[:, : noise.shape[1]] for x in (items, log_probability)
    )
    if items.shape != noise.shape or (items <= 0).any():
      raise ValueError(
        f"the recommender fills fewer than {noise.shape[1]} slots of a request "
        f"on day {state.day}: raise evaluation.beam_width of its run"
      )
    return Slate(items.astype(np.int32) - 1, log_probability.astype(np.float32))
