"""Counts what a compiled program does, from its HLO.

`compiled.cost_analysis()` counts the body of a loop once, has no collectives
and does not tell on-chip memory from HBM. This walk does: a loop counts as
often as it runs, a collective once with its devices. What is counted:

  flops   2 × multiply-adds of matrix products (`dot`, `convolution`, and what
          a kernel says it does): the matrix unit's work, recomputation included
  bytes   that cross HBM's boundary: operands and results of every top-level
          instruction; slices, gathers and updates count what they touch, a
          fusion's parameter what its users touch
  cycles  the TPU compiler's own estimate of each instruction; it has none for
          collectives and kernels
"""

import dataclasses
import re
from collections.abc import Iterable, Iterator

import numpy as np

from onerec_jax.scaling import hlo
from onerec_jax.scaling.hlo import Computation, Instruction

_FREE = (
  "after-all",
  "async-done",
  "async-start",
  "async-update",
  "bitcast",
  "call",
  "conditional",
  "constant",
  "get-tuple-element",
  "opt-barrier",
  "parameter",
  "partition-id",
  "replica-id",
  "tuple",
  "while",
)
"""Moves nothing itself; a called computation is walked."""

_SLICES = ("slice", "dynamic-slice", "gather", "slice-start")

_MARKERS = (
  "AllocateBuffer",
  "AssumeGatherIndicesInBound",
  "AsyncCollectiveDone",
  "AsyncCollectiveStart",
  "ConcatBitcast",
)
"""Custom calls that tell the compiler something and move nothing."""


@dataclasses.dataclass(frozen=True)
class Collective:
  """One collective of the program.

  Attributes:
    kind: its opcode; `reduce-scatter` also where the compiler has fused an
      all-reduce with the slice of its result.
    size: bytes of the whole array: gathered, or to be reduced or exchanged.
    groups: [groups, n] devices that take part together, by number in the
      mesh; for a permute [pairs, 2], source and target.
    times: how often it runs.
    op_name: where in the Python program it comes from.
  """

  kind: str
  size: int
  groups: np.ndarray
  times: int
  op_name: str


@dataclasses.dataclass
class Tally:
  """Sums over one run of a program, of one device; see above."""

  flops: float = 0.0
  bytes: float = 0.0
  cycles: float = 0.0
  collectives: list[Collective] = dataclasses.field(default_factory=list)


def tally(text: str) -> Tally:
  """Counts a compiled program.

  Args:
    text: `compiled.as_text()`.

  Raises:
    ValueError: no entry, a loop whose number of turns cannot be read, or
      devices of a collective in an unknown form.
  """
  computations, entry = hlo.parse(text)
  walk = _Walk(computations)
  walk.computation(entry, 1)
  return walk.total


