r"""Bounds of every size on three TPU slices, without a TPU (docs/tpu.md).

  python -m benchmarks.tpu_table --output=results/raw/tpu.json

Compiles the training step of each size for each slice, one `launch.compile_tpu`
a way: first with all and with few products recomputed, then the better of these
on other meshes. Prints the best way of each and all of them as Markdown. What
the file has already is not compiled again; `--sizes=` compiles nothing and
prints. One way takes 1 to 2 minutes on two cores, of `MoE-4B` 4 to 11, all of
them four hours.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile
from typing import Any

from absl import app, flags

from experiments.scaling import lazy_decoder
from onerec_jax import files
from onerec_jax.scaling import sizes

_OUTPUT = flags.DEFINE_string("output", "tpu.json", "JSON to write or go on.")
_SIZES = flags.DEFINE_list(
  "sizes",
  ["1B", "8B", "0.5B", sizes.EXPERTS, "4B", "2B", "0.1B", "0.2B", "0.05B"],
  "Which.",
)
_TOPOLOGIES = {"v5p:4x4x4": 64, "v6e:16x16": 256, "v5e:16x16": 256}
"""Slice → chips."""
_AS_IT_STANDS = {
  "v5p:4x4x4": ("1B", "8B", sizes.EXPERTS),
  "v6e:16x16": ("1B", "8B"),
}
"""Slice → sizes whose config is compiled as it stands, too."""
_WHOLE_STATE = 0.6
"""Billions of parameters that a chip holds the whole state of."""
_SHARED = 16
"""Chips that share it instead, to compare."""
_ALL_HEADS = ("1B", "8B")
"""Sizes that are tried with all their key/value heads, and on a mesh with
`tensor` 2, too."""
_EXPERTS_CONTEXTS = 1024
"""Of a chip, where a token meets few of the experts whose weights are read."""
_REFUSED = ("does not fit", "does not divide")
"""What `launch.compile_tpu` says of a way that is none."""
_HEADER = """\
| size, slice | mesh | contexts | key/value heads | remat | memory | compute \
| HBM | links | MFU, overlap | none |
|---|---|---|---|---|---|---|---|---|---|---|"""


@dataclasses.dataclass(frozen=True)
class Way:
  """How a size is laid over a slice.

  Attributes:
    fsdp: devices that share the state.
    contexts: of one chip.
    kv_heads: key/value heads.
    remat: what is kept for the backward pass.
    tensor: devices that share each matrix product.
  """

  fsdp: int
  contexts: int
  kv_heads: int
  remat: str
  tensor: int = 1


def policies(size: str, topology: str) -> list[Way]:
  """What is tried first: how much is recomputed, with few key/value heads (V2's
  Table 4 finds the loss unchanged by them), and the config as it stands.
  """
  heads = sizes.lazy_decoder(size).num_heads
  few = max(n for n in (1, 2, 4) if heads % n == 0)
  fsdp = 32 if topology.startswith("v5p") else 64
  if size == sizes.EXPERTS:
    contexts = _EXPERTS_CONTEXTS
  else:
    contexts = 256
    if float(size.removesuffix("B")) <= _WHOLE_STATE:
      fsdp = 1
  found = [Way(fsdp, contexts, few, remat) for remat in ("full", "dots")]
  if size == sizes.EXPERTS and topology.startswith("v5e"):
    del found[1]  # The first fills four fifths of such a chip.
  if size in _ALL_HEADS:
    found.append(Way(fsdp, 128, heads, "full"))
  if size in _AS_IT_STANDS.get(topology, ()):
    found.append(_as_it_stands(size, topology))
  return found


def meshes(size: str, topology: str, best: Way) -> list[Way]:
  """What is tried next: the best of `policies` with its state on other numbers
  of chips, up to all, and with two chips at each matrix product.
  """
  if size == sizes.EXPERTS and not topology.startswith("v5p"):
    return []  # Half an hour of compiling.
  if best.fsdp == 1:
    return [dataclasses.replace(best, fsdp=_SHARED)]
  found = [
    dataclasses.replace(best, fsdp=fsdp)
    for fsdp in (best.fsdp // 4, _TOPOLOGIES[topology])
  ]
  if size in _ALL_HEADS:
    found.append(dataclasses.replace(best, fsdp=best.fsdp // 2, tensor=2))
  return found


def _as_it_stands(size: str, topology: str) -> Way:
  config = lazy_decoder.get_config(size)
  return Way(
    config.mesh.fsdp,
    config.pipeline.batch_size // _TOPOLOGIES[topology],
    config.model.num_kv_heads,
    config.model.remat,
  )


def compiled(size: str, topology: str, way: Way) -> dict[str, Any]:
  """The report of one compilation, or why there is none.

  Raises:
    RuntimeError: it failed in another way.
  """
  with tempfile.TemporaryDirectory() as directory:
    output = pathlib.Path(directory) / "report.json"
    run = subprocess.run(
      [
        sys.executable, "-m", "launch.compile_tpu",
        f"--config=experiments/scaling/lazy_decoder.py:{size}",
        f"--topology={topology}", f"--output={output}",
        f"--config.mesh.fsdp={way.fsdp}",
        f"--config.mesh.tensor={way.tensor}",
        f"--config.pipeline.batch_size={way.contexts * _TOPOLOGIES[topology]}",
        f"--config.model.num_kv_heads={way.kv_heads}",
        f"--config.model.remat={way.remat}",
      ],
      capture_output=True,
      text=True,
    )  # fmt: skip
    if not run.returncode:
      return json.loads(output.read_text())
    why = (run.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
    if not any(reason in why for reason in _REFUSED):
      raise RuntimeError(f"{size} on {topology}, {way}: {run.stderr[-2000:]}")
    return {"refused": why[:300]}


def refusal(report: dict[str, Any]) -> str:
  """Why a way is none; empty: it is one."""
  if "refused" in report:
    return next(why for why in _REFUSED if why in report["refused"])
  # The compiler looks at temporaries alone.
  memory = report["arguments"] + report["temporaries"]
  return "" if memory <= report["capacity"] else "does not fit"


def mfu(report: dict[str, Any]) -> tuple[float, float]:
  """(all overlap, none does), in %; of what is refused (0, 0)."""
  if refusal(report):
    return 0.0, 0.0
  peak = report["model_flops"] / report["peak_flops"]
  times = _times(report)
  return 100 * peak / max(times), 100 * peak / sum(times)


def _times(report: dict[str, Any]) -> list[float]:
  return [report[f"{n}_seconds"] for n in ("compute", "memory", "interconnect")]


def line(row: dict[str, Any]) -> str:
  """A row of the table."""
  size, topology, way, report = row.values()
  shared = way["fsdp"] * way["tensor"]
  mesh = f"data {_TOPOLOGIES[topology] // shared}, fsdp {way['fsdp']}"
  if way["tensor"] > 1:
    mesh += f", tensor {way['tensor']}"
  cells = [f"{size}, {topology}", mesh, way["contexts"], way["kv_heads"]]
  cells.append(way["remat"])
  if why := refusal(report):
    return f"| {' | '.join(map(str, cells))} | {why} | | | | | |"
  memory = (report["arguments"] + report["temporaries"]) / 1e9
  overlap, none = mfu(report)
  cells += [f"{memory:.1f}", *(f"{1e3 * t:.0f}" for t in _times(report))]
  cells += [f"{overlap:.1f}", f"{none:.1f}"]
  return f"| {' | '.join(map(str, cells))} |"


def table(rows: list[dict[str, Any]]) -> str:
  """Rows as Markdown, by size and slice."""
  order = [*sizes.SIZES, sizes.EXPERTS]
  rows = sorted(rows, key=lambda r: (order.index(r["size"]), r["topology"]))
  return "\n".join([_HEADER, *map(line, rows)])


def best(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  """Of each size and slice the row with the highest bound; of equal ones that
  which loses least where nothing overlaps.
  """

  def worth(row):
    overlap, none = mfu(row["report"])
    return round(overlap, 1), none

  found: dict[tuple[str, str], dict[str, Any]] = {}
  for row in sorted(rows, key=worth):
    found[row["size"], row["topology"]] = row
  return list(found.values())


def fill(rows: list[dict[str, Any]], size: str, topology: str) -> None:
  """Compiles what `rows` lack of a size on a slice; each is written at once."""

  def measure(way: Way) -> float:
    asked = {"size": size, "topology": topology, "way": dataclasses.asdict(way)}
    for row in rows:
      if asked.items() <= row.items():
        return mfu(row["report"])[0]
    rows.append(asked | {"report": compiled(size, topology, way)})
    files.write_json(pathlib.Path(_OUTPUT.value), rows)
    print(line(rows[-1]), flush=True)
    return mfu(rows[-1]["report"])[0]

  first = policies(size, topology)
  for way in meshes(size, topology, max(first, key=measure)):
    measure(way)


def main(argv: list[str]) -> None:
  """Entry point."""
  del argv
  path = pathlib.Path(_OUTPUT.value)
  rows = json.loads(path.read_text()) if path.exists() else []
  for size in _SIZES.value:
    for topology in _TOPOLOGIES:
      fill(rows, size, topology)
  print(table(best(rows)), "", "All ways:", "", table(rows), sep="\n")


if __name__ == "__main__":
  app.run(main)
