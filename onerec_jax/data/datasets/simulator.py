"""The simulated world as a source: what its logging policy logs.

Every impression is an event, clicked or not, with its flags and its
propensity: alignment needs them all. Next-item training wants the positive
ones: `--config.prepare.where="click = 1"`. What only an oracle knows (the
true satisfaction) is not in the tables.

User 12 of the world is `u12`, item 7 is `i7`.
"""

import numpy as np
import pyarrow as pa

from onerec_jax.config import PrepareConfig
from onerec_jax.data import schema
from onerec_jax.simulation import text
from onerec_jax.simulation.policies import LoggingPolicy
from onerec_jax.simulation.step import Events, run
from onerec_jax.simulation.world import World, degrees

_AGES = ("under 18", "18-24", "25-34", "35-44", "45-54", "55 and over")
_GENDERS = ("female", "male")


def load(config: PrepareConfig) -> schema.Tables:
  """Simulates `config.simulation.num_days` days; no file is read."""
  world = World.create(config.simulation)
  _, events = run(world, LoggingPolicy.create(world))
  source = {
    "events": "simulated events",
    "items": "simulated items",
    "users": "simulated users",
    "notes": [
      "events are all impressions; prepare.where='click = 1' keeps the "
      "positive ones"
    ],
  }
  return schema.Tables(
    events=events_table(world, events),
    items=items_table(world),
    users=users_table(world),
    source=source,
  )


def events_table(world: World, events: Events) -> pa.Table:
  """A log of the world as an events table."""
  latitude, longitude = degrees(events.location)
  return pa.table(
    {
      "user_id": _ids("u", world.config.num_users).take(pa.array(events.user)),
      "item_id": _ids("i", world.config.num_items).take(pa.array(events.item)),
      "timestamp_ms": events.timestamp,
      "request_id": pa.array(events.request).cast(pa.string()),
      "position": events.position.astype(np.int64),
      "play_time_ms": events.play_time,
      "click": events.click,
      **events.flags,
      # NaN (unknown) becomes null.
      "log_probability": pa.array(
        events.log_probability.astype(np.float64), from_pandas=True
      ),
      "latitude": latitude,
      "longitude": longitude,
    }
  )


def items_table(world: World) -> pa.Table:
  """The items, also those that no event shows; `category` is the topic."""
  latitude, longitude = degrees(world.item_place)
  titles, texts = text.titles_and_texts(world)
  topics = [text.topic_name(t) for t in range(world.config.num_topics)]
  authors = _ids("a", int(world.item_author.max()) + 1)
  return pa.table(
    {
      "item_id": _ids("i", world.config.num_items),
      "title": titles,
      "text": texts,
      "category": pa.array(topics).take(pa.array(world.item_topic)),
      "author_id": authors.take(pa.array(world.item_author)),
      "duration_ms": world.item_duration,
      "latitude": latitude,
      "longitude": longitude,
      "price": world.item_price.astype(np.float64),
    }
  )


def users_table(world: World) -> pa.Table:
  """The users and their static features."""
  return pa.table(
    {
      "user_id": _ids("u", world.config.num_users),
      "gender": pa.array(_GENDERS).take(pa.array(world.user_gender)),
      "age": pa.array(_AGES).take(pa.array(world.user_age)),
      "city": _ids("city", int(world.user_city.max()) + 1).take(
        pa.array(world.user_city)
      ),
    }
  )


def _ids(prefix: str, num: int) -> pa.Array:
  return pa.array([f"{prefix}{n}" for n in range(num)], pa.string())
