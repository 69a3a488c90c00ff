"""How fast a program can be at best, from what it does and where it runs.

Three times are bounds from below: matrix products at the chip's peak, HBM
traffic at its bandwidth, collectives at that of the links they can use. If
all overlap, a step takes the longest of them; if none do, their sum. Neither
is a prediction: small products do not reach the peak, and the vector unit has
no row here. `compiler_seconds` is the compiler's own estimate of what it has
one for: not of collectives, nor of kernels (models/fused_attention.py).
"""

import dataclasses

import numpy as np
import rich.table

from onerec_jax.scaling.tally import Collective, Tally
from onerec_jax.training import throughput


@dataclasses.dataclass(frozen=True)
class Chip:
  """One chip, both of its cores where it has two.

  From https://cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e}, read in 2026. The
  bandwidth of a link is the page's bidirectional bandwidth of a chip over its
  4 or 6 links and 2 directions; v4's page has none, its bisection of 24 TB/s
  agrees with the 50 GB/s a link of arXiv 2304.01433.

  Attributes:
    peak_flops: FLOP/s, bfloat16.
    hbm_bytes: capacity.
    hbm_bandwidth: bytes/s.
    link_bandwidth: bytes/s of one link in one direction.
    clock: cycles/s. INFERRED: the peak over the multiply-adds of a cycle.
    wraps: an axis is a ring if its length is a multiple of this.
  """

  peak_flops: float
  hbm_bytes: float
  hbm_bandwidth: float
  link_bandwidth: float
  clock: float
  wraps: int


CHIPS = {
  "v4": Chip(throughput.PEAK_FLOPS["TPU v4"], 32e9, 1200e9, 50e9, 1.05e9, 4),
  "v5e": Chip(
    throughput.PEAK_FLOPS["TPU v5 lite"], 16e9, 819e9, 50e9, 1.5e9, 16
  ),
  "v5p": Chip(throughput.PEAK_FLOPS["TPU v5p"], 95e9, 2765e9, 100e9, 1.75e9, 4),
  "v6e": Chip(
    throughput.PEAK_FLOPS["TPU v6 lite"], 32e9, 1600e9, 100e9, 1.75e9, 16
  ),
}


@dataclasses.dataclass(frozen=True)
class Place:
  """A slice of chips and the program's devices on it.

  Attributes:
    name: as `v5p:4x4x4`.
    chip: of `CHIPS`.
    dims: chips along each axis of the torus.
    coords: [devices, axes] of each device, by its number in the mesh.
    cores: devices a chip; 2 where the runtime gives each core its own.
  """

  name: str
  chip: Chip
  dims: tuple[int, ...]
  coords: np.ndarray
  cores: int


def _spread(places: np.ndarray, length: int, wraps: int) -> tuple[float, float]:
  """(links, mean hops) along one axis for members at these places.

  A ring has two links a chip, a line's end has one. Members that are `stride`
  apart share the links with the groups in between.
  """
  members = np.unique(places)
  count = len(members)
  if count == 1:
    return 0.0, 0.0
  stride = int(np.diff(members).min())
  if count * stride == length and length % wraps == 0:
    return 2.0 / stride, stride * count / 4
  return 1.0 / stride, stride * (count - 1 / count) / 3


def traffic(collective: Collective) -> float:
  """Bytes a chip must take in for one run, whatever the network.

  (n − 1)/n of the array for a gather, a scatter or an exchange, twice that
  for an all-reduce, all of it for a permute.
  """
  if collective.kind == "collective-permute":
    return float(collective.size)
  members = collective.groups.shape[1]
  passes = 2 if collective.kind == "all-reduce" else 1
  return passes * (members - 1) / members * collective.size


def collective_seconds(collective: Collective, place: Place) -> float:
  """Time of one run, with every link that the group spans in use.

  Gathers, scatters and reductions run round the rings of all axes they span
  at once; an exchange is bound by the hops of its messages; a permute goes
  over one link, as often as it has hops.
  """
  link = place.chip.link_bandwidth / place.cores
  slowest = 0.0
  for group in collective.groups:
    members = place.coords[group]
    spread = [
      _spread(members[:, axis], length, place.chip.wraps)
      for axis, length in enumerate(place.dims)
    ]
    links = sum(axis[0] for axis in spread)
    if not links:  # one chip alone, or the two cores of one
      continue
    if collective.kind == "collective-permute":
      distance = np.abs(members[0] - members[1])
      lengths = np.asarray(place.dims)
      ring = lengths % place.chip.wraps == 0
      hops = np.where(ring, np.minimum(distance, lengths - distance), distance)
      seconds = collective.size * hops.sum() / link
    elif collective.kind == "all-to-all":
      hops = sum(axis[1] for axis in spread)
      seconds = collective.size * hops / (links * link)
    else:
      seconds = traffic(collective) / (links * link)
    slowest = max(slowest, seconds)
  return slowest


