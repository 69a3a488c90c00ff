"""New items beside known ones: IDs, artefact, refusals, command."""

import csv
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pyarrow as pa
import pytest

from onerec_jax import config as config_lib
from onerec_jax import semantic_ids
from onerec_jax.data import prepare, shards
from onerec_jax.tokenizer import (
  extension,
  item_vectors,
  neighbours,
  residual,
  tokenize,
)

ROOT = pathlib.Path(__file__).resolve().parents[2]
NUM_ITEMS = 40
CONFIG = config_lib.TokenizerConfig(
  vectors="fused",
  vector_size=8,
  num_codes=8,
  num_levels=2,
  balance="none",
  iterations=3,
)


def write(path, header, rows):
  with open(path, "w", newline="") as file:
    csv.writer(file).writerows([header, *rows])
  return str(path)


def title(item: int) -> str:
  return f"word{item % 5} other{item % 7} third{item % 3}"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
  """A work directory with semantic IDs of items i0 … i39, not to change."""
  workdir = tmp_path_factory.mktemp("made")
  rng = np.random.default_rng(0)
  events = [(u, f"i{i}") for u in range(30) for i in rng.integers(0, 40, 8)]
  items = [(f"i{i}", title(i)) for i in range(NUM_ITEMS)]
  config = config_lib.PrepareConfig(
    dataset="tables",
    events=write(workdir / "events.csv", ["user_id", "item_id"], events),
    items=write(workdir / "items.csv", ["item_id", "title"], items),
  )
  prepare.prepare(config, workdir)
  prepared = shards.PreparedData.open(workdir)
  return workdir, tokenize.tokenize(CONFIG, prepared, workdir)


@pytest.fixture
def known(made, tmp_path):
  """A copy of it."""
  shutil.copytree(made[0], tmp_path / "work")
  return tmp_path / "work", made[1]


def new(*names, titles=None):
  titles = titles or [title(i) for i in range(len(names))]
  return pa.table({"item_id": list(names), "title": titles})


def test_new_rows_follow_the_known_ones(known):
  workdir, ids = known
  both = tokenize.extend(workdir, ids.fingerprint, new("n1", "n2"))
  np.testing.assert_array_equal(both.codes[: NUM_ITEMS + 1], ids.codes)
  assert both.codes.shape == (NUM_ITEMS + 3, 2)
  assert both.fingerprint != ids.fingerprint
  # The vectors are the frozen vectorizer's, the codes the nearest free ones.
  before = extension.Known.load(workdir, ids.fingerprint)
  vectors = item_vectors.transform(before.vectorizer, new("n1", "n2"))
  expected = residual.encode_new(vectors, ids)
  np.testing.assert_array_equal(both.codes, expected.codes)
  assert both.report["new_items"] == 2
  near = neighbours.nearest(vectors, before.vectors)[:, 0]
  agree = both.codes[-2:, 0] == ids.codes[1:][near, 0]
  assert both.report["new_agreement"] == agree.mean()
  assert both.report["num_items"] == NUM_ITEMS + 2
  folder = semantic_ids.find(workdir, both.fingerprint)
  loaded = semantic_ids.SemanticIds.load(folder)
  np.testing.assert_array_equal(loaded.codes, both.codes)
  assert loaded.report == both.report
  added = extension.Extension.load(folder)
  assert added.parent == ids.fingerprint
  assert added.items.select(["item_id", "raw_id", "title"]).to_pylist() == [
    {"item_id": NUM_ITEMS + 1, "raw_id": "n1", "title": title(0)},
    {"item_id": NUM_ITEMS + 2, "raw_id": "n2", "title": title(1)},
  ]
  np.testing.assert_array_equal(added.vectors, vectors)


def test_extensions_are_found_again_and_extended(known, capsys):
  workdir, ids = known
  first = tokenize.extend(workdir, ids.fingerprint, new("n1"))
  capsys.readouterr()
  again = tokenize.extend(workdir, ids.fingerprint, new("n1"))
  assert "there already" in capsys.readouterr().err
  assert again.fingerprint == first.fingerprint
  assert extension.latest_fitted(workdir) == ids.fingerprint
  second = tokenize.extend(workdir, first.fingerprint, new("n2"))
  np.testing.assert_array_equal(second.codes[:-1], first.codes)
  assert len(np.unique(second.codes[1:], axis=0)) == NUM_ITEMS + 2
  everything = extension.Known.load(workdir, second.fingerprint)
  assert everything.vectors.shape[0] == NUM_ITEMS + 2
  assert [e.parent for e in everything.extensions] == [
    ids.fingerprint,
    first.fingerprint,
  ]
  with pytest.raises(ValueError, match=r"row 2: item 'n1' .*1 of 2"):
    tokenize.extend(workdir, second.fingerprint, new("n3", "n1"))
  other = tokenize.extend(
    workdir, ids.fingerprint, new("n1", titles=["word1 other2"])
  )
  assert other.fingerprint not in (first.fingerprint, second.fingerprint)


