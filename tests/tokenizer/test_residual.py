"""Residual codes, collisions and new items."""

import itertools

import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import semantic_ids
from onerec_jax.tokenizer import collisions, residual, tokenize


def vectors(seed: int, rows: int = 60, width: int = 4) -> np.ndarray:
  return (
    np.random.default_rng(seed).normal(size=(rows, width)).astype(np.float32)
  )


def make_config(**kwargs) -> config_lib.TokenizerConfig:
  return config_lib.TokenizerConfig(
    **{"num_levels": 3, "num_codes": 8, "iterations": 5, **kwargs}
  )


def arg_min_codes(x, books):
  codes, left = [], x.astype(np.float64)
  for book in books:
    code = np.square(left[:, None] - book[None]).sum(-1).argmin(1)
    codes.append(code)
    left = left - book[code]
  return np.stack(codes, 1)


def is_unique(codes):
  return len(np.unique(codes, axis=0)) == len(codes)


def test_plain_fit_and_encode_are_the_arg_min():
  x = vectors(0)
  coding = residual.fit(x, make_config(balance="none", collisions="keep"))
  expected = arg_min_codes(x, coding.codebooks)
  np.testing.assert_array_equal(coding.codes, expected)
  new = vectors(1)
  np.testing.assert_array_equal(
    residual.encode(new, coding.codebooks),
    arg_min_codes(new, coding.codebooks),
  )
  errors = [
    np.square(x - residual.decode(coding.codes[:, :n], coding.codebooks)).sum()
    for n in (1, 2, 3)
  ]
  assert errors[0] > errors[1] > errors[2]


def test_fit_is_decided_by_the_seed():
  x = vectors(2)
  a, b, c = (residual.fit(x, make_config(seed=s)).codes for s in (0, 0, 1))
  np.testing.assert_array_equal(a, b)
  assert (a != c).any()


@pytest.mark.parametrize("balance", ["none", "equal", "capped"])
def test_assign_and_extra_tell_all_items_apart(balance):
  x = np.repeat(vectors(3, 20), 3, axis=0)
  kept = residual.fit(x, make_config(balance="none", collisions="keep"))
  assert not is_unique(kept.codes)
  config = make_config(balance=balance, collisions="assign")
  assigned = residual.fit(x, config)
  assert is_unique(assigned.codes)
  assert assigned.codebook_sizes == (8, 8, 8)
  config = make_config(balance=balance, collisions="extra")
  extra = residual.fit(x, config)
  assert is_unique(extra.codes)
  groups = np.unique(extra.codes[:, :3], axis=0, return_counts=True)[1]
  assert extra.codebook_sizes == (8, 8, 8, groups.max())
  assert len(extra.codebooks) == 3


def test_last_level_is_the_best_assignment():
  x, books = vectors(4, 10, 2), [vectors(5, 3, 2), vectors(6, 5, 2)]
  prefix = np.arange(10) % 3
  nearest = arg_min_codes(x - books[0][prefix], books[1:])[:, 0]
  codes = np.stack([prefix, nearest], 1).astype(np.int32)
  found = collisions.assign_last_level(x, codes, books)
  np.testing.assert_array_equal(found[:, 0], codes[:, 0])
  for prefix in range(3):
    members = np.flatnonzero(codes[:, 0] == prefix)
    left = x[members] - books[0][prefix]
    cost = np.square(left[:, None] - books[1][None]).sum(-1)
    rows = np.arange(len(members))
    best = min(
      cost[rows, list(p)].sum()
      for p in itertools.permutations(range(5), len(members))
    )
    assert len(set(found[members, 1].tolist())) == len(members)
    assert cost[rows, found[members, 1]].sum() == pytest.approx(best, rel=1e-5)


def test_rank_level_counts_within_groups():
  codes = np.array([[1, 0], [0, 0], [1, 0], [1, 1], [1, 0]], np.int32)
  found = collisions.add_rank_level(codes)
  np.testing.assert_array_equal(found[:, 2], [0, 0, 1, 0, 2])


def test_over_full_prefixes_lose_their_farthest_members():
  x = np.array([[0.0], [0.1], [0.2], [0.3], [9.0]], np.float32)
  books = [np.array([[0.0], [5.0], [9.0]], np.float32)]
  prefixes = np.array([[0], [0], [0], [0], [2]], np.int32)
  moved = collisions.cap_prefixes(x, prefixes, books, 2)
  np.testing.assert_array_equal(moved[:, 0], [0, 0, 1, 1, 2])
  with pytest.raises(ValueError, match="5 items share the codes"):
    collisions.cap_prefixes(x, prefixes, [books[0][:2]], 2)


