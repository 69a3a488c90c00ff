"""Serving items that came after training, against a catalogue that had them.

The weights are random: nothing here depends on what was learned.
"""

import csv
import dataclasses

import numpy as np
import pyarrow as pa
import pytest
from flax import traverse_util

from onerec_jax import config as config_lib
from onerec_jax import partitioning, semantic_ids
from onerec_jax.data import prepare, shards
from onerec_jax.inference import assemble
from onerec_jax.inference.recommender import Recommender, Request
from onerec_jax.tokenizer import new_items, tokenize
from tests.inference import random_runs

KNOWN, NEW = 30, {"n1": ("a", 3.0), "n2": ("c", 900.0), "n3": ("other", None)}
NAME = "lazy_decoder"


def title(number):
  return f"word{number % 5} other{number % 7} third{number % 3}"


def new_table(*names):
  """Titles, categories that are known or not, prices."""
  return pa.table(
    {
      "item_id": list(names),
      "title": [title(int(name[1:])) for name in names],
      "category": [NEW[name][0] for name in names],
      "price": [NEW[name][1] for name in names],
    }
  )


def config_of(folder):
  c = config_lib.Config(name=NAME)
  c.prepare.dataset = "tables"
  c.prepare.events = str(folder / "events.csv")
  c.prepare.items = str(folder / "items.csv")
  c.pipeline.max_history = 4
  c.tokenizer.num_codes, c.tokenizer.num_levels = 8, 2
  c.tokenizer.vector_size, c.tokenizer.vectors = 4, "fused"
  c.model.d_model, c.model.num_heads, c.model.d_ff = 8, 2, 8
  c.model.sid_embed_dim = c.model.feature_embed_dim = 4
  c.model.num_layers = c.model.num_kv_heads = 1
  return c


def write_log(folder, *new):
  """The same events; the item table may have new items already."""
  folder.mkdir(exist_ok=True)
  rng = np.random.default_rng(0)
  with open(folder / "events.csv", "w", newline="") as file:
    rows = [(u, f"i{i}") for u in range(9) for i in rng.permutation(KNOWN)[:20]]
    csv.writer(file).writerows([("user_id", "item_id"), *rows])
  with open(folder / "items.csv", "w", newline="") as file:
    rows = [(f"i{i}", title(i), "abc"[i % 3], i + 1) for i in range(KNOWN)]
    rows += [tuple(row.values()) for row in new_table(*new).to_pylist()]
    names = ("item_id", "title", "category", "price")
    csv.writer(file).writerows([names, *rows])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """(a work directory with a run, its system, its parameters)."""
  folder = tmp_path_factory.mktemp("run")
  write_log(folder)
  return folder, *random_runs.write_run(config_of(folder), folder)


@pytest.fixture(scope="module")
def extended(run):
  """Fingerprints of two extensions, the second of the first."""
  folder, system, _ = run
  own = system.semantic_ids.fingerprint
  one = tokenize.extend(folder, own, new_table("n1", "n2")).fingerprint
  return one, tokenize.extend(folder, one, new_table("n3")).fingerprint


def had_them(folder, run, ids):
  """The recommender of a log whose item table had the new items: the same
  weights and codes, and no embedding of the new items' ids."""
  write_log(folder, *NEW)
  config = config_of(folder)
  prepare.prepare(config.prepare, folder)
  prepared = shards.PreparedData.open(folder)
  _, system, params = run
  known = [*system.prepared.items["raw_id"].to_pylist(), *NEW]
  old = np.asarray(
    [0, *(1 + known.index(raw) for raw in prepared.items["raw_id"].to_pylist())]
  )
  sids = dataclasses.replace(ids, codes=ids.codes[old])
  params = traverse_util.flatten_dict(params)
  (place,) = (path for path in params if path[-2:] == ("item", "table"))
  table = np.asarray(params[place])
  moved = np.zeros_like(table)
  trained = old <= KNOWN
  moved[: len(old)][trained] = table[old[trained]]
  params = traverse_util.unflatten_dict(params | {place: moved})
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  return Recommender(assemble.assemble(config, prepared, sids), params, mesh)


def test_it_answers_as_if_the_catalogue_had_had_them(run, extended, tmp_path):
  folder, _, _ = run
  served = new_items.recommender(folder, NAME, extended[1])
  ids = semantic_ids.SemanticIds.load(semantic_ids.find(folder, extended[1]))
  whole = had_them(tmp_path / "whole", run, ids)
  requests = [
    Request(user="3"),
    Request(history=["i4", "n2", "i7"]),
    Request(history=["n3", "n1"]),
    Request(history=["i4"], allowed=["n1", "n2", "n3", "i9"]),
  ]
  every = dict(k=KNOWN + len(NEW), filter_seen=False)
  items, scores = served.recommend(requests, **every)
  wanted, values = whole.recommend(requests, **every)
  assert items == wanted
  for own, other in zip(scores, values, strict=True):
    np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-4)
  assert set(NEW) <= set(items[0])
  assert served.titles(["n2", "i1"]) == [title(2), title(1)]


def test_without_new_items_the_run_knows_none(run, extended):
  folder, _, _ = run
  first = new_items.recommender(folder, NAME, extended[0])
  assert first.knows("n2")
  assert not first.knows("n3")
  with pytest.raises(ValueError, match="'n1' is not in"):
    Recommender.load(folder, NAME).recommend([Request(history=["n1"])])


def test_what_cannot_serve_them_says_so(run, extended):
  folder, system, _ = run
  own = system.semantic_ids.fingerprint
  with pytest.raises(ValueError, match=f"{own} adds no items to {own}"):
    new_items.extend(system, folder, own)
  scoring = dataclasses.replace(system, semantic_ids=None)
  with pytest.raises(ValueError, match="no semantic IDs"):
    new_items.extend(scoring, folder, extended[0])
  config = config_of(folder)
  config.pipeline.pathways.lifelong = 8
  compressed = dataclasses.replace(system, config=config)
  with pytest.raises(ValueError, match="compressed histories"):
    new_items.extend(compressed, folder, extended[0])
