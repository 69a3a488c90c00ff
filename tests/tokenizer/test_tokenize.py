"""The whole step on prepared data: training events only, skipped if done."""

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from onerec_jax import config as config_lib
from onerec_jax import files, semantic_ids
from onerec_jax.data import shards
from onerec_jax.tokenizer import tokenize

NUM_ITEMS, NUM_USERS = 40, 30


def prepare(workdir, held_out_seed: int, titles=None) -> shards.PreparedData:
  """Users whose last two events (validation, test) depend on the seed."""
  train = np.random.default_rng(0)
  held_out = np.random.default_rng(held_out_seed)
  records = []
  for user in range(1, NUM_USERS + 1):
    # Item 40 is never trained on.
    items = np.concatenate(
      [train.integers(1, NUM_ITEMS, 8), held_out.integers(1, NUM_ITEMS + 1, 2)]
    ).astype(np.int32)
    split = np.array([0] * 8 + [1, 2], np.int8)
    order = np.arange(10)
    records.append(
      shards.UserRecord(
        user,
        items,
        order,
        split,
        order.astype(np.int32),
        np.ones(10, bool),
        np.ones(10, bool),
        {},
        {},
        {},
      )
    )
  directory = workdir / "prepared"
  directory.mkdir(parents=True)
  written = shards.write(directory, records, NUM_USERS, 2)
  table = {"item_id": np.arange(1, NUM_ITEMS + 1, dtype=np.int32)}
  if titles:
    table["title"] = titles
  pq.write_table(pa.table(table), directory / shards.ITEMS)
  manifest = {
    "format_version": shards.FORMAT_VERSION,
    "fingerprint": "prepared",
    "num_users": NUM_USERS,
    "num_items": NUM_ITEMS,
    "event_features": {},
    "user_features": {},
    "item_features": {},
    "signals": [],
    "bucketing": {},
    "shards": written,
    "tables": [],
  }
  files.write_json(directory / shards.MANIFEST, manifest)
  return shards.PreparedData.open(workdir)


CONFIG = config_lib.TokenizerConfig(
  vectors="fused", vector_size=8, num_codes=8, num_levels=2, iterations=3
)


def test_held_out_events_change_nothing(tmp_path):
  titles = [f"word{i % 5} other{i % 7}" for i in range(NUM_ITEMS)]
  a, b = (prepare(tmp_path / str(s), s, titles) for s in (1, 2))
  assert any(
    (a.user(i).items != b.user(i).items).any() for i in range(NUM_USERS)
  )
  ids_a = tokenize.tokenize(CONFIG, a, tmp_path / "1")
  ids_b = tokenize.tokenize(CONFIG, b, tmp_path / "2")
  np.testing.assert_array_equal(ids_a.codes, ids_b.codes)
  for book_a, book_b in zip(ids_a.codebooks, ids_b.codebooks, strict=True):
    np.testing.assert_array_equal(book_a, book_b)


def test_artefact_is_found_and_not_made_twice(tmp_path, capsys):
  prepared = prepare(tmp_path, 1)
  ids = tokenize.tokenize(CONFIG, prepared, tmp_path)
  assert "not fused: no two items share" in capsys.readouterr().err
  assert ids.codes.shape == (NUM_ITEMS + 1, 2)
  assert not ids.codes[0].any()
  folder = semantic_ids.find(tmp_path, ids.fingerprint)
  stamp = (folder / "semantic_ids.npz").stat().st_mtime_ns
  again = tokenize.tokenize(CONFIG, prepared, tmp_path)
  assert (folder / "semantic_ids.npz").stat().st_mtime_ns == stamp
  assert "already" in capsys.readouterr().err
  np.testing.assert_array_equal(again.codes, ids.codes)


def test_fingerprint_follows_config_and_matrix(tmp_path):
  prepared = prepare(tmp_path, 1)
  path = tmp_path / "e.npy"
  names = set()
  for value in (0, 1):
    np.save(path, np.full((NUM_ITEMS, 2), value, np.float32))
    config = config_lib.TokenizerConfig(
      vectors="embedding", embedding=str(path)
    )
    names.add(tokenize.fingerprint(config, prepared))
  for seed in (0, 1):
    config = config_lib.TokenizerConfig(seed=seed)
    names.add(tokenize.fingerprint(config, prepared))
  assert len(names) == 4


def test_vectors_that_are_all_alike_are_a_collapse(tmp_path):
  prepared = prepare(tmp_path, 1)
  path = tmp_path / "e.npy"
  np.save(path, np.ones((NUM_ITEMS, 2), np.float32))
  config = config_lib.TokenizerConfig(vectors="embedding", embedding=str(path))
  with pytest.raises(semantic_ids.CodebookCollapseError, match="vectors diff"):
    tokenize.tokenize(config, prepared, tmp_path)
  with pytest.raises(FileNotFoundError):
    semantic_ids.latest(tmp_path)
