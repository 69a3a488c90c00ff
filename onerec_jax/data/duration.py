"""How long a user watched, beside what they usually watch of such videos.

OneRec-V2's duration-aware signal (arXiv 2508.20900 §3.6): play time alone
favours long videos. A video's bucket is F(d) = ⌊log_β(d + ε)⌋ of its duration;
an event's quantile q is the share of the user's earlier events in the same
bucket that were played less, and half of those played as long.

That half departs from the paper, which prints q = |{p_j ≤ p_i}| / |P| and so
counts ties whole: with ties at the top, as of videos played to the end, it
gives all of them 1. Half keeps the mean of q at ½ whatever the ties.

INFERRED, where the paper is silent:

* β = 2 with d in seconds, below one second the lowest bucket: about ten.
* Earlier means before the event's request: what is shown at once is judged
  against the same past.
* With fewer than `least` earlier events in its bucket an event is judged
  among those of the nearest buckets too, as many as it takes; a user with
  fewer in all has no quantile yet (NaN).
* A video without a duration, or of duration 0, has no quantile and is nobody's
  past.
"""

import bisect

import numpy as np
from jaxtyping import Float, Int

LEAST = 5
"""Earlier events that a quantile is a share of, at least."""
_BUCKETS = 24
"""0: up to 2 s; 23: above 97 days."""


def bucket(
  duration_ms: Float[np.ndarray, "N"], base: float = 2.0
) -> Int[np.ndarray, "N"]:
  """F(d) of each video; −1 where there is no duration.

  Args:
    duration_ms: NaN or 0: unknown.
    base: β.
  """
  known = np.nan_to_num(duration_ms) > 0
  seconds = np.where(known, duration_ms, 1000.0) / 1000.0
  found = np.floor(np.log(seconds + 1e-6) / np.log(base)).astype(np.int64)
  return np.where(known, np.clip(found, 0, _BUCKETS - 1), -1)


def play_quantiles(
  request: Int[np.ndarray, "N"],
  duration_ms: Float[np.ndarray, "N"],
  play_ms: Float[np.ndarray, "N"],
  least: int = LEAST,
) -> Float[np.ndarray, "N"]:
  """The quantile of each event of a user, in time order; NaN: none.

  Args:
    request: which events were shown at once: equal numbers in a row.
    duration_ms: of the videos.
    play_ms: how long they were played; NaN: unknown.
    least: see `LEAST`.
  """
  buckets = np.where(np.isnan(play_ms), -1, bucket(duration_ms))
  quantiles = np.full(len(play_ms), np.nan)
  past: list[list[float]] = [[] for _ in range(_BUCKETS)]
  starts = np.flatnonzero(np.diff(request, prepend=request[:1] - 1))
  for start, stop in zip(starts, np.append(starts[1:], len(request))):
    shown = [i for i in range(start, stop) if buckets[i] >= 0]
    for i in shown:
      quantiles[i] = _quantile(past, int(buckets[i]), float(play_ms[i]), least)
    for i in shown:
      bisect.insort(past[buckets[i]], float(play_ms[i]))
  return quantiles


def _quantile(
  past: list[list[float]], of: int, play: float, least: int
) -> float:
  """Share of the past, near enough and large enough, below; ties half."""
  count = below = 0.0
  for distance in range(_BUCKETS):
    for near in {of - distance, of + distance}:
      if 0 <= near < _BUCKETS:
        times = past[near]
        less = bisect.bisect_left(times, play)
        below += (less + bisect.bisect_right(times, play)) / 2
        count += len(times)
    if count >= least:
      return below / count
  return np.nan
