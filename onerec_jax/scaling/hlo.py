"""Reads the text of a compiled program: HLO after the TPU compiler's passes.

Shapes carry the layout the compiler chose, so that a buffer's size is that of
its tiles, and its memory is known: S(1) in a layout is vector memory, on the
chip; no such mark, or S(0), is HBM.
"""

import dataclasses
import math
import re

import numpy as np

Shape = tuple["Buffer", ...]

_ITEM_BITS = {"pred": 8, "token": 0, "opaque": 0}
"""Of types whose name does not say."""

_COLLECTIVES = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-permute",
  "reduce-scatter",
)


@dataclasses.dataclass(frozen=True)
class Buffer:
  """An array as the compiler lays it out.

  Attributes:
    size: bytes, padded to its tiles.
    dims: logical dimensions.
    hbm: whether it lies in the main memory.
  """

  size: int
  dims: tuple[int, ...]
  hbm: bool


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line: `%name = shape opcode(operands), attributes`.

  Attributes:
    name: unique in the program.
    opcode: as HLO writes it.
    shape: of the result.
    operands: names of instructions of the same computation.
    literal: what stands between the parentheses.
    attributes: what follows them.
    is_root: whether it is its computation's result.
  """

  name: str
  opcode: str
  shape: Shape
  operands: tuple[str, ...]
  literal: str
  attributes: str
  is_root: bool

  def called(self, attribute: str) -> str:
    """The computation an attribute (`calls`, `body`, …) names; else empty."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
    return found[1] if found else ""

  @property
  def collective(self) -> str:
    """Which collective it starts; empty if none."""
    kind = self.opcode.removesuffix("-start")
    return kind if kind in _COLLECTIVES else ""


Computation = dict[str, Instruction]
"""Instructions by name, in the order they run."""