@pytest.mark.parametrize(("levels", "items"), [(3, 64), (3, 60), (4, 250)])
def test_a_catalogue_that_just_fits_has_unique_ids(levels, items):
  """Half of it in one place; clusters may hold more than their share."""
  x = vectors(8, items)
  x[: items // 2] = 9 + 1e-3 * x[: items // 2]
  for balance in ("capped", "none"):
    config = make_config(
      num_codes=4, num_levels=levels, balance=balance, collisions="assign"
    )
    coding = residual.fit(x, config)
    assert coding.codebook_sizes == (4,) * levels
    assert is_unique(coding.codes)


def test_prefix_groups_larger_than_a_codebook_are_repaired():
  x = np.concatenate([np.zeros((40, 4)), 9 + np.zeros((10, 4))])
  x = x.astype(np.float32) + 1e-3 * vectors(7, 50)
  config = make_config(balance="none", num_levels=2)
  assert is_unique(residual.fit(x, config).codes)


@pytest.mark.parametrize("rows", [1, 2, 3, 5, 11, 30])
@pytest.mark.parametrize("num_levels", [1, 3])
def test_tiny_catalogues(rows, num_levels):
  config = make_config(num_codes=256, num_levels=num_levels, iterations=2)
  coding = residual.fit(vectors(8, rows), config)
  assert is_unique(coding.codes)
  assert coding.codebook_sizes[0] <= max(2, rows)
  ids = tokenize.as_artefact(vectors(8, rows), coding, config, "x")
  assert ids.codes.shape == (rows + 1, num_levels)


def test_codes_for_small_catalogues():
  config = config_lib.TokenizerConfig()
  sizes = {n: residual.num_codes(n, config) for n in (1, 30, 1000, 12101)}
  assert sizes == {1: 1, 30: 10, 1000: 256, 12101: 256}


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"balance": "some"}, "tokenizer.balance is 'some'"),
    ({"collisions": "some"}, "tokenizer.collisions is 'some'"),
    ({"slack": 0.9}, "cannot hold"),
    ({"num_levels": 0}, "num_levels must be at least 1"),
    ({"num_codes": 3, "num_levels": 2}, r"60 items do not fit into 3\^2"),
  ],
)
def test_bad_settings_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    residual.fit(vectors(9), make_config(**change))


def test_vectors_that_are_not_finite_are_refused():
  x = vectors(9)
  x[6, 1] = np.nan
  with pytest.raises(ValueError, match="item 7 is not finite"):
    residual.fit(x, make_config())


@pytest.mark.parametrize("mode", ["keep", "extra", "assign"])
def test_new_items_leave_old_ids_alone(mode):
  x = np.repeat(vectors(10, 15), 2, axis=0)
  config = make_config(collisions=mode)
  old = tokenize.as_artefact(x, residual.fit(x, config), config, "x")
  new = np.concatenate([x[:5], vectors(11, 20)])
  both = residual.encode_new(new, old)
  np.testing.assert_array_equal(both.codes[:31], old.codes)
  assert both.codes.shape == (56, old.codes.shape[1])
  assert both.codebook_sizes == old.codebook_sizes
  assert (both.codes < np.array(both.codebook_sizes)[None]).all()
  assert both.fingerprint != old.fingerprint
  if mode == "keep":
    plain = arg_min_codes(new, old.codebooks)
    np.testing.assert_array_equal(both.codes[31:], plain)
  else:
    assert is_unique(both.codes[1:])


def known(codes, books):
  report = semantic_ids.quality_report(codes[1:], (2, 2))
  return semantic_ids.SemanticIds(codes, (2, 2), books, "x", report, "assign")


def test_new_items_take_the_nearest_free_id_then_the_next_prefix():
  books = [
    np.array([[0.0], [10.0]], np.float32),
    np.array([[0.0], [1.0]], np.float32),
  ]
  ids = known(np.array([[0, 0], [0, 0]], np.int32), books)
  new = np.array([[0.1], [0.2], [0.3]], np.float32)
  both = residual.encode_new(new, ids)
  np.testing.assert_array_equal(both.codes[2:], [[0, 1], [1, 0], [1, 1]])
  with pytest.raises(ValueError, match="new item 0 .* no free"):
    residual.encode_new(new[:1], both)
  with pytest.raises(ValueError, match="width 2, the codebooks 1"):
    residual.encode_new(np.zeros((1, 2), np.float32), ids)
