"""Compiles training step or beam search for a TPU slice, without a TPU.

  python -m launch.compile_tpu --config=experiments/scaling/lazy_decoder.py:8B \
    --topology=v5p:4x4x4 [--program=search] [--output=report.json]

Prints what one chip needs, and bounds of time and MFU (docs/tpu.md).
"""

import dataclasses
import os

# Before jax starts: this host has no TPU, needs no metadata of one, and other
# processes may compile at the same time.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"

import rich  # noqa: E402
from absl import flags as absl_flags  # noqa: E402

from launch import flags  # noqa: E402
from onerec_jax import files  # noqa: E402
from onerec_jax.scaling import compile_tpu, roofline  # noqa: E402

_CONFIG = flags.define_config()
_TOPOLOGY = absl_flags.DEFINE_string(
  "topology", "v5p:4x4x4", "Chip and shape of the slice."
)
_PROGRAM = absl_flags.DEFINE_enum(
  "program", "train", ["train", "search"], "Which program."
)
_NUM_ITEMS = absl_flags.DEFINE_integer(
  "num_items", 1_000_000, "Items of the catalogue."
)
_REQUESTS = absl_flags.DEFINE_integer(
  "requests", 8, "Program `search`: answered at once by a chip."
)
_OUTPUT = absl_flags.DEFINE_string("output", "", "JSON file for the report.")
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  programs = compile_tpu.prepare(
    _CONFIG.value, _TOPOLOGY.value, _NUM_ITEMS.value
  )
  if _PROGRAM.value == "train":
    report = compile_tpu.train_step(programs)
  else:
    report = compile_tpu.search(programs, _REQUESTS.value)
  rich.print(roofline.table(report))
  if _OUTPUT.value:
    files.write_json(_OUTPUT.value, dataclasses.asdict(report))


if __name__ == "__main__":
  flags.run(main)
