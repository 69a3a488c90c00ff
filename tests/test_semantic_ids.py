"""The artefact on disk, its reverse index, its report and its refusals."""

import json
import math

import numpy as np
import pytest

from onerec_jax import semantic_ids


def make(seed: int = 0) -> semantic_ids.SemanticIds:
  rng = np.random.default_rng(seed)
  codes = rng.integers(0, 3, (21, 2)).astype(np.int32)
  codes[0] = 0
  books = [rng.normal(size=(3, 4)).astype(np.float32) for _ in range(2)]
  report = semantic_ids.quality_report(codes[1:], (3, 3))
  return semantic_ids.SemanticIds(codes, (3, 3), books, "abc", report, "keep")


def test_round_trip(tmp_path):
  ids = make()
  ids.save(tmp_path / "a")
  loaded = semantic_ids.SemanticIds.load(tmp_path / "a")
  np.testing.assert_array_equal(loaded.codes, ids.codes)
  for book, expected in zip(loaded.codebooks, ids.codebooks, strict=True):
    np.testing.assert_array_equal(book, expected)
  assert loaded.codebook_sizes == (3, 3)
  assert (loaded.fingerprint, loaded.collisions) == ("abc", "keep")
  assert loaded.report == ids.report
  assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
    "semantic_ids.json",
    "semantic_ids.npz",
  ]


def test_groups_are_the_reverse_index():
  ids = make()
  expected = {}
  for item in range(1, 21):
    expected.setdefault(tuple(ids.codes[item].tolist()), []).append(item)
  found = {sid: items.tolist() for sid, items in ids.groups().items()}
  assert found == expected


def edit(folder, **changes):
  path = folder / "semantic_ids.json"
  header = json.loads(path.read_text())
  header.update(changes)
  path.write_text(json.dumps(header))


def test_newer_format_is_refused_by_name(tmp_path):
  make().save(tmp_path)
  edit(tmp_path, format_version=2)
  with pytest.raises(
    semantic_ids.FormatError, match="semantic_ids.json.*version 2"
  ):
    semantic_ids.SemanticIds.load(tmp_path)


def test_tampered_arrays_are_refused_by_name(tmp_path):
  make().save(tmp_path)
  path = tmp_path / "semantic_ids.npz"
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(bytes(content))
  with pytest.raises(
    semantic_ids.FormatError, match="semantic_ids.npz.*checksum"
  ):
    semantic_ids.SemanticIds.load(tmp_path)
  path.unlink()
  with pytest.raises(semantic_ids.FormatError, match="missing"):
    semantic_ids.SemanticIds.load(tmp_path)


@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"codebook_sizes": [3, 2]}, "outside the codebook sizes"),
    ({"num_items": 19}, "not int32"),
    ({"num_codebooks": 3}, "codebook_2"),
  ],
)
def test_header_that_contradicts_the_arrays(tmp_path, changes, message):
  make().save(tmp_path)
  edit(tmp_path, **changes)
  with pytest.raises(semantic_ids.FormatError, match=message):
    semantic_ids.SemanticIds.load(tmp_path)


def test_pickled_arrays_are_never_loaded(tmp_path):
  make().save(tmp_path)
  path = tmp_path / "semantic_ids.npz"
  np.savez(path, codes=np.array([{"a": 1}], dtype=object))
  edit(tmp_path, sha256=semantic_ids.files.sha256(path))
  with pytest.raises(semantic_ids.FormatError, match="allow_pickle"):
    semantic_ids.SemanticIds.load(tmp_path)


def test_find_and_latest(tmp_path):
  with pytest.raises(FileNotFoundError, match="launch.tokenize"):
    semantic_ids.latest(tmp_path)
  make().save(tmp_path / "semantic_ids" / "abc")
  assert semantic_ids.find(tmp_path, "abc").name == "abc"
  assert semantic_ids.latest(tmp_path).name == "abc"
  with pytest.raises(FileNotFoundError, match=r"'abc'"):
    semantic_ids.find(tmp_path, "other")
  with pytest.raises(FileNotFoundError, match="no semantic IDs in"):
    semantic_ids.SemanticIds.load(tmp_path / "nowhere")


def test_report_by_hand():
  codes = np.array([[0, 0], [0, 0], [1, 0], [1, 2]], np.int32)
  vectors = np.array([[0.0], [0.1], [5.0], [5.2]], np.float32)
  rebuilt = np.array([[0.0], [0.0], [5.0], [5.0]], np.float32)
  report = semantic_ids.quality_report(codes, (4, 3), vectors, rebuilt)
  first, second = report["levels"]
  assert first["utilisation"] == 0.5
  assert first["entropy"] == pytest.approx(math.log(2))
  assert first["entropy_share"] == pytest.approx(0.5)
  assert second["entropy"] == pytest.approx(
    -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
  )
  assert report["collision_rate"] == 0.25
  assert report["in_collisions"] == 0.5
  assert report["largest_group"] == 2
  # All three others are neighbours, one of which shares the first code.
  assert report["neighbour_agreement"] == pytest.approx(1 / 3)
  assert report["relative_error"] == pytest.approx(
    (0.01 + 0.04) / 4 / np.var(vectors.astype(np.float64)), rel=1e-4
  )


def test_neighbour_agreement_matches_brute_force():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(60, 3)).astype(np.float32)
  codes = rng.integers(0, 3, (60, 1)).astype(np.int32)
  report = semantic_ids.quality_report(codes, (3,), x)
  shares = []
  for i in range(60):
    others = np.delete(np.arange(60), i)
    d = np.square(x[others] - x[i]).sum(1)
    near = others[np.argsort(d)[:10]]
    shares.append((codes[near, 0] == codes[i, 0]).mean())
  assert report["neighbour_agreement"] == pytest.approx(np.mean(shares))


def judge(codes, sizes, vectors=None):
  report = semantic_ids.quality_report(codes, sizes, vectors)
  semantic_ids.check_collapse(report, len(sizes))


def test_collapse_is_an_error_with_figures():
  spread = np.stack([np.arange(256) % 16, np.arange(256) // 16], 1)
  spread = spread.astype(np.int32)
  judge(spread, (16, 16))
  narrow = spread.copy()
  narrow[:, 0] = np.arange(256) == 3
  with pytest.raises(
    semantic_ids.CodebookCollapseError, match=r"level 1 has 0\.\d% of the max"
  ):
    judge(narrow, (16, 16))
  unused = spread.copy()
  unused[:, 1] = 5
  with pytest.raises(
    semantic_ids.CodebookCollapseError, match=r"level 2 uses 6\.2%"
  ):
    judge(unused, (16, 16))
  with pytest.raises(
    semantic_ids.CodebookCollapseError, match=r"100\.0% of the items share"
  ):
    judge(spread[:, :1], (16,))
  with pytest.raises(
    semantic_ids.CodebookCollapseError, match=r"0\.4% of the item vectors"
  ):
    judge(spread, (16, 16), np.ones((256, 2), np.float32))


def test_tiny_catalogues_are_not_judged():
  judge(np.zeros((10, 2), np.int32), (4, 4))
  with pytest.raises(semantic_ids.CodebookCollapseError):
    judge(np.zeros((256, 2), np.int32), (4, 4))
  judge(np.zeros((1, 2), np.int32), (1, 1), np.zeros((1, 2), np.float32))
