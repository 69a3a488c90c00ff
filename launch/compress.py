r"""Compresses lifelong histories: a step of data preparation.

python -m launch.compress --workdir=runs/simulator \
  --config=experiments/simulator/pathways.py:all

Prepares and tokenizes first, where that is not done. Unchanged inputs are
skipped; a run cut off goes on after the last shard it finished. Training with
pipeline.pathways.lifelong above 0 does this step by itself.
"""

import rich.console
import rich.table
from absl import flags as absl_flags

from launch import flags
from onerec_jax import workflow

_CONFIG = flags.define_config()
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Writes <workdir>/lifelong, prints counts and throughput."""
  flags.start()
  config = _CONFIG.value
  if config.pipeline.pathways.lifelong < 1:
    raise ValueError(
      "pipeline.pathways.lifelong=0 reads no lifelong histories; set, say, "
      "--config.pipeline.pathways.lifelong=2000"
    )
  system = workflow.assembled(config, flags.workdir(config))
  manifest = system.prepared.snapshots.manifest
  table = rich.table.Table("", "", show_header=False)
  for name in (
    "fingerprint",
    "users",
    "events",
    "snapshots",
    "clustered_events",
    "representatives",
    "seconds",
    "events_per_second",
  ):
    value = manifest[name]
    shown = value if isinstance(value, str) else f"{value:,}"
    table.add_row(name.replace("_", " "), shown)
  rich.console.Console().print(table)


if __name__ == "__main__":
  flags.run(main)
