"""What a recommender is asked: a user or a history by raw ids."""

import dataclasses
import warnings
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from onerec_jax.data import columns, schema, time_units

RawId = str | int | float | np.generic


def raw_id(value: RawId) -> str:
  """An id as the data spell it: whole floats as integers (data/columns.py)."""
  if isinstance(value, float | np.floating):
    value = float(value)
    value = int(value) if value.is_integer() and abs(value) < 2**63 else value
  return str(value)


@dataclasses.dataclass(frozen=True)
class Request:
  """Who asks, and what is known of them.

  Attributes:
    history: raw item ids, oldest first. None: the stored events of `user`,
      all splits, with their features. Empty: nothing but the user token,
      the answer for a newcomer.
    user: raw user id; gives stored static features also beside a history. A
      user who is not stored may have a history.
    allowed: raw item ids to choose from; None: the whole catalogue.
    timestamps_ms: of the history, since 1970, ascending, or NumPy's datetimes
      of any unit; absent, its time gaps are unknown.
    event_columns: event column (`rating`, …) → values of the history, NaN
      absent; columns the data was prepared without do not count, and names
      that are nearly a column's are refused.
    user_columns: user column → value; instead of the stored ones. Names count
      and are refused as those of `event_columns`.
    label: names the request in errors and warnings; empty: `request` and its
      place in the list, from 0.
  """

  history: Sequence[RawId] | None = None
  user: RawId | None = None
  allowed: Sequence[RawId] | None = None
  timestamps_ms: Sequence[int] | np.ndarray | None = None
  event_columns: Mapping[str, Sequence[Any]] = dataclasses.field(
    default_factory=dict
  )
  user_columns: Mapping[str, Any] = dataclasses.field(default_factory=dict)
  label: str = ""

  def __post_init__(self):
    """Refuses one id where a list is meant.

    Raises:
      ValueError: a text, whose letters would be read as ids.
    """
    for name in ("history", "allowed"):
      value = getattr(self, name)
      if isinstance(value, str | bytes):
        raise ValueError(
          f"Request: {name}={value!r} is a text; give a list of item ids"
        )


def label(request: Request, place: int) -> str:
  """What a request is called in errors and warnings."""
  return request.label or f"request {place}"


def check(
  requests: Any, known: Collection[str], known_of_users: Collection[str]
) -> None:
  """Refuses what is no list of requests, before any is answered.

  Args:
    requests: what was given.
    known: see `event_columns`.
    known_of_users: columns the data have of users.

  Raises:
    ValueError: an entry is something else, or has columns that cannot be read.
  """
  if isinstance(requests, Request):
    raise ValueError("one request is given without a list: write [request]")
  for place, one in enumerate(requests):
    if not isinstance(one, Request):
      raise ValueError(
        f"request {place} is {one!r}: give a list of Requests, as "
        "[Request(user='alice'), Request(history=['i1', 'i2'])]"
      )
    where = label(one, place)
    if one.history is not None:
      event_columns(one, where, known)
    _check_user_columns(one, where, known_of_users)


def _check_user_columns(
  request: Request, where: str, known: Collection[str]
) -> None:
  """Refuses a name that is nearly a column's, or in other capitals."""
  # Users' columns are all the data's own, which may have capitals.
  spelt = {name.lower(): name for name in known}
  for name in request.user_columns:
    lower = name.lower()
    near = dict(columns.misspelt([lower], spelt)).get(lower, lower)
    if name not in known and near in spelt:
      raise ValueError(
        f"{where}: unknown user column {name!r}; call it {spelt[near]!r} if it "
        "is that, or leave it out"
      )


def event_columns(
  request: Request, where: str, known: Collection[str]
) -> dict[str, np.ndarray]:
  """float64 values of the history's event columns, NaN absent.

  Args:
    request: with a history.
    where: names the request in an error.
    known: columns the data have, whatever they are called.

  Raises:
    ValueError: a name that is nearly a column's, a time, a value that is no
      number, or more or fewer values than the history has items.
  """
  found = {}
  for name in schema.TIMES:
    if name in request.event_columns:
      raise ValueError(
        f"{where}: {name} is no event column; give times as timestamps_ms of "
        "the Request"
      )
  names = [name for name in request.event_columns if name not in known]
  for name, near in columns.misspelt(names, schema.EVENTS):
    raise ValueError(
      f"{where}: unknown event column {name!r}; call it {near!r} if it is "
      "that, or leave it out"
    )
  for name, values in request.event_columns.items():
    try:
      found[name] = np.asarray(values, np.float64)
    except (TypeError, ValueError) as error:
      raise ValueError(
        f"{where}: {name} of event_columns holds what is no number ({error}); "
        "give NaN where a value is not known"
      ) from error
    if found[name].shape != (len(request.history),):
      raise ValueError(
        f"{where} has {found[name].size} values of {name} for "
        f"{len(request.history)} events"
      )
  return found


def milliseconds(times: Any, where: str) -> np.ndarray:
  """int64 milliseconds since 1970, of datetimes of any unit as well.

  Args:
    times: of a request's history, or missing ones among them.
    where: names the request in an error.

  Raises:
    ValueError: one is missing, not finite or no time, or comes after a later
      one.
  """
  try:
    times = np.asarray(times)
    if times.dtype.kind == "M":
      times = times.astype("datetime64[ms]")
      if np.isnat(times).any():
        raise ValueError("a time is missing")
    elif not np.isfinite(times.astype(np.float64)).all():
      raise ValueError("a time is not finite")
    times = times.astype(np.int64)
    if (np.diff(times) < 0).any():
      raise ValueError("a time is earlier than the one before it")
  except (TypeError, ValueError) as error:
    raise ValueError(
      f"{where}, timestamps_ms: {error}; give milliseconds since 1970 or "
      "datetimes, one for each item, oldest first, or leave all of them out"
    ) from error
  told = ""
  if len(times):
    told = time_units.other_unit(int(times[0]), int(times[-1]))
  if told:
    warnings.warn(
      f"{where}, timestamps_ms: as milliseconds, which they are read as, that "
      f"is {told}",
      stacklevel=5,
    )
  return times
