r"""Prints the arithmetic of the papers' tables, ours beside theirs.

  python -m launch.paper_tables
  python -m launch.paper_tables --output=results/raw/paper_tables.json

`ours` follows the convention printed under a table, `counted` is what our own
models' counters say of the same sizes.
"""

import dataclasses

import rich
import rich.box
import rich.table
from absl import flags as absl_flags

from launch import flags
from onerec_jax import files
from onerec_jax.scaling import paper_tables

_OUTPUT = absl_flags.DEFINE_string("output", "", "JSON to write.")
absl_flags.adopt_module_key_flags(flags)


def _show(table: paper_tables.Table) -> None:
  shown = rich.table.Table(
    title=table.title, caption=table.convention, box=rich.box.SIMPLE_HEAD
  )
  for name in ("", "", "paper", "ours", "error", "counted"):
    shown.add_column(name, justify="right" if name else "left")
  number = lambda x: "–" if x is None else f"{x:.4g}"
  notes = []
  for row in table.rows:
    error = "–" if row.error is None else f"{row.error:+.1%}"
    if row.note:
      notes.append(f"{row.label}, {row.quantity}: {row.note}")
      error = f"[bold]{error}[/bold]"
    values = (row.paper, row.ours, row.counted)
    paper, ours, counted = (number(value) for value in values)
    shown.add_row(row.label, row.quantity, paper, ours, error, counted)
  rich.print(shown)
  for note in notes:
    rich.print(f"  {note}")


@flags.program
def main() -> None:
  """Entry point."""
  tables = paper_tables.all_tables()
  for table in tables:
    _show(table)
  if _OUTPUT.value:
    files.write_json(_OUTPUT.value, [dataclasses.asdict(t) for t in tables])


if __name__ == "__main__":
  flags.run(main)
