"""The two marks of an event: positive feedback, and the session's quality.

Marks are no model features. `positive` says which events the positive-feedback
pathway takes (OneRec-V1 §2.2), `session` which requests are sessions worth
imitating (OneRec §3.2: a session-wise list is learned from sessions of high
quality alone).
"""

from collections.abc import Collection

from onerec_jax.data import queries, schema

FEEDBACK = (
  "like", "follow", "comment", "forward", "collect", "long_view",
  "profile_enter", "pay",
)  # fmt: skip
"""Flags that say more than a click."""

GOOD_RATING = 4


def positive(condition: str, columns: Collection[str]) -> str:
  """The SQL condition of a positive event.

  The default is INFERRED: any flag of `FEEDBACK` or a rating of at least
  `GOOD_RATING`, whichever the data have; where they have neither, a click;
  where they have no feedback at all, every event.

  Args:
    condition: prepare.positive; empty: the default.
    columns: the event columns that hold values.
  """
  if condition.strip():
    return condition
  parts = [queries.quote(name) for name in FEEDBACK if name in columns]
  if "rating" in columns:
    parts.append(f"rating >= {GOOD_RATING}")
  if not parts and "click" in columns:
    parts.append(queries.quote("click"))
  return " OR ".join(parts) or "1 = 1"


assert set(FEEDBACK) < set(schema.FLAGS)