class _Walk:
  """Adds up a program, computation by computation."""

  def __init__(self, computations: dict[str, Computation]):
    self.total = Tally()
    self._all = computations
    self._users: dict[str, dict[str, list[Instruction]]] = {}

  def computation(self, name: str, times: int) -> None:
    """Adds a computation that runs so many times."""
    body = self._all[name]
    # An asynchronous collective is spread over several fusions of one
    # computation; its channel tells that it is one.
    channels: set[str] = set()
    for instruction in body.values():
      if instruction.opcode == "while":
        turns = loop_turns(self._all, body, instruction)
        self.computation(instruction.called("body"), times * turns)
      elif instruction.opcode in ("call", "async-start", "conditional"):
        # Of a conditional all branches count: an upper bound.
        for called in _called(instruction):
          self.computation(called, times)
      found = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
      self.total.cycles += times * int(found[1]) if found else 0
      self.total.bytes += times * self._bytes(body, instruction)
      for where, inner in self._inside(body, instruction):
        if inner.opcode in ("dot", "convolution"):
          self.total.flops += times * hlo.product_flops(where, inner)
        elif inner.opcode == "custom-call":
          self.total.flops += times * _kernel_flops(inner)
        elif inner.collective:
          self._collective(where, inner, times, channels)

  def _inside(
    self, body: Computation, instruction: Instruction
  ) -> Iterator[tuple[Computation, Instruction]]:
    """An instruction, or all those in a fusion, each with its computation."""
    if instruction.opcode != "fusion":
      yield body, instruction
      return
    fused = self._all[instruction.called("calls")]
    for inner in fused.values():
      yield from self._inside(fused, inner)

  def _collective(self, where, instruction, times, channels) -> None:
    channel = re.search(r"channel_id=(\d+)", instruction.attributes)
    channel = channel[1] if channel else instruction.name
    if channel in channels:
      return
    channels.add(channel)
    count = len(instruction.operands)
    sources = [where[o].shape[0] for o in instruction.operands]
    results = list(instruction.shape)
    if instruction.opcode.endswith("-start"):
      # The result of a start begins with the operands themselves.
      results = results[count : 2 * count]
    moved = sum(b.size for b in sources + results if b.hbm)
    self.total.bytes += times * moved
    kind = instruction.collective
    sizes = results if kind == "all-gather" else sources
    if kind == "all-reduce" and self._is_scattered(where, instruction):
      kind = "reduce-scatter"
    found = re.search(r'op_name="([^"]*)"', instruction.attributes)
    self.total.collectives.append(
      Collective(
        kind=kind,
        size=sum(b.size for b in sizes),
        groups=hlo.replica_groups(instruction.attributes),
        times=times,
        op_name=found[1] if found else "",
      )
    )

  def _is_scattered(self, where, instruction) -> bool:
    """Whether only a slice of an all-reduce is used, in the same fusion."""
    users = self._users_of(where).get(instruction.name, [])
    return (
      not instruction.is_root
      and bool(users)
      and all(user.opcode == "dynamic-slice" for user in users)
    )

  def _users_of(self, body: Computation) -> dict[str, list[Instruction]]:
    key = next(iter(body))
    if key not in self._users:
      users = self._users.setdefault(key, {})
      for instruction in body.values():
        for operand in dict.fromkeys(instruction.operands):
          users.setdefault(operand, []).append(instruction)
    return self._users[key]

  def _bytes(self, body: Computation, instruction: Instruction) -> int:
    """Of one top-level instruction; collectives are counted elsewhere."""
    opcode, shape = instruction.opcode, instruction.shape
    if opcode in _FREE or opcode.endswith("-done") or instruction.collective:
      return 0
    sources = [b for o in instruction.operands for b in body[o].shape]
    if opcode == "fusion":
      return self._fusion_bytes(body, instruction)
    if opcode == "custom-call" and _is_marker(instruction):
      return 0
    if opcode == "copy-start":
      return _hbm(shape[:2])
    if opcode in _SLICES:
      result = shape[1] if opcode == "slice-start" else shape[0]
      return result.size * (sources[0].hbm + result.hbm)
    if opcode in ("dynamic-update-slice", "scatter"):
      update = sources[1 if opcode == "dynamic-update-slice" else 2]
      return update.size * (update.hbm + shape[0].hbm)
    return _hbm(sources) + _hbm(shape)

  def _fusion_bytes(self, body: Computation, fusion: Instruction) -> int:
    fused = self._all[fusion.called("calls")]
    read = 0
    for place, operand in enumerate(fusion.operands):
      whole = _hbm(body[operand].shape)
      if whole:
        read += self._touched(fused, _parameter(fused, place), whole)
    root = next(i for i in fused.values() if i.is_root)
    if root.opcode == "tuple":
      results = [(fused[o], b) for o, b in zip(root.operands, fusion.shape)]
    else:
      results = [(root, b) for b in fusion.shape]
    return read + sum(self._written(fused, *result) for result in results)

  def _written(self, fused, instruction, buffer) -> int:
    if not buffer.hbm or instruction.opcode == "parameter":
      return 0
    if instruction.collective or _is_marker(instruction):
      return 0
    while instruction.opcode == "bitcast":
      instruction = fused[instruction.operands[0]]
    if instruction.opcode == "dynamic-update-slice":
      return fused[instruction.operands[1]].shape[0].size
    if instruction.opcode == "scatter":
      return fused[instruction.operands[2]].shape[0].size
    return buffer.size

  def _touched(
    self, fused: Computation, instruction: Instruction, whole: int
  ) -> int:
    """Bytes of a fusion's parameter that its users read, `whole` at most."""
    total = 0
    for user in self._users_of(fused).get(instruction.name, []):
      first = user.operands[0] == instruction.name
      if user.opcode == "tuple" or user.collective or _is_marker(user):
        continue
      if user.opcode == "bitcast":
        total += self._touched(fused, user, whole)
      elif user.opcode == "fusion":
        inner = self._all[user.called("calls")]
        for place, operand in enumerate(user.operands):
          if operand == instruction.name:
            total += self._touched(inner, _parameter(inner, place), whole)
      elif user.opcode in _SLICES and first:
        total += user.shape[0].size
      elif not (user.opcode in ("dynamic-update-slice", "scatter") and first):
        total = whole
    return min(whole, total)


