"""Times that look like no milliseconds, which all times here are."""

# Lowest, highest, what to say and what to do. In their own units all are from
# 1973 on.
_LATE = "after the year 5000, so these look like"
_OTHER_UNITS = (
  (
    *(10**8, 10**11),
    "1970 to 1973, so these look like seconds",
    "name the column timestamp instead, which takes seconds",
  ),
  (10**17, 2**63, f"{_LATE} nanoseconds", "divide by 1,000,000"),
  (10**14, 2**63, f"{_LATE} microseconds", "divide by 1,000"),
)


def unit_note(low: int | None, high: int | None) -> str:
  """What to say of event times that look like no milliseconds.

  Args:
    low: the earliest; None: there are no events.
    high: the latest.

  Returns:
    A sentence, or nothing where the times may well be milliseconds.
  """
  if low is None or high is None:
    return ""
  for told, remedy in _other_units(low, high):
    times = f"every timestamp_ms lies from {low} to {high}"
    return f"{times}: as milliseconds that is {told}; if they are, {remedy}"
  return ""


def other_unit(low: int, high: int) -> str:
  """The years that times from `low` to `high` are in if milliseconds, and what
  they look like instead; nothing where they may well be milliseconds.
  """
  return next((told for told, _ in _other_units(low, high)), "")


def _other_units(low: int, high: int) -> list[tuple[str, str]]:
  return [
    (told, remedy)
    for least, most, told, remedy in _OTHER_UNITS
    if least <= low and high <= most
  ]
