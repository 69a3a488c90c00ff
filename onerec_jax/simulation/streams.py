"""Random streams: what is drawn is a pure function of (seed, key).

A key names what the stream is for, so a day's draws do not depend on what
was drawn before: stepping from a saved state equals running through.
"""

import numpy as np

USERS = 1
ITEMS = 2
TOPICS = 3
TEXT = 4
ESTIMATES = 5
VISITS = 6
SLATES = 7
FEEDBACK = 8
MOVES = 9
DRIFT = 10


def stream(seed: int, *key: int) -> np.random.Generator:
  """The generator of a key; equal keys give equal streams."""
  return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