def _hbm(buffers: Iterable[hlo.Buffer]) -> int:
  return sum(buffer.size for buffer in buffers if buffer.hbm)


def _is_marker(instruction: Instruction) -> bool:
  found = re.search(r'custom_call_target="(\w+)"', instruction.attributes)
  return found is not None and found[1] in _MARKERS


def _kernel_flops(call: Instruction) -> int:
  found = re.search(r'"cost_estimate":\{"flops":"(\d+)"', call.attributes)
  return int(found[1]) if found else 0


def _parameter(body: Computation, place: int) -> Instruction:
  return next(
    i
    for i in body.values()
    if i.opcode == "parameter" and i.literal == str(place)
  )


def _called(instruction: Instruction) -> list[str]:
  """The computations of a call, an asynchronous one, or a conditional."""
  names = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
  if names:
    return re.findall(r"[\w.\-]+", names[1])
  keys = ("to_apply", "calls", "true_computation", "false_computation")
  return [name for name in map(instruction.called, keys) if name]


def loop_turns(
  computations: dict[str, Computation], body: Computation, loop: Instruction
) -> int:
  """How often a `while` runs: its counter's start, step and limit.

  Args:
    computations: of the program.
    body: the computation the loop stands in.
    loop: the instruction.

  Raises:
    ValueError: the loop does not count up to a constant.
  """
  known = re.search(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  if known:
    return int(known[1])
  counts = _counter(computations, body, loop)
  if counts is None or None in counts:
    raise ValueError(
      f"cannot read how often loop {loop.name} runs ({loop.attributes[:80]}); "
      "teach tally.loop_turns"
    )
  start, step, end = counts
  return max(0, -(-(end - start) // step))


def _counter(
  computations: dict[str, Computation], body: Computation, loop: Instruction
) -> tuple[int | None, int | None, int | None] | None:
  """Start, step and limit of `while counter < limit`; None: another loop."""
  condition = computations[loop.called("condition")]
  test = next(i for i in condition.values() if i.is_root)
  if test.opcode != "compare" or "direction=LT" not in test.attributes:
    return None
  place = re.search(r"index=(\d+)", condition[test.operands[0]].attributes)
  if place is None:
    return None
  inside = computations[loop.called("body")]
  after = next(i for i in inside.values() if i.is_root)
  add = _origin(inside, after.operands[int(place[1])])
  steps = [_constant(inside, name) for name in add.operands]
  return (
    _constant(body, body[loop.operands[0]].operands[int(place[1])]),
    next((step for step in steps if add.opcode == "add" and step), None),
    _constant(condition, test.operands[1]),
  )


def _origin(body: Computation, name: str) -> Instruction:
  """The instruction that a copy goes back to."""
  instruction = body[name]
  while instruction.opcode in ("copy", "bitcast", "convert"):
    instruction = body[instruction.operands[0]]
  return instruction


def _constant(body: Computation, name: str) -> int | None:
  """The value of a scalar constant, or of its copy; None: no constant."""
  origin = _origin(body, name)
  return int(origin.literal) if origin.opcode == "constant" else None
