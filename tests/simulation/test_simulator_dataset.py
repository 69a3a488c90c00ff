import numpy as np
import pyarrow.compute as pc
import pytest

from onerec_jax.config import PrepareConfig, SimulationConfig
from onerec_jax.data import schema
from onerec_jax.data.datasets import simulator
from onerec_jax.simulation import text
from onerec_jax.simulation.policies import LoggingPolicy
from onerec_jax.simulation.step import run
from onerec_jax.simulation.world import ORIGIN, World, degrees

CONFIG = PrepareConfig(
  dataset="simulator",
  simulation=SimulationConfig(num_users=40, num_items=60, num_days=2),
)


@pytest.fixture(scope="module")
def tables():
  return simulator.load(CONFIG)


def test_tables_pass_the_schema_and_lose_no_row(tables):
  checked, skipped = schema.validate(tables)
  events = checked.events.read_all()
  assert not skipped
  assert len(events) == len(tables.events)
  assert set(schema.EVENTS) - {"rating"} <= set(events.column_names)
  assert set(schema.ITEMS) - {"embedding"} <= set(checked.items.column_names)
  assert len(checked.items) == 60
  assert len(checked.users) == 40


def test_events_are_the_world_s_log(tables):
  world = World.create(CONFIG.simulation)
  _, log = run(world, LoggingPolicy.create(world))
  events = tables.events.to_pydict()
  assert events["user_id"] == [f"u{u}" for u in log.user]
  assert events["item_id"] == [f"i{i}" for i in log.item]
  assert events["timestamp_ms"] == log.timestamp.tolist()
  assert events["click"] == log.click.tolist()
  np.testing.assert_allclose(events["log_probability"], log.log_probability)
  assert not all(events["click"])
  assert len(set(events["request_id"])) == len(log) / 5


def test_satisfaction_stays_a_secret(tables):
  assert "satisfaction" not in tables.events.column_names


def test_texts_tell_the_topic():
  """A nearest-centroid guess from word counts finds most topics."""
  world = World.create(SimulationConfig(num_users=1, num_items=400))
  titles, texts = text.titles_and_texts(world)
  words = sorted({w for t in texts for w in t.split()})
  index = {w: n for n, w in enumerate(words)}
  counts = np.zeros((400, len(words)))
  for row, line in enumerate(texts):
    for w in line.split():
      counts[row, index[w]] += 1
  counts *= np.log(400 / (counts > 0).sum(axis=0))
  half = np.arange(400) % 2 == 0
  topics = np.unique(world.item_topic[half])
  centres = np.stack(
    [counts[half & (world.item_topic == t)].mean(axis=0) for t in topics]
  )
  centres /= np.linalg.norm(centres, axis=1, keepdims=True)
  guess = topics[(counts[~half] @ centres.T).argmax(axis=1)]
  assert (guess == world.item_topic[~half]).mean() > 0.8
  assert len(set(titles)) > 200
  assert all(len(t.split()) == 3 for t in titles)


def test_words_are_distinct():
  # 70 syllables: three of them make 343,000 words, then numbers follow.
  numbers = [*range(5000), *range(342_000, 344_000), *range(686_000, 687_000)]
  words = [text.word(n) for n in numbers]
  assert len(set(words)) == len(words)


def test_degrees_are_kilometres_by_the_haversine_formula():
  places = np.array([[0, 0], [3, 4], [-6, 2]], np.float32)
  latitude, longitude = degrees(places)
  phi, lam = np.radians(latitude), np.radians(longitude)
  phi0, lam0 = np.radians(ORIGIN[0]), np.radians(ORIGIN[1])
  h = np.sin((phi - phi0) / 2) ** 2
  h += np.cos(phi) * np.cos(phi0) * np.sin((lam - lam0) / 2) ** 2
  km = 2 * 6371.0 * np.arcsin(np.sqrt(h))
  np.testing.assert_allclose(km, [0, 5, np.hypot(6, 2)], rtol=2e-3)


def test_where_keeps_the_clicks(tables):
  kept = tables.events.filter(pc.field("click") == True)  # noqa: E712
  assert 0 < len(kept) < len(tables.events)
