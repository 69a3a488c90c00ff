"""Rejection-sampling fine-tuning: imitation of what was played longest.

OneRec-V1 (arXiv 2506.13695 §2.4) drops the half of the exposure sessions with
the least play time and goes on with the same next-token loss on the rest.

INFERRED: a session is a request, its play time the sum over the items it
showed, unknown ones as none; the half is told by the median over all training
requests, and held-out requests are judged by the same. Requests at the median
stay, so where many are alike more than half do.
"""

import functools

import numpy as np
from jaxtyping import Bool, Float

from onerec_jax.data import shards, splits

SIGNAL = "play_time_ms"


def kept(
  prepared: shards.PreparedData, record: shards.UserRecord
) -> Bool[np.ndarray, "N"]:
  """Which of a user's events are of requests played long enough."""
  return play_times(record) >= median(prepared)


def play_times(record: shards.UserRecord) -> Float[np.ndarray, "N"]:
  """The play time of each event's request, in ms.

  Where a request lies in the training split and out of it, of its parts.
  """
  parts = 2 * record.request.astype(np.int64) + (record.split == splits.TRAIN)
  _, part = np.unique(parts, return_inverse=True)
  return np.bincount(part, np.nan_to_num(record.signals[SIGNAL]))[part]


# The records of all users are read once, not for each row of a batch.
@functools.lru_cache(maxsize=8)
def median(prepared: shards.PreparedData) -> float:
  """Of the play times of all training requests, in ms; NaN: there are none.

  Raises:
    ValueError: the data have no play times.
  """
  if SIGNAL not in prepared.manifest["signals"]:
    raise ValueError(
      "pipeline.imitate=rsft reads the play times of events, and the data have "
      f"no {SIGNAL}; they have {sorted(prepared.manifest['signals'])}"
    )
  found = []
  for user in range(len(prepared)):
    record = prepared.user(user)
    training = record.split == splits.TRAIN
    _, first = np.unique(record.request[training], return_index=True)
    found.append(play_times(record)[training][first])
  total = np.concatenate(found)
  return float(np.median(total)) if len(total) else np.nan
