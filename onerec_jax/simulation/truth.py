"""What is true of the world, for judging what was learned.

Next-event optimum. The next clicked item of a user, given everything about
the world just before the slot in which the click happens, has

  q(i) = π(i | state, earlier slots) · s(i | state, earlier slots) / Z

with the Plackett–Luce policy π that made the log and the click probability s
(conditioning on the click gives Z = Σ π·s). Nobody can do better at k guesses
than the k items with the largest q, so Recall@k of any recommender on the
logged clicks is, in expectation, at most the mean over clicks of Σ_top-k q.
A recommender knows less (the user's past only) so that its own optimum lies
below; the bound is the oracle's, reached by ranking with q itself. It holds
unfiltered and seen-filtered alike: an item within the repeat window has q = 0.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float32, Int32, Int64

from onerec_jax.simulation import affinity, feedback
from onerec_jax.simulation.feedback import Feedback
from onerec_jax.simulation.policies import (
  GreedyTruePolicy,
  PlackettLucePolicy,
  Policy,
  Slate,
)
from onerec_jax.simulation.state import State
from onerec_jax.simulation.step import run
from onerec_jax.simulation.world import World


def true_preference(
  world: World,
  state: State,
  users: Int32[np.ndarray, "B"],
  items: Int32[np.ndarray, "B choices"],
) -> Float32[np.ndarray, "B choices"]:
  """Satisfaction with each item on its own: the probability of a click."""
  return affinity.sigmoid(affinity.pair_utilities(world, state, users, items))


def true_slate_value(
  world: World,
  state: State,
  users: Int32[np.ndarray, "B"],
  items: Int32[np.ndarray, "B slots"],
) -> Float32[np.ndarray, "B"]:
  """Expected clicks of whole requests, repeated topics counted down."""
  utility = affinity.slate_utilities(world, state, users, items)
  return affinity.sigmoid(utility).sum(axis=1)


def session_values(
  world: World,
  policy: Policy,
  users: Int32[np.ndarray, "Q"],
  requests: Int64[np.ndarray, "Q"],
  items: Int32[np.ndarray, "Q *W m"],
  num_days: int | None = None,
) -> dict[str, Float32[np.ndarray, "Q *_"]]:
  """What given sessions would have been worth at requests of a log.

  Plays the days again and, at each request asked for, values sessions in the
  user's state of that moment: those given, the one the log shows, and the
  greedy oracle's. Of all three as many items: the log's first and the oracle's
  first, where those given are shorter than a request.

  Args:
    world: the world.
    policy: the policy that made the log.
    users: user numbers.
    requests: how many requests the user had made before; one may be asked for
      more than once.
    items: a session of m items of each request, or W of them; m is at most the
      slots of a request.
    num_days: days of the log; `config.num_days` if not given.

  Returns:
    What `session_worth` says of the sessions given ([Q] or [Q, W]), and the
    same with `logged_` and `oracle_` before ([Q]).

  Raises:
    ValueError: the log has no such request, or none of so many items.
  """
  m, slots = items.shape[-1], world.config.slots
  if m > slots:
    raise ValueError(
      f"sessions of {m} items stand beside requests of {slots}: set "
      f"pipeline.session_items to simulation.slots={slots}, or to less"
    )
  made = np.zeros(world.config.num_users, np.int64)
  oracle = GreedyTruePolicy(world)
  values: dict[str, np.ndarray] = {}

  def observe(
    state: State, now: np.ndarray, numbers: np.ndarray, slate: Slate, *_: object
  ) -> None:
    del numbers  # counted over all users
    rows, place = _asked(users, requests, now, made)
    made[now] += 1
    who = users[rows]
    for prefix, sessions in (
      ("", items[rows]),
      ("logged_", slate.items[place, :m]),
      ("oracle_", oracle(state, who, np.zeros((len(who), m))).items),
    ):
      found = session_worth(world, state, who, sessions)
      _store(values, prefix, rows, found, len(users))

  run(world, policy, num_days, observe=observe)
  _check_found(values, users, requests)
  return values


def _asked(
  users: np.ndarray, requests: np.ndarray, now: np.ndarray, made: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """Rows that ask for what the users `now` do; which of these each means."""
  place = np.full(len(made), -1)
  place[now] = np.arange(len(now))
  rows = np.flatnonzero((place[users] >= 0) & (made[users] == requests))
  return rows, place[users[rows]]


def _store(
  values: dict[str, np.ndarray],
  prefix: str,
  rows: np.ndarray,
  found: dict[str, np.ndarray],
  size: int,
) -> None:
  """Writes figures of some requests; the others' are NaN until then."""
  for name, value in found.items():
    unknown = np.full((size, *value.shape[1:]), np.nan, np.float32)
    values.setdefault(prefix + name, unknown)[rows] = value


