r"""Prepares data: raw files → per-user records in <workdir>/prepared.

  python -m launch.prepare --workdir=runs/ml \
    --config.prepare.dataset=movielens_100k
  python -m launch.prepare --workdir=runs/mine \
    --config.prepare.events=events.csv --config.prepare.items=items.csv

Fields of --config.prepare stand in onerec_jax/config.py (PrepareConfig). A
second run with unchanged files and fields does nothing.
"""

import rich.markup
import rich.table
from absl import flags as absl_flags
from rich import console as rich_console

from launch import flags
from onerec_jax.data import prepare, shards

_CONFIG = flags.define_config()
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Prepares, then prints counts."""
  config = _CONFIG.value
  directory = prepare.prepare(config.prepare, flags.workdir(config))
  manifest = shards.read_manifest(directory)
  table = rich.table.Table("", "", title=str(directory), show_header=False)
  for name in ("users", "items", "events"):
    table.add_row(name, f"{manifest[f'num_{name}']:,}")
  for group in ("split_events", "dropped_events", "skipped_rows"):
    for name, count in manifest[group].items():
      table.add_row(f"{group.replace('_', ' ')}: {name}", f"{count:,}")
  if manifest["split"] == "leave_one_out" and manifest["short_users"]:
    table.add_row("users too short to test", f"{manifest['short_users']:,}")
  for note in manifest["notes"]:
    table.add_row("note", rich.markup.escape(note))
  rich_console.Console().print(table)


if __name__ == "__main__":
  flags.run(main)