@pytest.mark.parametrize(
  ("items", "message"),
  [
    (new("n1", "i7"), r"row 2: item 'i7' has a semantic ID .*1 of 2"),
    (new("n1", "n1"), r"row 2, column 'item_id': stands there already"),
    (new("n1", titles=[None]), r"row 1: item 'n1' has no text"),
    (new("n1", titles=["Zebra"]), r"'n1' has no word .*'Zebra'"),
    (new(), "there are no rows"),
    (pa.table({"title": ["word1"]}), "needs a column 'item_id'"),
  ],
)
def test_items_that_cannot_be_placed_are_named(made, items, message):
  workdir, ids = made
  before = sorted(semantic_ids.root(workdir).iterdir())
  with pytest.raises(ValueError, match=message):
    tokenize.extend(workdir, ids.fingerprint, items)
  assert sorted(semantic_ids.root(workdir).iterdir()) == before


def test_semantic_ids_of_other_data_are_refused(known):
  workdir, ids = known
  manifest = workdir / "prepared" / shards.MANIFEST
  fingerprint = shards.read_manifest(manifest.parent)["fingerprint"]
  manifest.write_text(manifest.read_text().replace(fingerprint, "other"))
  with pytest.raises(ValueError, match="made of other data"):
    tokenize.extend(workdir, ids.fingerprint, new("n1"))


def test_a_lost_vectorizer_is_made_again_and_ids_stay(known):
  workdir, ids = known
  folder = semantic_ids.find(workdir, ids.fingerprint)
  before = {p.name: p.read_bytes() for p in folder.iterdir()}
  for name in ("vectorizer.json", "vectorizer.npz", "vectors.npy"):
    (folder / name).unlink()
  with pytest.raises(FileNotFoundError, match="launch.tokenize"):
    tokenize.extend(workdir, ids.fingerprint, new("n1"))
  stamp = (folder / "semantic_ids.npz").stat().st_mtime_ns
  prepared = shards.PreparedData.open(workdir)
  tokenize.tokenize(CONFIG, prepared, workdir)
  assert (folder / "semantic_ids.npz").stat().st_mtime_ns == stamp
  assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_broken_extensions_are_refused_by_name(known):
  workdir, ids = known
  both = tokenize.extend(workdir, ids.fingerprint, new("n1"))
  folder = semantic_ids.find(workdir, both.fingerprint)
  (folder / "new_items.parquet").write_bytes(b"no table")
  with pytest.raises(semantic_ids.FormatError, match=r"new_items.*checksum"):
    tokenize.extend(workdir, both.fingerprint, new("n2"))


def test_bad_rows_of_a_file_are_named_or_counted(tmp_path):
  rows = [("n1", "word1"), ("", "word2"), ("n3", "word3"), ("n1", "word4")]
  path = write(tmp_path / "new.csv", ["item_id", "title"], rows)
  with pytest.raises(ValueError, match=r"new.csv, row 2, column 'item_id'"):
    extension.read(path)
  items, skipped = extension.read(path, "skip")
  assert items["item_id"].to_pylist() == ["n1", "n3"]
  assert sum(skipped.values()) == 2
  with pytest.raises(FileNotFoundError, match="none.csv"):
    extension.read(str(tmp_path / "none.csv"))


def test_agreement_against_brute_force():
  rng = np.random.default_rng(0)
  vectors, queries = rng.normal(size=(30, 3)), rng.normal(size=(9, 3))
  known, codes = rng.integers(0, 2, (30, 2)), rng.integers(0, 2, (9, 2))
  near = neighbours.nearest(queries, vectors, 4)
  distances = np.square(queries[:, None] - vectors[None]).sum(axis=2)
  np.testing.assert_array_equal(
    np.sort(near, axis=1), np.sort(distances.argsort(axis=1)[:, :4], axis=1)
  )
  pairs = [(q, n) for q in range(9) for n in near[q]]
  same = np.mean([(codes[q] == known[n]).all() for q, n in pairs])
  drawn = np.mean([(known == known[n]).all(axis=1).mean() for _, n in pairs])
  np.testing.assert_allclose(
    neighbours.agreement(codes, near, known), (same, drawn)
  )


@pytest.mark.slow
def test_the_command_prints_the_new_ids(known):
  workdir, ids = known
  path = write(
    workdir / "new.csv", ["item_id", "title"], [("n1", "Word1 [other2]")]
  )
  command = [sys.executable, "-m", "launch.tokenize", f"--workdir={workdir}"]
  done = subprocess.run(
    [*command, f"--new_items={path}"],
    cwd=ROOT,
    env={**os.environ, "JAX_PLATFORMS": "cpu"},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  both = tokenize.extend(workdir, ids.fingerprint, extension.read(path)[0])
  row = next(line for line in done.stdout.splitlines() if "n1" in line)
  assert " ".join(map(str, both.codes[-1])) in row
  assert "Word1 [other2]" in row
  assert "new agreement" in done.stdout
  assert f"launch.recommend --new_items={both.fingerprint}" in done.stdout
