"""What an online test found: figures of two arms, and how sure they are.

Both arms serve the same users of the simulated world at the same moments
(onerec_jax/online.py), so every figure is a mean over *units* that both have:
user-days (every user, every day), or requests. Intervals are of the paired
bootstrap over users (bootstrap.py); what a user would have done anyway cancels.
Relative differences are of the control's mean, as the papers give them, and
their intervals count that it too was measured.

Figures a user-day (sums): `stay_s` (play time and swipes), `watch_s` (play
time), `views` (long views), `clicks`, `likes`, `follows`, `comments`,
`forwards`, and of cold items `cold_shown` and `cold_views`. Figures a request:
`satisfaction` (the mean true probability of a click, which no log has),
`duration_s` (mean length of the items shown), `topics` (different ones).
`exposure_entropy` is one number an arm: −Σ p log p over items, p an item's
share of all that was shown, in nats; the more, the wider the exposure.

An item is *cold* on a day if it was launched at most `COLD_DAYS` days before,
or was shown fewer than `COLD_SHOWN` times before the test. The same items are
so in both arms.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import scipy.sparse
from jaxtyping import Bool, Float

from onerec_jax.evaluation import bootstrap
from onerec_jax.simulation.step import SWIPE_MS, Events, concatenate
from onerec_jax.simulation.world import World

COLD_DAYS = 2
COLD_SHOWN = 20
USER_DAY = "user-day"
REQUEST = "request"
ENTROPY = "exposure_entropy"
FIRST_REQUESTS = 10
"""Requests of a user that `by_request` tells apart."""
_BLOCK = 50
"""Resamples whose exposures are held at once."""


@dataclasses.dataclass(frozen=True)
class Units:
  """What is averaged: N units in an order that is the same in both arms.

  Attributes:
    user: [N].
    day: [N] from the first of the test.
    values: figure → float64 [N].
  """

  user: np.ndarray
  day: np.ndarray
  values: dict[str, np.ndarray]


def user_days(
  world: World,
  days: Sequence[Events],
  cold: Sequence[Bool[np.ndarray, "I"]],
) -> Units:
  """Every user on every day, with or without a request.

  Args:
    world: the world.
    days: an arm's log, day by day.
    cold: which items are cold on each day.
  """
  num = world.config.num_users
  columns: dict[str, list[np.ndarray]] = {}
  for events, is_cold in zip(days, cold, strict=True):
    new = is_cold[events.item]
    watched = events.play_time / 1000
    flags = events.flags
    for name, amount in {
      "stay_s": watched + SWIPE_MS / 1000,
      "watch_s": watched,
      "views": flags["long_view"],
      "clicks": events.click,
      "likes": flags["like"],
      "follows": flags["follow"],
      "comments": flags["comment"],
      "forwards": flags["forward"],
      "cold_shown": new,
      "cold_views": new & flags["long_view"],
    }.items():
      total = np.bincount(events.user, amount.astype(np.float64), num)
      columns.setdefault(name, []).append(total)
  return Units(
    np.tile(np.arange(num), len(days)),
    np.repeat(np.arange(len(days)), num),
    {name: np.concatenate(parts) for name, parts in columns.items()},
  )


def requests(world: World, days: Sequence[Events]) -> Units:
  """Every request, in order of its number."""
  user, day, columns = [], [], {}
  slots = world.config.slots
  for number, events in enumerate(days):
    order = np.lexsort((events.position, events.request))
    item = events.item[order].reshape(-1, slots)
    user.append(events.user[order][::slots])
    day.append(np.full(len(item), number))
    topic = np.sort(world.item_topic[item], axis=1)
    for name, value in {
      "satisfaction": events.satisfaction[order].reshape(-1, slots).mean(1),
      "duration_s": world.item_duration[item].mean(axis=1) / 1000,
      "topics": 1 + (np.diff(topic, axis=1) > 0).sum(axis=1),
    }.items():
      columns.setdefault(name, []).append(value.astype(np.float64))
  return Units(
    np.concatenate(user),
    np.concatenate(day),
    {name: np.concatenate(parts) for name, parts in columns.items()},
  )


def cold_items(
  world: World, logged: Events, from_day: int, num_days: int
) -> list[np.ndarray]:
  """Which items are cold on each day of a test; see the module docstring.

  Args:
    world: the world.
    logged: the log before the test.
    from_day: its first day.
    num_days: how many.

  Returns:
    For each day bool [I].
  """
  shown = np.bincount(logged.item, minlength=world.config.num_items)
  days = range(from_day, from_day + num_days)
  return [
    (world.item_launch <= day)
    & ((world.item_launch >= day - COLD_DAYS) | (shown < COLD_SHOWN))
    for day in days
  ]


def compare(
  world: World,
  control: Sequence[Events],
  treatment: Sequence[Events],
  logged: Events,
  from_day: int,
) -> list[dict[str, Any]]:
  """All figures of both arms.

  Args:
    world: the world.
    control: its log, day by day.
    treatment: likewise.
    logged: the log before the test.
    from_day: the first day of the test.

  Returns:
    Of each figure `figure`, `unit`, `control`, `treatment` (means),
    `difference`, `low`, `high` (95%), `relative`, `relative_low`,
    `relative_high` (shares of the control's mean; NaN where that is 0).

  Raises:
    ValueError: the arms did not serve the same requests.
  """
  cold = cold_items(world, logged, from_day, len(control))
  rows, arms = [], (control, treatment)
  for unit, (a, b) in {
    USER_DAY: [user_days(world, arm, cold) for arm in arms],
    REQUEST: [requests(world, arm) for arm in arms],
  }.items():
    if not np.array_equal(a.user, b.user):
      raise ValueError(
        "the arms did not serve the same requests: play both from one state"
      )
    values = [np.stack([*x.values.values()], axis=1) for x in (a, b)]
    rows += [
      {"figure": name, "unit": unit, **found}
      for name, found in zip(a.values, differences(*values, a.user))
    ]
  entropies = exposure_entropies(*(_shown(world, a) for a in arms))
  return [*rows, {"figure": ENTROPY, "unit": "arm", **entropies}]


def differences(
  control: Float[np.ndarray, "N M"],
  treatment: Float[np.ndarray, "N M"],
  users: np.ndarray,
) -> list[dict[str, float]]:
  """Of each column means, difference and relative difference; see `compare`.

  Args:
    control: values of the units in one arm.
    treatment: of the same units in the other.
    users: [N] whose they are.
  """
  both = np.concatenate([control, treatment], axis=1)
  drawn = bootstrap.resampled_means(both, users)
  means = both.mean(axis=0)
  M = control.shape[1]
  return [
    _interval(means[m], means[M + m], drawn[:, m], drawn[:, M + m])
    for m in range(M)
  ]


def _interval(
  control: float, treatment: float, controls: np.ndarray, treatments: np.ndarray
) -> dict[str, float]:
  """A figure of both arms, and of resamples of both."""
  tail = (1 - bootstrap.LEVEL) / 2
  ends = lambda x: np.quantile(x, [tail, 1 - tail])
  low, high = ends(treatments - controls)
  relative = [np.nan] * 3
  if control and controls.all():
    relative = [treatment / control - 1, *ends(treatments / controls - 1)]
  values = (control, treatment, treatment - control, low, high, *relative)
  return dict(zip(_NAMES, map(float, values)))


_NAMES = (
  "control", "treatment", "difference", "low", "high",
  "relative", "relative_low", "relative_high",
)  # fmt: skip


def _shown(world: World, days: Sequence[Events]) -> scipy.sparse.csr_array:
  """How often each user was shown each item: [U, I]."""
  arm = concatenate(list(days))
  shape = world.config.num_users, world.config.num_items
  return scipy.sparse.csr_array(
    (np.ones(len(arm)), (arm.user, arm.item)), shape
  )


def exposure_entropies(
  control: scipy.sparse.csr_array, treatment: scipy.sparse.csr_array
) -> dict[str, float]:
  """Exposure entropy of both arms, users resampled together.

  Entropy is not linear: users drawn again cover fewer items, so resamples lie
  below the figure, the more so the wider an arm's exposure, and their quantiles
  may not even hold it. The question is what as many users would have been
  shown, of which the figure itself is an unbiased estimate; so the resamples
  tell only the spread, and are moved to have the figure as their mean.
  Reflected quantiles, 2 · figure − q, would lie as far above the figure.

  Args:
    control: [U, I] how often each user was shown each item.
    treatment: likewise.
  """
  shown = (control, treatment)
  num_users = control.shape[0]
  rng = np.random.default_rng(0)
  drawn: list[np.ndarray] = []
  for start in range(0, bootstrap.RESAMPLES, _BLOCK):
    rows = min(_BLOCK, bootstrap.RESAMPLES - start)
    weight = rng.multinomial(num_users, np.full(num_users, 1 / num_users), rows)
    drawn.append(np.stack([_entropy(weight @ arm) for arm in shown]))
  resampled = np.concatenate(drawn, axis=1)
  point = [_entropy(np.ones((1, num_users)) @ arm)[0] for arm in shown]
  resampled += np.subtract(point, resampled.mean(axis=1))[:, None]
  return _interval(*point, *resampled)


def _entropy(counts: np.ndarray) -> np.ndarray:
  """Of each row's shares, in nats."""
  # Users who were shown nothing may be all that a draw has: entropy 0.
  share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
  return -(share * np.log(np.where(share > 0, share, 1.0))).sum(axis=1)


def by_day(
  world: World,
  arms: dict[str, Sequence[Events]],
  logged: Events,
  from_day: int,
) -> list[dict[str, Any]]:
  """Each arm's means of each day: rows of `arm`, `day`, and every figure."""
  rows = []
  for name, days in arms.items():
    cold = cold_items(world, logged, from_day, len(days))
    units = user_days(world, days, cold), requests(world, days)
    for day in range(len(days)):
      row: dict[str, Any] = {"arm": name, "day": from_day + day}
      for unit in units:
        here = unit.day == day
        row |= {n: float(v[here].mean()) for n, v in unit.values.items()}
      rows.append(row)
  return rows


def by_request(
  world: World, arms: dict[str, Sequence[Events]]
) -> list[dict[str, Any]]:
  """Each arm's means of the users' first, second, … request of the test.

  An arm's first answers follow what the log showed, later ones what it showed
  itself, which no model saw in training. Of a test of several days the n-th
  requests are of different days, and of different models where arms learn.

  Args:
    world: the world.
    arms: name → its log, day by day.

  Returns:
    Rows of `arm`, `request` from 1 to at most `FIRST_REQUESTS`, `users` who
    made so many, `watch_s`, and the figures of `requests`.
  """
  rows, slots = [], world.config.slots
  for name, days in arms.items():
    units = requests(world, days)
    watched = [
      events.play_time[np.lexsort((events.position, events.request))]
      for events in days
    ]
    seconds = np.concatenate(watched).reshape(-1, slots).sum(axis=1) / 1000
    nth = _nth(units.user)
    for number in range(1, min(nth.max(initial=0), FIRST_REQUESTS) + 1):
      here = nth == number
      row = {"arm": name, "request": number, "users": int(here.sum())}
      values = {"watch_s": seconds, **units.values}
      rows.append(row | {n: float(v[here].mean()) for n, v in values.items()})
  return rows


def _nth(user: np.ndarray) -> np.ndarray:
  """How often each entry's user has come until then, itself included."""
  order = np.argsort(user, kind="stable")
  first = np.searchsorted(user[order], user[order])
  nth = np.empty(len(user), np.int64)
  nth[order] = np.arange(len(user)) - first + 1
  return nth
