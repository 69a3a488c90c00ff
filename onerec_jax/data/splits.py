"""Which events train, validate and test: SQL expressions over one event.

Standard SQL, so that any engine that runs queries.py runs these. An event
carries `place` (from 1, in its user's order), `length` (its user's events)
and `timestamp_ms`.
"""

TRAIN, VALIDATION, TEST = 0, 1, 2
NAMES = ("train", "validation", "test")
HELD_OUT = {"validation": VALIDATION, "test": TEST}

SHORT_USER = 3
"""Leave-one-out needs three events: to train on, to validate, to test."""

VALIDATION_QUANTILE, TEST_QUANTILE = 0.8, 0.9


def leave_one_out() -> str:
  """A user's last event tests, the one before validates.

  Users with fewer than three events only train.
  """
  return (
    f"CASE WHEN length < {SHORT_USER} THEN {TRAIN} "
    f"WHEN place = length THEN {TEST} "
    f"WHEN place = length - 1 THEN {VALIDATION} ELSE {TRAIN} END"
  )


def by_time(validation_from_ms: int, test_from_ms: int) -> str:
  """Events from one moment on validate, from a later one on test.

  Raises:
    ValueError: the moments are in the wrong order.
  """
  if validation_from_ms > test_from_ms:
    raise ValueError(
      f"validation starts at {validation_from_ms} ms, after the test at "
      f"{test_from_ms} ms; set prepare.validation_from_ms below "
      "prepare.test_from_ms"
    )
  return (
    f"CASE WHEN timestamp_ms >= {int(test_from_ms)} THEN {TEST} "
    f"WHEN timestamp_ms >= {int(validation_from_ms)} THEN {VALIDATION} "
    f"ELSE {TRAIN} END"
  )


def boundaries(relation: str) -> str:
  """SQL: the moments after which the last 20% and 10% of events happen."""
  quantile = "percentile_disc({}) WITHIN GROUP (ORDER BY timestamp_ms)"
  return (
    f"SELECT {quantile.format(VALIDATION_QUANTILE)} AS validation_from_ms, "
    f"{quantile.format(TEST_QUANTILE)} AS test_from_ms FROM {relation}"
  )


def check(split: str, ordinal_time: bool, request_gap_ms: int = 0) -> None:
  """Refuses what cannot be split so.

  Raises:
    ValueError: an unknown split, or times asked of a source without times.
  """
  if split not in ("leave_one_out", "time"):
    raise ValueError(
      f"prepare.split is {split!r}; it must be 'leave_one_out' or 'time'"
    )
  if split == "time" and ordinal_time:
    raise ValueError(
      "this source has no times, only an order of events, so it cannot be "
      "split by time; use --config.prepare.split=leave_one_out"
    )
  if request_gap_ms and ordinal_time:
    raise ValueError(
      "this source has no times, only an order of events, so "
      "prepare.request_gap_ms cannot tell its requests apart; set it to 0"
    )
