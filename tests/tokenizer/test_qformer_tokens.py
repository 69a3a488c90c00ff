"""Semantic IDs by way of the Q-Former, and what it is trained on."""

import dataclasses

import numpy as np
import pyarrow as pa

from onerec_jax import config as config_lib
from onerec_jax.data import prepare, shards
from onerec_jax.tokenizer import extension, tokenize
from tests import worlds

SMALL = config_lib.QFormerConfig(
  num_queries=2,
  num_layers=1,
  d_model=8,
  num_heads=2,
  d_ff=12,
  num_steps=5,
  batch_size=32,
  learning_rate=1e-2,
)


def test_semantic_ids_of_known_and_new_items(tmp_path, capsys):
  made = worlds.config(worlds.write_csv(tmp_path / "raw"))
  prepare.prepare(made.prepare, tmp_path)
  prepared = shards.PreparedData.open(tmp_path)
  settings = dataclasses.replace(
    made.tokenizer, vectors="aligned", qformer=SMALL
  )
  ids = tokenize.tokenize(settings, prepared, tmp_path)
  assert "by a Q-Former" in capsys.readouterr().err
  assert ids.codes.shape == (31, 2)
  tokenize.tokenize(settings, prepared, tmp_path)
  assert "there already" in capsys.readouterr().err
  title = prepared.items["title"][6].as_py()
  kind = prepared.items["category"][6].as_py()
  new = pa.table({"item_id": ["n"], "title": [title], "category": [kind]})
  both = tokenize.extend(tmp_path, ids.fingerprint, new)
  np.testing.assert_array_equal(both.codes[:-1], ids.codes)
  known = extension.Known.load(tmp_path, both.fingerprint)
  np.testing.assert_allclose(known.vectors[-1], known.vectors[6], atol=1e-6)


def test_settings_count_where_they_are_read(tmp_path):
  made = worlds.config(worlds.write_csv(tmp_path / "raw"))
  prepare.prepare(made.prepare, tmp_path)
  prepared = shards.PreparedData.open(tmp_path)

  def name(vectors, **changes):
    settings = dataclasses.replace(
      made.tokenizer,
      vectors=vectors,
      qformer=dataclasses.replace(SMALL, **changes),
    )
    return tokenize.fingerprint(settings, prepared)

  assert name("aligned") != name("aligned", num_steps=9)
  assert name("fused") == name("fused", num_steps=9)


def test_pairs_are_of_positive_training_events(tmp_path):
  """What the data mark negative might as well not be there."""
  lines = [
    f"u{user},i{(user + 3 * place) % 12},{place},{place % 2}"
    for user in range(8)
    for place in range(10)
  ]

  def events(rows, vectors):
    folder = tmp_path / f"{len(rows)}_{vectors}"
    folder.mkdir()
    text = "user_id,item_id,timestamp_ms,like\n" + "\n".join(rows)
    (folder / "events.csv").write_text(text + "\n")
    c = config_lib.Config()
    c.prepare.dataset = "tables"
    c.prepare.events = str(folder / "events.csv")
    c.prepare.split = "time"
    c.prepare.validation_from_ms = c.prepare.test_from_ms = 8
    prepare.prepare(c.prepare, folder)
    prepared = shards.PreparedData.open(folder)
    offsets, found = tokenize.training_events(prepared, vectors == "aligned")
    names = prepared.items["raw_id"].to_pylist()
    users = prepared.users["user_id"].to_pylist()
    return {
      user: [names[item - 1] for item in found[start:stop]]
      for user, start, stop in zip(users, offsets, offsets[1:])
    }

  liked = [line for line in lines if line.endswith("1")]
  found = events(lines, "aligned")
  assert found == events(liked, "fused")
  assert sum(map(len, found.values())) == 8 * 4
  assert sum(map(len, events(lines, "fused").values())) == 8 * 8
