"""Does a model prefer what users liked to what they disliked?

Of each user's later events, every liked one is paired with every disliked one;
a pair is right where the model gives the liked item the higher probability (a
reward model: the higher reward), given what the user did before any of them.
Ties count half. Unlike a ranking of all items this asks for nothing that was
not logged, so it judges preference where most later items were never seen
before. Pairs of two items that training never saw are told apart by what their
semantic IDs and features share with others alone; their share and accuracy
stand beside those of all.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
import rich.box
import rich.table
from jax.sharding import Mesh

from onerec_jax import partitioning
from onerec_jax.alignment import policy
from onerec_jax.data import rows as rows_lib
from onerec_jax.data import shards
from onerec_jax.data.batch import Batch
from onerec_jax.evaluation import bootstrap
from onerec_jax.inference import assemble
from onerec_jax.models import generator, reward

_TRUE = 2
"""The bucket of a flag that is set (data/features.py)."""


@dataclasses.dataclass(frozen=True)
class Judged:
  """One user's later events with an opinion.

  Attributes:
    record: of the user.
    start: the first event of the split; those before it are known.
    events: places of the liked and the disliked events.
    liked: [n] which of them were liked.
    new: [n] which of their items no training event has.
  """

  record: shards.UserRecord
  start: int
  events: np.ndarray
  liked: np.ndarray
  new: np.ndarray

  def right(self, scores: np.ndarray) -> np.ndarray:
    """1, ½ or 0 for each pair of a liked and a disliked event.

    Args:
      scores: [n] of the events.
    """
    above = scores[self.liked][:, None] - scores[~self.liked][None, :]
    return ((np.sign(above) + 1) / 2).ravel()

  def both_new(self) -> np.ndarray:
    """Which of these pairs are of two new items."""
    return (self.new[self.liked][:, None] & self.new[~self.liked]).ravel()


def judged(
  prepared: shards.PreparedData, split: int, good: str, bad: str
) -> list[Judged]:
  """Users of a split with both opinions.

  Args:
    prepared: the data.
    split: splits.VALIDATION or TEST.
    good: the flag of liked events.
    bad: the flag of disliked ones; events with both have no opinion.

  Raises:
    ValueError: the data has no such flag, or no user has both.
  """
  specs = prepared.manifest["bucketing"]["event"]
  # Buckets of other features may be _TRUE too: of a rating, of a play time.
  known = sorted(name for name in specs if specs[name]["kind"] == "flag")
  for name in (good, bad):
    if name not in known:
      raise ValueError(
        f"the events have no flag {name!r}, only {known}; name others with "
        "--good and --bad"
      )
  found, counts = [], prepared.item_counts
  for index in range(len(prepared)):
    record = prepared.user(index)
    later = record.split == split
    liked = record.features[good] == _TRUE
    disliked = record.features[bad] == _TRUE
    events = np.flatnonzero(later & (liked != disliked))
    if 0 < liked[events].sum() < len(events):
      start = int(later.argmax())
      new = counts[record.items[events]] == 0
      found.append(Judged(record, start, events, liked[events], new))
  if not found:
    raise ValueError(f"no user of the split has both {good!r} and {bad!r}")
  return found


def batches(
  system: assemble.System, asked: Sequence[Judged], rows: int, targets: int
) -> Iterator[tuple[Batch, list[tuple[int, slice]]]]:
  """The events as targets after their users' contexts.

  Yields:
    A batch of `rows` rows of `targets` targets; for each row that is not empty
    the place of its user in `asked` and which of the user's events it holds.
  """
  prepared, config = system.prepared, system.config.pipeline
  names = sorted(rows_lib.feature_sizes(prepared))
  pieces = [
    (number, slice(first, min(first + targets, len(user.events))))
    for number, user in enumerate(asked)
    for first in range(0, len(user.events), targets)
  ]
  for first in range(0, len(pieces), rows):
    held = pieces[first : first + rows]
    histories = [
      rows_lib.before(prepared, asked[user].record, asked[user].start)
      for user, _ in held
    ]
    batch = rows_lib.request_batch(histories, names, config, rows)
    items = np.zeros((rows, targets), np.int32)
    for row, (user, piece) in enumerate(held):
      found = asked[user].record.items[asked[user].events[piece]]
      items[row, : len(found)] = found
    wide = (rows, targets)
    yield (
      batch.replace(
        targets=items,
        visible_from=np.broadcast_to(batch.visible_from, wide).copy(),
        visible_until=np.broadcast_to(batch.visible_until, wide).copy(),
      ),
      held,
    )


def scores(
  system: assemble.System,
  params: Any,
  asked: Sequence[Judged],
  mesh: Mesh,
  targets: int = 32,
) -> list[np.ndarray]:
  """Log-probabilities of every asked event, or rewards, user by user.

  Args:
    system: of a generator or a reward model.
    params: its parameters.
    asked: of `judged`.
    mesh: where they lie.
    targets: of a row.

  Raises:
    ValueError: the model is neither.
  """
  model = system.model
  judges = isinstance(model, reward.RewardModel)
  if not judges and not isinstance(model, generator.Generator):
    raise ValueError(
      f"run {system.config.name!r} scores items and is no generator; only "
      "generators have a probability of an item, and reward models a reward"
    )
  if getattr(model, "session_items", 1) > 1:
    targets = 1  # side by side they would be the beginnings of sessions
  tables = jax.device_put(
    (system.catalogue, system.index), partitioning.replicated(mesh)
  )

  @jax.jit
  def of_items(params, batch, catalogue, index):
    if judges:
      logits = model.apply(
        {"params": params}, batch, catalogue, batch.targets, method="scores"
      )
      return reward.value(logits, model.value_weights)
    levels = policy.log_probabilities(model, params, batch, catalogue, index)
    return levels.sum(axis=-1)

  found = [np.full(len(user.events), np.nan) for user in asked]
  rows = partitioning.batch_sharding(mesh)
  size = -(-system.config.evaluation.batch_size // targets)
  size = -(-size // mesh.devices.size) * mesh.devices.size
  with jax.set_mesh(mesh):
    for batch, held in batches(system, asked, size, targets):
      batch = jax.device_put(batch, rows)
      answer = np.asarray(of_items(params, batch, *tables))
      for row, (user, piece) in enumerate(held):
        found[user][piece] = answer[row, : piece.stop - piece.start]
  return found


def popularity(
  system: assemble.System, asked: Sequence[Judged]
) -> list[np.ndarray]:
  """Scores of the baseline: how often training events name each item."""
  counts = system.prepared.item_counts.astype(np.float64)
  return [counts[user.record.items[user.events]] for user in asked]


def compare(
  asked: Sequence[Judged], found: dict[str, Sequence[list[np.ndarray]]]
) -> dict[str, dict[str, Any]]:
  """Pair accuracy of models, and of each its difference to the first.

  Args:
    asked: of `judged`.
    found: model → the `scores` of each of its seeds. A pair's value is the mean
      over them.

  Returns:
    Model → accuracy with its 95% interval over users, accuracy on pairs of two
    new items, the standard deviations of both over seeds (None of one), and (of
    all but the first) the paired difference with its own interval.
  """
  right = {
    name: np.stack(
      [
        np.concatenate([user.right(s) for user, s in zip(asked, of_run)])
        for of_run in seeds
      ]
    )
    for name, seeds in found.items()
  }
  first = next(iter(right.values())).mean(axis=0)
  new = np.concatenate([user.both_new() for user in asked])
  users = np.repeat(
    [user.record.user for user in asked],
    [len(user.both_new()) for user in asked],
  )
  rows: dict[str, dict[str, Any]] = {}
  for name, of_seeds in right.items():
    own = of_seeds.mean(axis=0)
    columns = np.stack([own, own - first], axis=1)
    accuracy, difference = bootstrap.intervals(columns, users)
    rows[name] = {
      "users": len(asked),
      "pairs": len(own),
      "accuracy": accuracy.mean,
      "accuracy_low": accuracy.low,
      "accuracy_high": accuracy.high,
      "accuracy_std": _spread(of_seeds),
      "new_pairs": int(new.sum()),
      "new_accuracy": float(own[new].mean()) if new.any() else None,
      "new_accuracy_std": _spread(of_seeds[:, new]),
    }
    if len(rows) > 1:
      rows[name] |= {
        "difference": difference.mean,
        "difference_low": difference.low,
        "difference_high": difference.high,
      }
  return rows


def _spread(right: np.ndarray) -> float | None:
  """Standard deviation over seeds of the mean over pairs; right: [seeds, n]."""
  if len(right) < 2 or not right.shape[1]:
    return None
  return float(right.mean(axis=1).std(ddof=1))


def table(rows: dict[str, dict[str, Any]]) -> rich.table.Table:
  """What `compare` gives, to print."""
  first = next(iter(rows.values()))
  news = first["new_pairs"]
  shown = rich.table.Table(box=rich.box.SIMPLE)
  shown.add_column("run", overflow="fold")
  # Narrow enough for 80 characters: what is folded is the name.
  for title in ("right", "95%", "− first", "95%", *(["new"] if news else [])):
    shown.add_column(title, no_wrap=True)
  shown.caption = f"{first['pairs']} pairs of {first['users']} users"
  if news:
    shown.caption += f"; new: the {news} of two new items"
  for name, row in rows.items():
    cells = []
    for column, form in (("accuracy", ".3f"), ("difference", "+.3f")):
      mean, low, high = (
        format(row[column + end], form) if column in row else ""
        for end in ("", "_low", "_high")
      )
      spread = row.get(f"{column}_std")
      cells.append(mean + (f" ± {spread:.3f}" if spread is not None else ""))
      cells.append(f"{low} … {high}" if low else "")
    if news:
      cells.append(f"{row['new_accuracy']:.3f}")
    shown.add_row(name, *cells)
  return shown
