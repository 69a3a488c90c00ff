"""Files are whole or absent, and fingerprints tell apart what differs."""

import json
import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onerec_jax import files

JSON = st.recursive(
  st.none() | st.booleans() | st.integers(-5, 5) | st.text(max_size=3),
  lambda inner: (
    st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=2), inner, max_size=3)
  ),
  max_leaves=6,
)


def test_written_content_is_there_and_nothing_else(tmp_path):
  path = tmp_path / "new" / "folder" / "a.bin"
  files.write_bytes(path, b"one")
  files.write_bytes(path, b"two")
  assert path.read_bytes() == b"two"
  assert [p.name for p in path.parent.iterdir()] == ["a.bin"]
  # Others may read it: mkstemp alone would make it private.
  assert path.stat().st_mode & 0o044 == 0o044


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_crash_before_the_rename_leaves_the_old_file(
  tmp_path, monkeypatch, error
):
  path = tmp_path / "a.json"
  files.write_json(path, {"old": 1})

  def crash(*_):
    raise error

  monkeypatch.setattr(os, "replace", crash)
  with pytest.raises(type(error)):
    files.write_json(path, {"new": 2})
  assert files.read_json(path) == {"old": 1}
  assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_values_that_are_no_json_leave_the_old_file(tmp_path):
  path = tmp_path / "a.json"
  files.write_json(path, [1])
  with pytest.raises(TypeError):
    files.write_json(path, {"array": np.zeros(2)})
  assert files.read_json(path) == [1]


@pytest.mark.parametrize("content", [b"", b'{"cut": ', b"\xff\xfe"])
def test_broken_json_is_named_with_what_to_do(tmp_path, content):
  path = tmp_path / "manifest.json"
  path.write_bytes(content)
  with pytest.raises(ValueError, match=r"manifest\.json.*delete it and run"):
    files.read_json(path)


def test_a_missing_json_is_a_missing_file(tmp_path):
  with pytest.raises(FileNotFoundError, match="nothing.json"):
    files.read_json(tmp_path / "nothing.json")


def test_sha256_is_that_of_the_content(tmp_path):
  path = tmp_path / "abc"
  path.write_bytes(b"abc")
  # FIPS 180-2, appendix B.1.
  assert files.sha256(path) == (
    "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
  )


@given(st.lists(JSON, max_size=3), st.lists(JSON, max_size=3))
def test_fingerprints_agree_where_the_values_do(one, other):
  same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
  assert (files.fingerprint(*one) == files.fingerprint(*other)) == same
  assert len(files.fingerprint(*one)) == 12


def test_arrays_count_with_bytes_shape_and_dtype():
  array = np.arange(6, dtype=np.int32)
  different = [
    array,
    array + 1,
    array.reshape(2, 3),
    array.reshape(3, 2),
    array.astype(np.int64),
    array.view(np.float32),
    array.tolist(),
  ]
  assert len({files.fingerprint(x) for x in different}) == len(different)
  # Where the bytes lie does not count.
  wide = np.repeat(array, 2)[::2]
  assert not wide.flags.c_contiguous
  assert files.fingerprint(wide) == files.fingerprint(array)
  assert files.fingerprint("ab", "c") != files.fingerprint("a", "bc")
