"""Shapes, layouts and devices in HLO, against hand counts."""

import numpy as np
import pytest

from onerec_jax.scaling import hlo


@pytest.mark.parametrize(
  ("text", "size", "hbm"),
  [
    ("f32[]", 4, True),
    ("pred[6]{0}", 6, True),
    ("bf16[3,5]{1,0}", 30, True),
    # Tiles of 8 × 128 around 3 × 5, whichever axis is the minor one.
    ("bf16[3,5]{1,0:T(8,128)(2,1)}", 8 * 128 * 2, True),
    ("f32[3,200]{1,0:T(8,128)}", 8 * 256 * 4, True),
    ("f32[3,200]{0,1:T(8,128)}", 200 * 128 * 4, True),
    ("f32[2,9,128]{2,1,0:T(8,128)S(1)}", 2 * 16 * 128 * 4, False),
    ("s32[100]{0:T(128)S(0)}", 128 * 4, True),
  ],
)
def test_a_buffer_is_as_large_as_its_tiles(text, size, hbm):
  (buffer,) = hlo.parse_shape(text)
  assert (buffer.size, buffer.hbm) == (size, hbm)


def test_tuples_are_flattened():
  found = hlo.parse_shape(
    "((f32[2]{0:T(128)}), /*index=1*/bf16[4,8]{1,0}, u32[]{:S(2)})"
  )
  assert [buffer.dims for buffer in found] == [(2,), (4, 8), ()]
  assert [buffer.hbm for buffer in found] == [True, True, False]


def test_parse():
  computations, entry = hlo.parse(
    """HloModule jit_f, is_scheduled=true

%inner (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %n = f32[2]{0} negate(%p)
}

ENTRY %main (x: f32[2]) -> (f32[2], f32[2]) {
  %x = f32[2]{0} parameter(0)
  %f.1 = f32[2]{0} fusion(%x), kind=kLoop, calls=%inner
  ROOT %t = (f32[2]{0}, f32[2]{0}) tuple(%x, /*index=1*/%f.1)
}
"""
  )
  assert (entry, list(computations)) == ("main", ["inner", "main"])
  main = computations["main"]
  assert main["f.1"].called("calls") == "inner"
  assert main["t"].operands == ("x", "f.1")
  assert [i.name for i in main.values() if i.is_root] == ["t"]
  assert computations["inner"]["p"].literal == "0"


def test_without_an_entry_it_is_refused():
  with pytest.raises(ValueError, match="no ENTRY"):
    hlo.parse("HloModule empty\n")


@pytest.mark.parametrize(
  ("written", "groups"),
  [
    ("replica_groups={{0,2},{1,3}}, dimensions={0}", [[0, 2], [1, 3]]),
    ("source_target_pairs={{0,1},{1,0}}", [[0, 1], [1, 0]]),
    ("replica_groups=[2,3]<=[6], x=1", [[0, 1, 2], [3, 4, 5]]),
    ("replica_groups=[3,2]<=[2,3]T(1,0), x=1", [[0, 3], [1, 4], [2, 5]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a'}, x=1", [[0, 2], [1, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'b'}, x=1", [[0, 1], [2, 3]]),
    ("replica_groups=mesh['a'=2,'b'=2] {'a','b'}, x=1", [[0, 1, 2, 3]]),
    (
      # Devices in the order 0 2 1 3, then as the mesh above.
      "replica_groups=mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'b'}, x=1",
      [[0, 2], [1, 3]],
    ),
  ],
)
def test_replica_groups(written, groups):
  np.testing.assert_array_equal(hlo.replica_groups(written), groups)


def test_an_unknown_form_of_devices_is_refused():
  with pytest.raises(ValueError, match="unknown form.*mesh.*'a'"):
    hlo.replica_groups("replica_groups=mesh['a'=4] {'a':(1)2}")
