r"""Bounds of every size on three TPU slices, without a TPU (docs/tpu.md).

  python -m benchmarks.tpu_table --output=results/raw/tpu.json

Compiles the training step of each size for each slice in the ways that may be
best there, one `launch.compile_tpu` a way, and prints the best of each as
Markdown. What the file has already is not compiled again. One way takes 1 to
2 minutes on two cores, all of them about an hour and a half.
"""

import dataclasses
import json
import pathlib
import subprocess
import sys
import tempfile

from absl import app, flags

from onerec_jax import files
from onerec_jax.scaling import sizes

_OUTPUT = flags.DEFINE_string("output", "tpu.json", "JSON to write or go on.")
_SIZES = flags.DEFINE_list(
  "sizes", ["1B", "8B", "0.5B", "4B", "2B", "0.1B", "0.2B", "0.05B"], "Which."
)
_TOPOLOGIES = {"v5p:4x4x4": 64, "v6e:16x16": 256, "v5e:16x16": 256}
"""Slice → chips."""
_POLICY = {"v5p:4x4x4": "dots", "v6e:16x16": "full", "v5e:16x16": "full"}
_BOTH = ("0.5B", "1B", "8B")
_WHOLE_STATE = 0.6
"""Billions of parameters that a chip holds the whole state of."""


@dataclasses.dataclass(frozen=True)
class Way:
  """How a size is laid over a slice.

  Attributes:
    fsdp: devices that share the state.
    contexts: of one chip.
    kv_heads: key/value heads.
    remat: what is kept for the backward pass.
  """

  fsdp: int
  contexts: int
  kv_heads: int
  remat: str


def ways(size: str, topology: str) -> list[Way]:
  """What is worth trying: few key/value heads, and how much is recomputed.

  V2's Table 4 finds the loss unchanged by fewer key/value heads. Where the
  sizes of `_BOTH` are best recomputed wholly, the others are too: it is the
  chip's FLOPs a byte that decide.
  """
  heads = sizes.SIZES[size].num_heads
  few = max(n for n in (1, 2, 4) if heads % n == 0)
  fsdp = 1
  if float(size.removesuffix("B")) > _WHOLE_STATE:
    fsdp = 32 if topology.startswith("v5p") else 64
  policies = [_POLICY[topology]]
  if size in _BOTH:
    policies = ["full", "dots"]
  found = [Way(fsdp, 256, few, remat) for remat in policies]
  if size in ("1B", "8B"):
    found.append(Way(fsdp, 128, heads, policies[0]))
  return found


def compiled(size: str, topology: str, way: Way) -> dict:
  """The report of one compilation, or why there is none."""
  with tempfile.TemporaryDirectory() as directory:
    output = pathlib.Path(directory) / "report.json"
    run = subprocess.run(
      [
        sys.executable, "-m", "launch.compile_tpu",
        f"--config=experiments/scaling/lazy_decoder.py:{size}",
        f"--topology={topology}", f"--output={output}",
        f"--config.mesh.fsdp={way.fsdp}",
        f"--config.pipeline.batch_size={way.contexts * _TOPOLOGIES[topology]}",
        f"--config.model.num_kv_heads={way.kv_heads}",
        f"--config.model.remat={way.remat}",
      ],
      capture_output=True,
      text=True,
    )  # fmt: skip
    if run.returncode:
      return {"refused": run.stderr.strip().splitlines()[-1][:300]}
    return json.loads(output.read_text())


def line(size: str, topology: str, way: dict, report: dict) -> str:
  """A row of the table."""
  place = f"| {size}, {topology} | {way['fsdp']} | {way['contexts']} | "
  place += f"{way['kv_heads']} | {way['remat']} | "
  if "refused" in report:
    return place + "does not fit |"
  peak = report["model_flops"] / report["peak_flops"]
  times = [
    report[f"{n}_seconds"] for n in ("compute", "memory", "interconnect")
  ]
  memory = (report["arguments"] + report["temporaries"]) / 1e9
  shown = [f"{memory:.1f}", *(f"{1e3 * t:.0f}" for t in times)]
  shown += [f"{100 * peak / t:.1f}" for t in (max(times), sum(times))]
  return place + " | ".join(shown) + " |"


def main(argv: list[str]) -> None:
  """Entry point."""
  del argv
  path = pathlib.Path(_OUTPUT.value)
  rows = json.loads(path.read_text()) if path.exists() else []
  done = [(r["size"], r["topology"], r["way"]) for r in rows]
  for size in _SIZES.value:
    for topology in _TOPOLOGIES:
      for way in ways(size, topology):
        asked = size, topology, dataclasses.asdict(way)
        if asked in done:
          continue
        report = compiled(size, topology, way)
        rows.append(
          dict(zip(("size", "topology", "way"), asked), report=report)
        )
        files.write_json(path, rows)
        print(line(*asked, report), flush=True)
  print("\n".join(line(*r.values()) for r in rows))


if __name__ == "__main__":
  app.run(main)
