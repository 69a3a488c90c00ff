"""Times from counts, against brute force over the torus and hand counts."""

import collections
import dataclasses
import io
import itertools

import numpy as np
import pytest
import rich.console

from onerec_jax.scaling import roofline, tally

V5P, V5E = roofline.CHIPS["v5p"], roofline.CHIPS["v5e"]


def place(name, cores=1):
  chip, _, shape = name.partition(":")
  dims = tuple(int(size) for size in shape.split("x"))
  coords = np.asarray(list(itertools.product(*map(range, dims))))
  coords = np.repeat(coords, cores, axis=0)
  return roofline.Place(name, roofline.CHIPS[chip], dims, coords, cores)


def collective(kind, size, groups, times=1):
  return tally.Collective(kind, size, np.asarray(groups), times, "")


CUBE = place("v5p:4x4x4")
ALL = [range(64)]
ROWS = np.arange(64).reshape(16, 4)  # along the last axis
COLUMNS = ROWS.reshape(4, 16).T  # along the first


@pytest.mark.parametrize(
  ("kind", "groups", "expected"),
  [
    # Six links of 100 GB/s; 63/64 of the array comes in.
    ("all-gather", ALL, 63 / 64 / 600e9),
    ("reduce-scatter", ALL, 63 / 64 / 600e9),
    ("all-reduce", ALL, 2 * 63 / 64 / 600e9),
    # One axis of four in a ring: two links.
    ("all-gather", ROWS, 3 / 4 / 200e9),
    ("all-gather", COLUMNS, 3 / 4 / 200e9),
    # Two neighbours: one link between them.
    ("all-gather", np.arange(64).reshape(32, 2), 1 / 2 / 100e9),
    # Every other chip of a ring: its links are shared with the others.
    ("all-gather", [[0, 2], [1, 3]], 1 / 2 / 100e9),
    ("collective-permute", [[0, 1], [1, 2], [2, 3], [3, 0]], 1 / 100e9),
    ("collective-permute", [[0, 2]], 2 / 100e9),
    ("all-gather", [[0]], 0.0),
  ],
)
def test_seconds_on_a_cube(kind, groups, expected):
  found = roofline.collective_seconds(collective(kind, 10**9, groups), CUBE)
  assert found == pytest.approx(1e9 * expected)


def test_a_part_of_a_pod_has_no_rings():
  """v5e wraps at 16 alone: a line's end has one link, and long ways round."""
  square, pod = place("v5e:4x4"), place("v5e:16x16")
  row = np.arange(16).reshape(4, 4)
  gather = collective("all-gather", 10**9, row)
  assert roofline.collective_seconds(gather, square) == 0.75 * 1e9 / 50e9
  gather = collective("all-gather", 10**9, [range(256)])
  expected = 255 / 256 * 1e9 / 200e9
  assert roofline.collective_seconds(gather, pod) == pytest.approx(expected)
  ends = collective("collective-permute", 10**9, [[0, 3]])
  assert roofline.collective_seconds(ends, square) == 3 * 1e9 / 50e9
  ends = collective("collective-permute", 10**9, [[0, 15]])
  assert roofline.collective_seconds(ends, pod) == 1e9 / 50e9


@pytest.mark.parametrize("length", [4, 8, 16])
def test_an_exchange_in_a_ring_against_its_busiest_link(length):
  """Each message goes the short way, one link after another."""
  ring = place(f"v5p:{length}x1x1")
  size = 10**6
  load = collections.Counter()
  for source, target in itertools.permutations(range(length), 2):
    ahead = (target - source) % length
    ways = [1, -1] if 2 * ahead == length else [1 if 2 * ahead < length else -1]
    for way in ways:
      for hop in range(min(ahead, length - ahead)):
        link = (source + way * hop) % length, way
        load[link] += size / length / len(ways)
  exchange = collective("all-to-all", size, [range(length)])
  found = roofline.collective_seconds(exchange, ring)
  assert found == pytest.approx(max(load.values()) / V5P.link_bandwidth)


def test_traffic():
  groups = [[0, 1, 2, 3]]
  assert roofline.traffic(collective("all-gather", 100, groups)) == 75
  assert roofline.traffic(collective("all-reduce", 100, groups)) == 150
  assert roofline.traffic(collective("collective-permute", 100, groups)) == 100


def report(where, cores=1):
  counts = tally.Tally(
    flops=459e9,
    bytes=2 * 2765e6,
    cycles=1.75e7,
    collectives=[collective("all-gather", 64 * 10**6, ALL, times=10)],
  )
  return roofline.report(
    "train step", counts, 0.75 * 459e9, int(3e9), int(2e9), where, 1.5
  )


def test_a_report():
  found = report(CUBE)
  assert found.chips == 64
  assert found.memory == 5e9
  assert found.compute_seconds == pytest.approx(1e-3)
  assert found.memory_seconds == pytest.approx(2e-3)
  assert found.interconnect_seconds == pytest.approx(10 * 63e6 / 600e9)
  assert found.compiler_seconds == pytest.approx(0.01)
  assert found.collective_bytes == {"all-gather": 630e6}
  assert found.overlapped_seconds == pytest.approx(2e-3)
  assert found.serial_seconds == pytest.approx(4.05e-3)
  # Three quarters of a step's worth of peak, in two steps' time.
  assert found.mfu(found.overlapped_seconds) == pytest.approx(0.375)


def test_a_core_has_its_share_of_the_chip():
  whole, half = report(CUBE), report(place("v5p:4x4x4", cores=2), cores=2)
  assert half.chips == 64
  assert half.capacity == whole.capacity / 2
  assert half.compute_seconds == pytest.approx(2 * whole.compute_seconds)
  assert half.memory_seconds == pytest.approx(2 * whole.memory_seconds)


def printed(found):
  console = rich.console.Console(width=100, file=io.StringIO())
  console.print(roofline.table(found))
  lines = console.file.getvalue().splitlines()
  return [" ".join(line.split()) for line in lines]


def test_a_report_is_printed_with_its_bounds():
  lines = printed(report(CUBE))
  assert "memory 5.00 GB, 5%: fits" in lines
  assert "all-gather bytes 0.63 GB" in lines
  assert "bound, all overlap 2.0 ms, MFU 37.5%" in lines
  assert "bound, none overlap 4.0 ms, MFU 18.5%" in lines


def test_what_does_not_fit_is_said():
  large = dataclasses.replace(report(CUBE), temporaries=100 * 10**9)
  assert "memory 103.00 GB, 108%: DOES NOT FIT" in printed(large)
