"""Recommendations by raw ids, from a trained run in a work directory."""

import dataclasses
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import rich.progress
from jax.sharding import Mesh

from onerec_jax import config as config_lib
from onerec_jax import files, partitioning
from onerec_jax.data import features, marks, shards
from onerec_jax.data import rows as rows_lib
from onerec_jax.inference import assemble, ranking, retrieval
from onerec_jax.inference import request as request_lib
from onerec_jax.inference.request import RawId, Request

BATCH_SIZE = 64


class _Row(NamedTuple):
  """A request in dense ids and buckets."""

  history: rows_lib.History
  allowed: np.ndarray | None
  user: int | None = None
  """Whose stored events the history is, counted from 0; None: it is given."""


class Recommender:
  """A trained model that answers requests.

  Args:
    system: the model and what it needs.
    params: its parameters.
    mesh: the devices the rows of a batch are spread over.
    batch_size: the most requests answered at once.
    ranker: ranks what the model finds; None: the model's own ranking.

  Raises:
    ValueError: the ranker does not know the model's items.
  """

  def __init__(
    self,
    system: assemble.System,
    params: Any,
    mesh: Mesh,
    batch_size: int = BATCH_SIZE,
    ranker: ranking.Ranker | None = None,
  ):
    if ranker is not None:
      ranker.check(system)
    self.system = system
    self.ranker = ranker
    self._prepared = system.prepared
    self._params = params
    self._mesh = mesh
    self._batch_size = batch_size
    replicated = partitioning.replicated(mesh)
    self._catalogue = jax.device_put(system.catalogue, replicated)
    self._raw_items = self._prepared.items["raw_id"].to_pylist()
    self._titles = self._prepared.items["title"].to_pylist()
    raw_users = self._prepared.users["raw_id"].to_pylist()
    self._users = {raw: place for place, raw in enumerate(raw_users)}
    self._columns = (
      *self._prepared.manifest["bucketing"]["event"],
      *self._prepared.manifest["unused_columns"],
    )
    self._retrieve: dict[int, retrieval.Retrieve] = {}
    readers = [system] if ranker is None else [system, ranker.system]
    self._marks = any(s.config.pipeline.pathways.positive for s in readers)

  @classmethod
  def load(
    cls,
    workdir: files.PathLike,
    model: str = "",
    batch_size: int = BATCH_SIZE,
    ranker: str = "",
  ) -> "Recommender":
    """Loads the best parameters of a run.

    Args:
      workdir: the work directory.
      model: name of the run; empty: the only one beside the ranker, else
        `lazy_decoder`.
      batch_size: the most requests answered at once.
      ranker: name of a reward model's run that ranks what the run finds
        (ranking.py); empty: none.

    Raises:
      FileNotFoundError: there is no such ranker.
      ValueError: no such run, or several and none preferred; they are named.
        Or the ranker is no reward model.
    """
    mesh = partitioning.make_mesh(config_lib.MeshConfig())
    system, params = assemble.load(
      workdir, assemble.choose(workdir, model, ranker), mesh
    )
    second = ranking.Ranker.load(workdir, ranker, mesh) if ranker else None
    return cls(system, params, mesh, batch_size, second)

  def recommend(
    self,
    requests: Sequence[Request],
    k: int = 10,
    beam_width: int | None = None,
    filter_seen: bool = True,
    on_unknown: str = "error",
    progress: bool = False,
  ) -> tuple[list[list[str]], list[list[float]]]:
    """The k best items of each request.

    Args:
      requests: any number; they are answered in batches.
      k: items a request.
      beam_width: candidates a generative model searches with, at least k, and
        the most that a ranker is given by any model; default: the run's
        `evaluation.beam_width`.
      filter_seen: leave out the items of the history. They are dropped from
        the beam; requests whose beam holds too little else are searched once
        more among unseen items alone.
      on_unknown: an item id the data does not have is an `error`, or is
        left out of history or allowed set with a warning: `skip`. Likewise a
        user, who then is a newcomer.
      progress: show a bar.

    Returns:
      (raw item ids, scores), best first; shorter than k where fewer are left.
      Scores are the model's: log-probabilities of semantic IDs, or item
      scores; with a ranker its values.

    Raises:
      ValueError: an unknown user, item or option; it is named.
    """
    users = self._prepared.manifest["bucketing"]["user"]
    request_lib.check(requests, self._columns, users)
    if k < 1:
      raise ValueError(f"k={k} must be at least 1")
    if on_unknown not in ("error", "skip"):
      raise ValueError(f"on_unknown={on_unknown!r}: want error or skip")
    if beam_width is None:
      beam_width = self.system.config.evaluation.beam_width
    if on_unknown == "error":
      self._check_ids(requests)
    items, scores = [], []
    for start in rich.progress.track(
      range(0, len(requests), self._batch_size),
      "recommending",
      transient=True,
      disable=not progress,
    ):
      rows = [
        self._row(request, place, on_unknown)
        for place, request in enumerate(
          requests[start : start + self._batch_size], start
        )
      ]
      found, value = self._answer(rows, k, beam_width, filter_seen)
      for ids, values in zip(found, value):
        kept = ids > 0
        items.append([self._raw_items[i - 1] for i in ids[kept]])
        scores.append(values[kept].tolist())
    return items, scores

  def history(self, user: RawId) -> list[str]:
    """Raw ids of a user's stored events, oldest first.

    Raises:
      ValueError: an unknown user.
    """
    record = self._record(user, f"user {user!r}")
    return [self._raw_items[item - 1] for item in record.items]

  def titles(self, items: Sequence[RawId]) -> list[str]:
    """Titles of items by raw id; the id where an item has none.

    Raises:
      ValueError: an unknown item.
    """
    dense = self._dense(items, "titles", "error")
    return [self._titles[i - 1] or self._raw_items[i - 1] for i in dense]

  def knows(self, item: RawId) -> bool:
    """Whether the catalogue has an item."""
    return request_lib.raw_id(item) in self._prepared.item_index

  def has_user(self, user: RawId) -> bool:
    """Whether the data hold a user's events."""
    return request_lib.raw_id(user) in self._users

  def _answer(
    self, rows: list[_Row], k: int, beam_width: int, filter_seen: bool
  ) -> tuple[np.ndarray, np.ndarray]:
    """Dense items and scores of at most a batch of rows."""
    seen = [row.history.items for row in rows]
    count = k
    if self.ranker is not None:
      count = self.ranker.candidates(k, beam_width)
    width = max(k, beam_width)
    scores_items = hasattr(self.system.model, "item_scores")
    if scores_items:
      # Scoring all items makes a longer list free, and then it is full. A
      # power of two, so that few lengths are ever compiled.
      longest = max(map(len, seen)) if filter_seen else 0
      width = 2 ** (count + longest - 1).bit_length()
    found = self._search(rows, width, [row.allowed for row in rows])
    items, scores = retrieval.finish(*found, seen, count, filter_seen)
    short = np.flatnonzero(items[:, k - 1] == 0)
    if filter_seen and not scores_items and len(short):
      again = [rows[place] for place in short]
      found = self._search(again, width, [self._unseen(row) for row in again])
      items[short], scores[short] = retrieval.finish(*found, seen, count, False)
    if self.ranker is None:
      return items, scores
    items, scores = self.ranker.rank(
      [row.history for row in rows],
      [row.user for row in rows],
      items,
      self._padded(len(rows)),
    )
    return items[:, :k], scores[:, :k]

  def _search(
    self,
    rows: list[_Row],
    width: int,
    allowed: Sequence[np.ndarray | None],
  ) -> tuple[np.ndarray, np.ndarray]:
    """Candidates of each row; `allowed` are dense ids or None, row by row."""
    size = self._padded(len(rows))
    batch = rows_lib.request_batch(
      [row.history for row in rows],
      sorted(rows_lib.feature_sizes(self._prepared)),
      self.system.config.pipeline,
      size,
    )
    width = min(width, self._prepared.num_items)
    if width not in self._retrieve:
      self._retrieve[width] = retrieval.make_retrieve(
        self.system.model, self.system.index, width
      )
    sharding = partitioning.batch_sharding(self._mesh)
    batch, mask = jax.device_put(
      (batch, self._allowed_mask(allowed, size)), sharding
    )
    with jax.set_mesh(self._mesh):
      found = self._retrieve[width](self._params, batch, self._catalogue, mask)
    items, scores = (x[: len(rows)] for x in jax.device_get(found))
    return items, scores

  def _unseen(self, row: _Row) -> np.ndarray:
    """What a row may be recommended besides its history."""
    allowed = row.allowed
    if allowed is None:
      allowed = np.arange(1, self._prepared.num_items + 1, dtype=np.int32)
    return np.setdiff1d(allowed, row.history.items)

  def _padded(self, count: int) -> int:
    """Rows of the batch for so many requests: few different shapes."""
    rows = min(2 ** (count - 1).bit_length(), self._batch_size)
    return -(-rows // self._mesh.size) * self._mesh.size

  def _allowed_mask(
    self, allowed: Sequence[np.ndarray | None], size: int
  ) -> np.ndarray | None:
    if all(items is None for items in allowed):
      return None
    mask = np.ones((size, self._prepared.num_items + 1), bool)
    for place, items in enumerate(allowed):
      if items is not None:
        mask[place] = False
        mask[place, items] = True
    return mask

  def _check_ids(self, requests: Sequence[Request]) -> None:
    """Refuses unknown ids before the first search, not after the last."""
    for place, request in enumerate(requests):
      where = request_lib.label(request, place)
      if request.history is not None:
        self._dense(request.history, f"{where}, history", "error")
      elif request.user is not None:
        self._place(request.user, where)
      if request.allowed is not None:
        self._dense(request.allowed, f"{where}, allowed", "error")

  def _row(self, request: Request, place: int, on_unknown: str) -> _Row:
    """Dense ids and buckets of a request, `place` in the caller's list."""
    where = request_lib.label(request, place)
    stored = None
    if request.history is None and request.user is None:
      raise ValueError(f"{where} has neither a user nor a history")
    known = request.user is not None and self.has_user(request.user)
    if request.history is None and not known and on_unknown == "skip":
      warnings.warn(
        f"{where}: user {request.user!r} is not known, a newcomer's answer",
        stacklevel=4,
      )
      request = dataclasses.replace(request, history=())
    if request.history is None or known:
      stored = self._record(request.user, where)
    bucketing = self._prepared.manifest["bucketing"]
    if stored is None or request.user_columns:
      columns = {features.USER_ID: request.user, **request.user_columns}
      user = features.user_features(bucketing, columns)
    else:
      user = stored.user_features
    allowed = None
    if request.allowed is not None:
      allowed = self._dense(request.allowed, f"{where}, allowed", on_unknown)
    if request.history is None:
      known = rows_lib.before(self._prepared, stored, len(stored.items))
      known = known._replace(user_features=user)
      return _Row(known, allowed, stored.user - 1)
    items = self._dense(
      request.history, f"{where}, history", on_unknown, keep_places=True
    )
    events = self._event_features(request, where)
    kept = items > 0
    events = {name: values[kept] for name, values in events.items()}
    items, lifelong = items[kept], None
    if self._prepared.snapshots is not None:
      lifelong = self._prepared.snapshots.of_history(items, events)
    positive = np.zeros(len(kept), bool)
    if self._marks:
      positive = marks.positive_events(
        self._prepared.manifest, request.event_columns, len(kept)
      )
    return _Row(
      rows_lib.History(items, events, positive[kept], user, lifelong), allowed
    )

  def _event_features(
    self, request: Request, where: str
  ) -> dict[str, np.ndarray]:
    """Bucketed as the shards were."""
    count = len(request.history)
    columns = request_lib.event_columns(request, where, self._columns)
    times = np.zeros(count, np.int64)
    if request.timestamps_ms is None:
      columns["gap"] = np.full(count, np.nan)
    else:
      times = request_lib.milliseconds(request.timestamps_ms, where)
    if len(times) != count:
      raise ValueError(
        f"{where} has {len(times)} values of timestamps_ms for {count} events"
      )
    return features.event_features(
      self._prepared.manifest["bucketing"], columns, times
    )

  def _record(self, user: RawId | None, where: str) -> shards.UserRecord:
    return self._prepared.user(self._place(user, where))

  def _place(self, user: RawId | None, where: str) -> int:
    place = self._users.get(request_lib.raw_id(user))
    if place is None:
      raise ValueError(
        f"{where}: user {user!r} is not in {self._prepared.directory}; ask "
        "with a history of item ids instead, or for a newcomer's answer with "
        "on_unknown='skip' (--on_unknown=skip)"
      )
    return place

  def _dense(
    self,
    items: Sequence[RawId],
    where: str,
    on_unknown: str,
    keep_places: bool = False,
  ) -> np.ndarray:
    """Dense ids; unknown ones are refused, left out, or 0 in their places."""
    known = self._prepared.item_index
    dense = [known.get(request_lib.raw_id(item), 0) for item in items]
    dense = np.asarray(dense, np.int32)
    unknown = [item for item, found in zip(items, dense) if found == 0]
    if unknown and on_unknown == "error":
      raise ValueError(
        f"{where}: item {unknown[0]!r} is not in {self._prepared.directory} "
        f"({len(unknown)} of {len(items)} are not); leave it out, or pass "
        "on_unknown='skip' (--on_unknown=skip)"
      )
    if unknown:
      warnings.warn(
        f"{where}: {len(unknown)} unknown item(s) left out, as {unknown[0]!r}",
        stacklevel=4,
      )
    return dense if keep_places else dense[dense > 0]
