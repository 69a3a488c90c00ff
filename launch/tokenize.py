r"""Makes the semantic IDs of a prepared work directory, or adds new items.

python -m launch.tokenize --workdir=runs/beauty \
  --config=experiments/beauty/lazy_decoder.py
python -m launch.tokenize --workdir=runs/beauty --new_items=new.csv

new.csv (or .tsv, .parquet) has the columns of the item table.
"""

import sys

import rich.console
from absl import flags as absl_flags

from launch import flags
from onerec_jax import semantic_ids
from onerec_jax.data import shards
from onerec_jax.tokenizer import extension, tokenize

_CONFIG = flags.define_config()
_NEW_ITEMS = absl_flags.DEFINE_string(
  "new_items", "", "Table of items to add; IDs that exist do not change."
)
_NEW_EMBEDDING = absl_flags.DEFINE_string(
  "new_embedding", "", "Their vectors, .npy, where tokenizer.vectors=embedding."
)
_KNOWN = absl_flags.DEFINE_string(
  "known", "", "Semantic IDs to add to; default: those fitted last."
)
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Reads <workdir>/prepared, writes <workdir>/semantic_ids."""
  flags.start()
  config = _CONFIG.value
  workdir = flags.workdir(config)
  if not _NEW_ITEMS.value:
    prepared = shards.PreparedData.open(workdir)
    tokenize.tokenize(config.tokenizer, prepared, workdir)
    return
  known = _KNOWN.value or extension.latest_fitted(workdir)
  items, skipped = extension.read(_NEW_ITEMS.value, config.prepare.on_bad_row)
  for reason, count in skipped.items():
    print(f"skipped {count} rows, {reason}", file=sys.stderr)
  ids = tokenize.extend(workdir, known, items, _NEW_EMBEDDING.value)
  folder = semantic_ids.find(workdir, ids.fingerprint)
  console = rich.console.Console()
  tokenize.print_new(extension.Extension.load(folder).items, ids, console)
  tokenize.print_report(ids.report, console)
  print(f"serve them: launch.recommend --new_items={ids.fingerprint}")


if __name__ == "__main__":
  flags.run(main)
