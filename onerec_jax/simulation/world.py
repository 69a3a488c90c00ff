"""What never changes: the users, the items, the topics, and their places.

Users and items are numbered from 0 here; `data/datasets/simulator.py` writes
user 12 as `u12` and item 7 as `i7`. docs/simulation.md has the formulas.
"""

import dataclasses

import numpy as np
from jaxtyping import Float32, Int32, Int64

from onerec_jax.config import SimulationConfig
from onerec_jax.simulation import streams

NUM_AGE_GROUPS = 6
NUM_GENDERS = 2
NUM_CITIES = 4

ORIGIN = (30.27, 120.15)
"""Latitude and longitude in degrees of the point (0, 0) km."""
_KM_PER_DEGREE = 111.195

_QUALITY = 0.5
"""Utility of one standard deviation of quality."""
_BIAS = -2.0
"""Utility of an item of mean quality, here, that means nothing to the user."""
_ROAM_KM = 1.0
_CITY_KM = 3.0


@dataclasses.dataclass(frozen=True)
class World:
  """A world; arrays are not to be written to.

  Attributes:
    config: what made it.
    repeat_window: impressions after which an item may be shown again.
    topic_centres: unit vectors.
    group_topics: topic shares of each demographic group (age × gender).
    user_gender: 0 or 1.
    user_age: age group.
    user_city: city of the home.
    user_home: km east and north of `ORIGIN`.
    user_rate: mean requests a day.
    user_drift: share of the interest that is new each day.
    item_topic: main topic (the category).
    item_second_topic: another topic the item touches on.
    item_author: author (or shop).
    item_latent: what the item is about, near unit length.
    item_quality: standard normal; what every user likes.
    item_duration: milliseconds.
    item_price: currency units.
    item_place: km east and north of `ORIGIN`.
    item_launch: first day on which the item can be shown.
    item_popularity: relative popularity (mean 1) the day the item is there.
    item_factors: the item's side of utility (see affinity.py).
  """

  config: SimulationConfig
  repeat_window: int
  topic_centres: Float32[np.ndarray, "topics D"]
  group_topics: Float32[np.ndarray, "groups topics"]
  user_gender: Int32[np.ndarray, "U"]
  user_age: Int32[np.ndarray, "U"]
  user_city: Int32[np.ndarray, "U"]
  user_home: Float32[np.ndarray, "U 2"]
  user_rate: Float32[np.ndarray, "U"]
  user_drift: Float32[np.ndarray, "U"]
  item_topic: Int32[np.ndarray, "I"]
  item_second_topic: Int32[np.ndarray, "I"]
  item_author: Int32[np.ndarray, "I"]
  item_latent: Float32[np.ndarray, "I D"]
  item_quality: Float32[np.ndarray, "I"]
  item_duration: Int64[np.ndarray, "I"]
  item_price: Float32[np.ndarray, "I"]
  item_place: Float32[np.ndarray, "I 2"]
  item_launch: Int32[np.ndarray, "I"]
  item_popularity: Float32[np.ndarray, "I"]
  item_factors: Float32[np.ndarray, "I factors"]

  @classmethod
  def create(cls, config: SimulationConfig) -> "World":
    """Draws a world.

    Raises:
      ValueError: a size with which no world can be made.
    """
    _check(config)
    # A copy: configs are mutable, a world is not.
    config = dataclasses.replace(config)
    rng = streams.stream(config.seed, streams.TOPICS)
    centres = _unit(rng.normal(size=(config.num_topics, config.latent_size)))
    groups = rng.dirichlet(
      np.ones(config.num_topics), NUM_AGE_GROUPS * NUM_GENDERS
    )
    cities = _CITY_KM * rng.normal(size=(NUM_CITIES, 2))
    items = _items(config, centres, cities)
    there = int((items["item_launch"] == 0).sum())
    return cls(
      config=config,
      repeat_window=min(config.repeat_window, there // 2),
      topic_centres=centres.astype(np.float32),
      group_topics=groups.astype(np.float32),
      item_factors=_item_factors(config, items),
      **_users(config, cities),
      **items,
    )

  def user_group(self, users: Int32[np.ndarray, "B"]) -> np.ndarray:
    """The demographic group of users, a row of `group_topics`."""
    return self.user_age[users] * NUM_GENDERS + self.user_gender[users]


def draw_interests(
  world: World, users: Int32[np.ndarray, "B"], rng: np.random.Generator
) -> Float32[np.ndarray, "B D"]:
  """Fresh unit interests: sparse mixtures of the group's favourite topics."""
  num_topics = world.config.num_topics
  shares = 0.7 * world.group_topics + 0.3 / num_topics
  mixture = rng.standard_gamma(1.5 * shares[world.user_group(users)]) + 1e-9
  mixture /= mixture.sum(axis=1, keepdims=True)
  noise = 0.3 * rng.normal(size=(len(users), world.config.latent_size))
  noise /= np.sqrt(world.config.latent_size)
  return _unit(mixture @ world.topic_centres + noise).astype(np.float32)


def draw_locations(world: World, day: int) -> Float32[np.ndarray, "U 2"]:
  """Where every user is on a day: about a kilometre from home."""
  rng = streams.stream(world.config.seed, streams.MOVES, day)
  away = _ROAM_KM * rng.standard_normal(world.user_home.shape, np.float32)
  return world.user_home + away


def degrees(
  places: Float32[np.ndarray, "B 2"],
) -> tuple[np.ndarray, np.ndarray]:
  """Latitudes and longitudes of places in km, float64 degrees."""
  latitude = ORIGIN[0] + places[:, 1].astype(np.float64) / _KM_PER_DEGREE
  narrowing = np.cos(np.radians(ORIGIN[0]))
  longitude = ORIGIN[1] + places[:, 0] / (_KM_PER_DEGREE * narrowing)
  return latitude, longitude


def _check(config: SimulationConfig) -> None:
  least = {
    "num_users": 1,
    "num_days": 1,
    "num_topics": 1,
    "latent_size": 1,
    "slots": 1,
    "repeat_window": 0,
  }
  for name, low in least.items():
    if getattr(config, name) < low:
      raise ValueError(
        f"simulation.{name} is {getattr(config, name)}; it must be at least "
        f"{low}"
      )
  for name in ("temperature", "requests_per_day", "geo_radius_km"):
    if not getattr(config, name) > 0:
      raise ValueError(
        f"simulation.{name} is {getattr(config, name)}; it must be above 0"
      )
  for name in ("new_items", "drift", "momentum_decay"):
    if not 0 <= getattr(config, name) < 1:
      raise ValueError(
        f"simulation.{name} is {getattr(config, name)}; it must lie in [0, 1)"
      )
  there = config.num_items - round(config.new_items * config.num_items)
  if there < 2 * config.slots:
    raise ValueError(
      f"simulation.num_items is {config.num_items}, of which {there} are there "
      f"on day 0; {config.slots} slots need {2 * config.slots}. Raise "
      "num_items or lower new_items."
    )


def _users(
  config: SimulationConfig, cities: np.ndarray
) -> dict[str, np.ndarray]:
  rng = streams.stream(config.seed, streams.USERS)
  num = config.num_users
  city = rng.integers(NUM_CITIES, size=num)
  home = cities[city] + 0.5 * _CITY_KM * rng.normal(size=(num, 2))
  return {
    "user_gender": rng.integers(NUM_GENDERS, size=num).astype(np.int32),
    "user_age": rng.integers(NUM_AGE_GROUPS, size=num).astype(np.int32),
    "user_city": city.astype(np.int32),
    "user_home": home.astype(np.float32),
    # Mean 1, standard deviation 1/2: users are unequally busy.
    "user_rate": (config.requests_per_day * rng.gamma(4.0, 0.25, num)).astype(
      np.float32
    ),
    "user_drift": np.minimum(
      config.drift * rng.uniform(0.5, 1.5, num), 0.999
    ).astype(np.float32),
  }


def _items(
  config: SimulationConfig, centres: np.ndarray, cities: np.ndarray
) -> dict[str, np.ndarray]:
  rng = streams.stream(config.seed, streams.ITEMS)
  num, num_topics = config.num_items, config.num_topics
  num_authors = max(1, num // 10)
  author_topic = rng.integers(num_topics, size=num_authors)
  author_place = cities[rng.integers(NUM_CITIES, size=num_authors)]
  author_place = author_place + _CITY_KM * rng.normal(size=author_place.shape)
  # A few authors make much: Zipf with exponent 0.7.
  share = np.arange(1, num_authors + 1) ** -0.7
  author = rng.choice(num_authors, num, p=share / share.sum())
  stray = rng.random(num) < 0.2
  topic = np.where(
    stray, rng.integers(num_topics, size=num), author_topic[author]
  )
  second = rng.integers(num_topics, size=num)
  spread = 0.35 * rng.normal(size=(num, config.latent_size))
  latent = 0.85 * centres[topic] + 0.25 * centres[second]
  latent = latent + spread / np.sqrt(config.latent_size)
  quality = rng.normal(size=num)
  duration = np.clip(np.exp(rng.normal(np.log(30e3), 0.8, num)), 3e3, 600e3)
  launch = np.zeros(num, np.int32)
  new = rng.permutation(num)[: round(config.new_items * num)]
  if config.num_days > 1:
    launch[new] = 1 + np.arange(len(new)) % (config.num_days - 1)
  popularity = np.exp(0.5 * quality + rng.normal(size=num))
  popularity /= popularity.mean()
  price = np.exp(
    rng.normal(3.0, 0.5, num) + 0.7 * rng.normal(size=num_topics)[topic]
  )
  return {
    "item_topic": topic.astype(np.int32),
    "item_second_topic": second.astype(np.int32),
    "item_author": author.astype(np.int32),
    "item_latent": latent.astype(np.float32),
    "item_quality": quality.astype(np.float32),
    "item_duration": duration.astype(np.int64),
    "item_price": np.round(price, 2).astype(np.float32),
    "item_place": author_place[author].astype(np.float32),
    "item_launch": launch,
    # Nobody has seen a new item yet.
    "item_popularity": np.where(launch == 0, popularity, 0).astype(np.float32),
  }


def _item_factors(
  config: SimulationConfig, items: dict[str, np.ndarray]
) -> np.ndarray:
  """[latent, place/r, bias + quality − ½|place/r|², 1]; see affinity.py."""
  place = items["item_place"] / np.float32(config.geo_radius_km)
  own = _BIAS + _QUALITY * items["item_quality"]
  own = own - 0.5 * (place**2).sum(axis=1)
  columns = [
    items["item_latent"],
    place,
    own[:, None],
    np.ones_like(own)[:, None],
  ]
  return np.concatenate(columns, axis=1).astype(np.float32)


def _unit(vectors: np.ndarray) -> np.ndarray:
  return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