@dataclasses.dataclass(frozen=True)
class Report:
  """What a compiled program needs of one device, and the bounds of its time.

  Attributes:
    program: which.
    place: name of the slice.
    chips: of the slice.
    arguments: bytes of parameters, optimizer, tables and batch.
    temporaries: bytes of everything else the program allocates.
    capacity: bytes of HBM there are.
    model_flops: of the model's mathematics, no recomputation.
    flops: matrix products that run.
    hbm_bytes: moved in and out of HBM.
    collective_bytes: kind → bytes a device takes in.
    compute_seconds: `flops` at the peak.
    memory_seconds: `hbm_bytes` at the bandwidth.
    interconnect_seconds: of all collectives, one after another.
    compiler_seconds: the compiler's estimate, without collectives and kernels.
    peak_flops: of one device.
    compile_seconds: wall time of tracing and compiling.
  """

  program: str
  place: str
  chips: int
  arguments: int
  temporaries: int
  capacity: float
  model_flops: float
  flops: float
  hbm_bytes: float
  collective_bytes: dict[str, float]
  compute_seconds: float
  memory_seconds: float
  interconnect_seconds: float
  compiler_seconds: float
  peak_flops: float
  compile_seconds: float

  @property
  def memory(self) -> int:
    """Bytes of HBM in use at most."""
    return self.arguments + self.temporaries

  @property
  def overlapped_seconds(self) -> float:
    """All three at once: the longest."""
    return max(
      self.compute_seconds, self.memory_seconds, self.interconnect_seconds
    )

  @property
  def serial_seconds(self) -> float:
    """One after another."""
    return (
      self.compute_seconds + self.memory_seconds + self.interconnect_seconds
    )

  def mfu(self, seconds: float) -> float:
    """Model FLOPs utilisation of a step that takes so long."""
    return self.model_flops / (self.peak_flops * seconds)


def report(
  program: str,
  counts: Tally,
  model_flops: float,
  arguments: int,
  temporaries: int,
  place: Place,
  compile_seconds: float,
) -> Report:
  """Times from counts; arguments and results as in `Report`."""
  chip, by_kind, interconnect = place.chip, {}, 0.0
  for collective in counts.collectives:
    moved = collective.times * traffic(collective)
    by_kind[collective.kind] = by_kind.get(collective.kind, 0.0) + moved
    interconnect += collective.times * collective_seconds(collective, place)
  return Report(
    program=program,
    place=place.name,
    chips=len(place.coords) // place.cores,
    arguments=arguments,
    temporaries=temporaries,
    capacity=chip.hbm_bytes / place.cores,
    model_flops=model_flops,
    flops=counts.flops,
    hbm_bytes=counts.bytes,
    collective_bytes=dict(sorted(by_kind.items())),
    compute_seconds=counts.flops * place.cores / chip.peak_flops,
    memory_seconds=counts.bytes * place.cores / chip.hbm_bandwidth,
    interconnect_seconds=interconnect,
    compiler_seconds=counts.cycles / chip.clock,
    peak_flops=chip.peak_flops / place.cores,
    compile_seconds=compile_seconds,
  )


def table(found: Report) -> rich.table.Table:
  """A report for the terminal; all figures are of one chip (or core)."""
  rows = rich.table.Table(
    f"{found.program}, {found.place}", "one chip", box=None
  )
  gigabytes = lambda count: f"{count / 1e9:.2f} GB"
  milliseconds = lambda seconds: f"{1e3 * seconds:.1f} ms"
  bound = lambda s: f"{milliseconds(s)}, MFU {found.mfu(s):.1%}"
  share = found.memory / found.capacity
  fits = "fits" if share <= 1 else "DOES NOT FIT"
  for name, value in (
    ("arguments", gigabytes(found.arguments)),
    ("temporaries", gigabytes(found.temporaries)),
    ("memory", f"{gigabytes(found.memory)}, {share:.0%}: {fits}"),
    ("model FLOPs", f"{found.model_flops / 1e12:.3f} T"),
    ("FLOPs that run", f"{found.flops / 1e12:.3f} T"),
    ("HBM bytes", gigabytes(found.hbm_bytes)),
    *(
      (f"{kind} bytes", gigabytes(count))
      for kind, count in found.collective_bytes.items()
    ),
    ("compute", milliseconds(found.compute_seconds)),
    ("memory traffic", milliseconds(found.memory_seconds)),
    ("interconnect", milliseconds(found.interconnect_seconds)),
    ("bound, all overlap", bound(found.overlapped_seconds)),
    ("bound, none overlap", bound(found.serial_seconds)),
    # No bound of a step, so no MFU.
    (
      "compiler's estimate, no collectives, no kernels",
      milliseconds(found.compiler_seconds),
    ),
    ("compiled in", f"{found.compile_seconds:.0f} s"),
  ):
    rows.add_row(name, value)
  return rows