def _buffer(dtype: str, dims: str, layout: str) -> Buffer:
  bits = _ITEM_BITS.get(dtype)
  if bits is None:
    bits = int(re.search(r"\d+", dtype)[0])
  shape = tuple(int(d) for d in dims.split(",") if d)
  order = [int(d) for d in layout.split(":")[0].split(",") if d]
  physical = [shape[d] for d in reversed(order)] if order else list(shape)
  tile = re.search(r"T\(([\d,]+)\)", layout)
  if tile:
    for place, size in enumerate(reversed(tile[1].split(",")), 1):
      if place <= len(physical):
        whole = math.ceil(physical[-place] / int(size)) * int(size)
        physical[-place] = whole
  space = re.search(r"S\((\d+)\)", layout)
  in_hbm = space is None or space[1] == "0"
  return Buffer(math.prod(physical) * bits // 8, shape, in_hbm)


_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")


def parse_shape(text: str) -> Shape:
  """The arrays of a shape, nested tuples flattened."""
  return tuple(
    _buffer(dtype, dims.replace("<=", ""), layout)
    for dtype, dims, layout in _ARRAY.findall(text)
  )


def _balanced(text: str, start: int) -> int:
  """One past the parenthesis that closes the one at `start`."""
  depth = 0
  for place in range(start, len(text)):
    depth += {"(": 1, ")": -1}.get(text[place], 0)
    if depth == 0:
      return place + 1
  raise ValueError(f"unbalanced parentheses in HLO: {text[:120]}")


_HEAD = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = ")


def _instruction(line: str) -> Instruction | None:
  head = _HEAD.match(line)
  if head is None:
    return None
  rest = line[head.end() :]
  end = _balanced(rest, 0) if rest[0] == "(" else rest.index(" ")
  shape, rest = rest[:end], rest[end:].lstrip()
  start = rest.index("(")
  end = _balanced(rest, start)
  inside = rest[start + 1 : end - 1]
  return Instruction(
    name=head[2],
    opcode=rest[:start],
    shape=parse_shape(shape),
    operands=tuple(re.findall(r"%([\w.\-]+)", inside)),
    literal=inside,
    attributes=rest[end:],
    is_root=bool(head[1]),
  )


def parse(text: str) -> tuple[dict[str, Computation], str]:
  """Computations by name, and the entry's name.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations: dict[str, Computation] = {}
  entry, current = "", None
  for line in text.splitlines():
    header = re.match(r"(ENTRY )?%?([\w.\-]+) .*\{$", line)
    if header and not line.startswith(" "):
      current = computations.setdefault(header[2], {})
      entry = header[2] if header[1] else entry
    elif current is not None and line.startswith(" "):
      found = _instruction(line)
      if found:
        current[found.name] = found
  if not entry:
    raise ValueError("the HLO text has no ENTRY computation")
  return computations, entry


def replica_groups(attributes: str) -> np.ndarray:
  """[groups, n] devices of a collective, or its [pairs, 2].

  Reads the three forms of HLO: listed, `[2,8]<=[8,2]T(1,0)`, and
  `mesh['a'=8,'b'=2] {'a'}`.

  Raises:
    ValueError: another form.
  """
  listed = re.search(
    r"(?:replica_groups|source_target_pairs)=\{(\{[\d,{} ]*\})\}", attributes
  )
  if listed:
    rows = re.findall(r"\{([\d, ]+)\}", listed[1])
    return np.asarray([[int(i) for i in row.split(",")] for row in rows])
  iota = re.search(r"replica_groups=(\[[\d,]+\]<=\S*?)(?:, |$)", attributes)
  if iota:
    return _iota(iota[1])
  mesh = re.search(
    r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(([^)]*\)?)\))? "
    r"\{([^}:]*)\}",
    attributes,
  )
  if mesh is None:
    where = attributes.find("replica_groups")
    raise ValueError(
      "a collective's devices are written in an unknown form: "
      f"{attributes[where : where + 120]!r}; teach hlo.replica_groups"
    )
  axes = re.findall(r"'([^']+)'=(\d+)", mesh[1])
  names = [name for name, _ in axes]
  sizes = [int(size) for _, size in axes]
  order = _iota(mesh[2]).ravel() if mesh[2] else np.arange(math.prod(sizes))
  inside = [names.index(name) for name in re.findall(r"'([^']+)'", mesh[3])]
  outside = [axis for axis in range(len(axes)) if axis not in inside]
  width = math.prod(sizes[axis] for axis in inside)
  return order.reshape(sizes).transpose(outside + inside).reshape(-1, width)


def _iota(text: str) -> np.ndarray:
  """`[4,2]<=[2,4]T(1,0)`; without `<=`, the shape is the source's own."""
  lists = [
    [int(i) for i in part.split(",")]
    for part in re.findall(r"[\[(]([\d,]+)[\])]", text)
  ]
  shape, source = (lists[0], lists[1]) if "<=" in text else (None, lists[0])
  values = np.arange(math.prod(source)).reshape(source)
  if "T(" in text:
    values = values.transpose(lists[-1])
  return values if shape is None else values.reshape(shape)


def product_flops(where: Computation, product: Instruction) -> float:
  """2 × multiply-adds of a `dot` or `convolution`, as XLA counts them.

  Args:
    where: the computation with its operands.
    product: the instruction.
  """
  left, right = (where[o].shape[0].dims for o in product.operands[:2])
  out = product.shape[0].dims
  if product.opcode == "dot":
    found = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", product.attributes)
    axes = [int(axis) for axis in found[1].split(",") if axis]
    return 2.0 * math.prod(out) * math.prod(left[axis] for axis in axes)
  labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", product.attributes)
  of_left, of_right, of_out = labels.groups()
  # A batched product is a convolution whose window meets one place of the
  # dilated input: only places inside the input count.
  total = 2.0 * right[of_right.index("i")]
  total *= out[of_out.index("b")] * out[of_out.index("f")]
  window = _window(product.attributes, sum(c.isdigit() for c in of_out))
  for axis, dim in enumerate(window):
    size = left[of_left.index(str(axis))]
    total *= _places(size, out[of_out.index(str(axis))], **dim)
  return total


def _window(attributes: str, axes: int) -> list[dict[str, int]]:
  """size, stride, pad, lhs_dilate and rhs_dilate of each spatial axis."""
  defaults = dict(size=1, stride=1, pad=0, lhs_dilate=1, rhs_dilate=1)
  dims = [dict(defaults) for _ in range(axes)]
  found = re.search(r"window=\{([^}]*)\}", attributes)
  for entry in found[1].split() if found else []:
    name, values = entry.split("=")
    for dim, value in zip(dims, values.split("x")):
      if name in dim:
        dim[name] = int(value.split("_")[0])
  return dims


def _places(inputs, outputs, size, stride, pad, lhs_dilate, rhs_dilate) -> int:
  """How many (output, window) pairs fall on an input."""
  place = (
    np.arange(outputs)[:, None] * stride
    + np.arange(size)[None, :] * rhs_dilate
    - pad
  )
  inside = (place >= 0) & (place <= (inputs - 1) * lhs_dilate)
  return int((inside & (place % lhs_dilate == 0)).sum())
