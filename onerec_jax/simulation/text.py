"""Titles and texts made of topic words, so that TF-IDF finds the topics."""

import numpy as np

from onerec_jax.simulation import streams
from onerec_jax.simulation.world import World

_TOPIC_WORDS = 30
_COMMON_WORDS = 150
_SYLLABLES = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]


def word(number: int) -> str:
  """A made-up word, another one for each number."""
  syllables = []
  for _ in range(3):
    number, digit = divmod(number, len(_SYLLABLES))
    syllables.append(_SYLLABLES[digit])
  if number:
    syllables.append(str(number))
  return "".join(syllables)


def topic_name(topic: int) -> str:
  """The name of a topic: its most frequent word."""
  return word(_COMMON_WORDS + topic * _TOPIC_WORDS)


def titles_and_texts(
  world: World, length: int = 14
) -> tuple[list[str], list[str]]:
  """Three words of the main topic; a text of 60% topic words.

  Of a text's words 45% are of the main topic, 15% of the second topic, and
  40% common; within each the k-th word has a frequency as 1 / k.

  Args:
    world: the world.
    length: words of a text.
  """
  rng = streams.stream(world.config.seed, streams.TEXT)
  num_items = world.config.num_items
  shape = (num_items, 3 + length)
  source = rng.random(shape)
  source[:, :3] = 0
  topic_word = _COMMON_WORDS + rng.choice(
    _TOPIC_WORDS, shape, p=_zipf(_TOPIC_WORDS)
  )
  main = topic_word + world.item_topic[:, None] * _TOPIC_WORDS
  second = topic_word + world.item_second_topic[:, None] * _TOPIC_WORDS
  common = rng.choice(_COMMON_WORDS, shape, p=_zipf(_COMMON_WORDS))
  number = np.where(source < 0.45, main, np.where(source < 0.6, second, common))
  used, index = np.unique(number, return_inverse=True)
  words = np.array([word(n) for n in used.tolist()], object)
  chosen = words[index.reshape(shape)]
  titles = [" ".join(row).capitalize() for row in chosen[:, :3].tolist()]
  return titles, [" ".join(row) for row in chosen.tolist()]


def _zipf(num: int) -> np.ndarray:
  share = 1.0 / np.arange(1, num + 1)
  return share / share.sum()