def _check_found(
  values: dict[str, np.ndarray], users: np.ndarray, requests: np.ndarray
) -> None:
  """Raises ValueError for a request that the log does not have."""
  found = values.get("logged_clicks", np.full(len(users), np.nan))
  if np.isnan(found).any():
    row = int(np.isnan(found).argmax())
    raise ValueError(
      f"user {users[row]} makes no request {requests[row]} in the log; value "
      "requests of this world, prepared with all its events"
    )


def session_worth(
  world: World,
  state: State,
  users: Int32[np.ndarray, "B"],
  sessions: Int32[np.ndarray, "B *W slots"],
) -> dict[str, Float32[np.ndarray, "B *W"]]:
  """What is expected of whole sessions, repeated topics counted down.

  Args:
    world: the world.
    state: as of the request.
    users: the users.
    sessions: one of each user, or W of them.

  Returns:
    Expected numbers `clicks`, `long_views`, `likes`, `follows`, `comments`
    and `forwards`; the probabilities `any_like` and `any_follow` of at least
    one; the expected play time `watch_s` in seconds; and `duration_s`, the
    mean length of the session's items.
  """
  shape, slots = sessions.shape[:-1], sessions.shape[-1]
  items = sessions.reshape(-1, slots)
  owner = np.repeat(users, len(items) // max(len(users), 1))
  utility = affinity.slate_utilities(world, state, owner, items)
  satisfaction = affinity.sigmoid(utility)
  flags = {
    name: satisfaction
    * feedback.flag_probability(world, name, items, satisfaction)
    for name in ("like", "follow", "comment", "forward")
  }
  worth = {
    "clicks": satisfaction.sum(axis=1),
    "watch_s": feedback.expected_play_time(world, items, satisfaction).sum(
      axis=1
    )
    / 1000,
    "long_views": feedback.long_view_probability(
      world, items, satisfaction
    ).sum(axis=1),
    "likes": flags["like"].sum(axis=1),
    "follows": flags["follow"].sum(axis=1),
    "comments": flags["comment"].sum(axis=1),
    "forwards": flags["forward"].sum(axis=1),
    # Given the session, its slots' feedback is independent.
    "any_like": 1 - np.prod(1 - flags["like"], axis=1),
    "any_follow": 1 - np.prod(1 - flags["follow"], axis=1),
    "duration_s": world.item_duration[items].mean(axis=1) / 1000,
  }
  return {
    name: value.astype(np.float32).reshape(shape)
    for name, value in worth.items()
  }


def next_event_probabilities(
  world: World,
  policy: PlackettLucePolicy,
  state: State,
  users: Int32[np.ndarray, "B"],
  earlier: Int32[np.ndarray, "B slots"],
) -> Float32[np.ndarray, "B I"]:
  """q: the distribution of the clicked item of the next slot.

  Args:
    world: the world.
    policy: what fills the slots.
    state: as of the request.
    users: the users.
    earlier: items of the request's earlier slots; none for the first.

  Returns:
    Rows that sum to 1.
  """
  weights = policy.weights(state, users)
  utility = affinity.utilities(world, state, users)
  return _posterior(world, weights, utility, earlier)


@dataclasses.dataclass(frozen=True)
class NextEventOptimum:
  """The optimum at every click of a log, in the log's order of requests.

  Attributes:
    ks: the cutoffs.
    user: user number.
    request: request number, as in the events.
    position: slot.
    expected: Σ of the k largest q, per cutoff.
    hit: whether the clicked item was among them.
  """

  ks: tuple[int, ...]
  user: Int32[np.ndarray, "N"]
  request: Int64[np.ndarray, "N"]
  position: Int32[np.ndarray, "N"]
  expected: Float32[np.ndarray, "N cutoffs"]
  hit: Bool[np.ndarray, "N cutoffs"]

  def last(self) -> "NextEventOptimum":
    """Only each user's last click: the test events of leave-one-out."""
    order = np.lexsort((self.position, self.request, self.user))
    user = self.user[order]
    rows = order[np.append(user[1:] != user[:-1], True)]
    names = ("user", "request", "position", "expected", "hit")
    return NextEventOptimum(
      self.ks, **{name: getattr(self, name)[rows] for name in names}
    )

  def recall(self) -> dict[str, dict[int, float]]:
    """`expected` (closed form) and `empirical` Recall@k, means over clicks."""
    return {
      "expected": dict(zip(self.ks, self.expected.mean(axis=0).tolist())),
      "empirical": dict(zip(self.ks, self.hit.mean(axis=0).tolist())),
    }


def best_recall(
  world: World,
  policy: PlackettLucePolicy,
  ks: tuple[int, ...] = (5, 10),
  num_days: int | None = None,
) -> NextEventOptimum:
  """Plays the days again and finds the best achievable Recall@k.

  Args:
    world: the world.
    policy: the policy that made (or makes) the log.
    ks: cutoffs.
    num_days: days from the beginning; `config.num_days` if not given.

  Returns:
    The optimum at every click; `.last().recall()` is that of a leave-one-out
    test, `.recall()` that of all clicks.
  """
  parts: list[tuple[np.ndarray, ...]] = []

  def observe(
    state: State,
    users: np.ndarray,
    requests: np.ndarray,
    slate: Slate,
    given: Feedback,
    shown: np.ndarray,
  ) -> None:
    del shown
    weights = policy.weights(state, users)
    utility = affinity.utilities(world, state, users)
    for slot in range(slate.items.shape[1]):
      rows = np.flatnonzero(given.click[:, slot])
      earlier = slate.items[rows, :slot]
      q = _posterior(world, weights[rows], utility[rows], earlier)
      expected, hit = _top(q, slate.items[rows, slot], ks)
      position = np.full(len(rows), slot, np.int32)
      parts.append((users[rows], requests[rows], position, expected, hit))

  run(world, policy, num_days, observe=observe)
  columns = [np.concatenate(column) for column in zip(*parts)]
  return NextEventOptimum(ks, *columns)


def _posterior(
  world: World, weights: np.ndarray, utility: np.ndarray, earlier: np.ndarray
) -> np.ndarray:
  """The distribution q behind the earlier items of a request."""
  loss = affinity.redundant(world, earlier)
  q = weights * affinity.sigmoid(utility - loss)
  np.put_along_axis(q, earlier, np.float32(0), axis=1)
  return q / q.sum(axis=1, keepdims=True)


def _top(
  q: np.ndarray, item: np.ndarray, ks: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray]:
  """Mass of the k likeliest items, and whether the item is one of them."""
  num_items = q.shape[1]
  most = min(max(ks), num_items)
  top = np.argpartition(q, num_items - most, axis=1)[:, num_items - most :]
  mass = np.take_along_axis(q, top, axis=1)
  order = np.argsort(-mass, axis=1, kind="stable")
  top = np.take_along_axis(top, order, axis=1)
  mass = np.take_along_axis(mass, order, axis=1)
  right = top == item[:, None]
  expected = np.stack([mass[:, :k].sum(axis=1) for k in ks], axis=1)
  hit = np.stack([right[:, :k].any(axis=1) for k in ks], axis=1)
  return expected.astype(np.float32), hit
