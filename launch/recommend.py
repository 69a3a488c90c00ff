r"""Recommends with a trained run.

  python -m launch.recommend --workdir=runs/movielens_100k --user=42 -k 5
  python -m launch.recommend --workdir=... --history=id1,id2
  python -m launch.recommend --workdir=... --users_file=users.parquet \
    --output=recommendations.parquet

The file, Parquet or CSV, has user_id and in Parquet perhaps history (lists of
item ids); the output, either too, has user_id, rank, item_id, score, title.
--new_items=<semantic IDs> also knows items that launch.tokenize added.
An unknown user without a history ends the program, or with --on_unknown=skip
gets a newcomer's answer. Ids with commas or quotes in --history: quote as in
CSV, --history='"a,1",b'.
--ranker=p_score, a reward model's run, ranks the --beam_width items that the
run finds, and scores are then its values (docs/rewards.md).
"""

import sys
import warnings

import rich
from absl import app
from absl import flags as absl_flags

from launch import flags
from onerec_jax.inference import recommendation_tables as tables
from onerec_jax.inference.recommender import Recommender, Request
from onerec_jax.tokenizer import new_items

_MODEL = absl_flags.DEFINE_string("model", "", "Run under <workdir>/models.")
_USER = absl_flags.DEFINE_string("user", None, "Raw user id.")
_HISTORY = absl_flags.DEFINE_list(
  "history",
  None,
  "Raw item ids, oldest first; default: the user's events. Read as a row of "
  "CSV: an id with a comma or quotes stands in double quotes.",
)
_USERS_FILE = absl_flags.DEFINE_string(
  "users_file", "", "Parquet or CSV of users."
)
_OUTPUT = absl_flags.DEFINE_string("output", "", ".parquet or .csv to write.")
_K = absl_flags.DEFINE_integer("k", 10, "Items a user.", short_name="k")
_BEAM_WIDTH = absl_flags.DEFINE_integer("beam_width", None, "Default: as run.")
_RANKER = absl_flags.DEFINE_string(
  "ranker", "", "Run of a reward model that ranks the --beam_width items found."
)
_FILTER_SEEN = absl_flags.DEFINE_bool("filter_seen", True, "Only new items.")
_ON_UNKNOWN = absl_flags.DEFINE_enum(
  "on_unknown",
  "error",
  ["error", "skip"],
  "Ids the data does not have; skip: items are left out, and a user without a "
  "history gets a newcomer's answer.",
)
_NEW_ITEMS = absl_flags.DEFINE_string(
  "new_items", "", "Semantic IDs by launch.tokenize --new_items to serve, too."
)
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  one = _USER.value is not None or _HISTORY.value is not None
  if one == bool(_USERS_FILE.value) or one == bool(_OUTPUT.value):
    raise app.UsageError(
      "give --user or --history (or both), or --users_file with --output"
    )
  if _NEW_ITEMS.value and _RANKER.value:
    raise app.UsageError(
      "--ranker was trained without the items of --new_items and cannot rank "
      "them; leave one of the two out"
    )
  flags.start()
  requests = [Request(_HISTORY.value, _USER.value)]
  if not one:
    tables.check_output(_OUTPUT.value)
    users, requests = tables.read_requests(_USERS_FILE.value)
  named = flags.workdir(), _MODEL.value
  if _NEW_ITEMS.value:
    recommender = new_items.recommender(*named, _NEW_ITEMS.value)
  else:
    recommender = Recommender.load(*named, ranker=_RANKER.value)
  with warnings.catch_warnings():
    warnings.showwarning = _print_warning
    items, scores = recommender.recommend(
      requests, _K.value, _BEAM_WIDTH.value, _FILTER_SEEN.value,
      _ON_UNKNOWN.value, progress=not one,
    )  # fmt: skip
  if one:
    rich.print(tables.as_table(recommender, requests[0], items[0], scores[0]))
  else:
    tables.write(_OUTPUT.value, recommender, users, items, scores)


def _print_warning(message: Warning | str, *_: object) -> None:
  """One line: of whose source it is says nothing to who runs a program."""
  print(f"warning: {message}", file=sys.stderr)


if __name__ == "__main__":
  flags.run(main)
