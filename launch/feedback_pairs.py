r"""How often runs prefer what users liked to what they disliked.

  python -m launch.feedback_pairs --workdir=runs/kuairand \
    --runs=sft,aligned --output=pairs.json

All pairs of a liked and a disliked later event of a user. Generators are judged
by an item's probability, reward models by its reward. The first is what the
others are compared with; `+` joins seeds of one model; `popularity` is the
baseline, how often training names an item.
"""

import itertools

import rich
from absl import app
from absl import flags as absl_flags

from launch import flags
from onerec_jax import config as config_lib
from onerec_jax import files, partitioning, workflow
from onerec_jax.data import splits
from onerec_jax.evaluation import feedback_pairs
from onerec_jax.inference import assemble

_POPULARITY = workflow.POPULARITY
_RUNS = absl_flags.DEFINE_list(
  "runs", [], "Runs; the first is what the others are compared with."
)
_SPLIT = absl_flags.DEFINE_enum(
  "split", "test", ["validation", "test"], "Which events are judged."
)
_GOOD = absl_flags.DEFINE_string("good", "like", "Flag of liked events.")
_BAD = absl_flags.DEFINE_string("bad", "dislike", "Flag of disliked events.")
_OUTPUT = absl_flags.DEFINE_string("output", "", "JSON to write.")
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  flags.start()
  models = flags.seeds("runs", _RUNS.value)
  names = [*dict.fromkeys(itertools.chain(*models))]
  if names == [_POPULARITY] or any(
    len(seeds) > 1 and _POPULARITY in seeds for seeds in models
  ):
    raise app.UsageError("popularity is no run: name it by itself, beside runs")
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  asked, each = [], {}
  # Last: it counts in the data of the runs.
  for name in sorted(names, key=lambda name: name == _POPULARITY):
    if name == _POPULARITY:
      each[name] = feedback_pairs.popularity(system, asked)
      continue
    system, params = assemble.load(flags.workdir(), name, mesh)
    asked = asked or feedback_pairs.judged(
      system.prepared, splits.HELD_OUT[_SPLIT.value], _GOOD.value, _BAD.value
    )
    each[name] = feedback_pairs.scores(system, params, asked, mesh)
  rows = feedback_pairs.compare(
    asked,
    {"+".join(seeds): [each[seed] for seed in seeds] for seeds in models},
  )
  rich.print(feedback_pairs.table(rows))
  if _OUTPUT.value:
    files.write_json(_OUTPUT.value, {"split": _SPLIT.value, "runs": rows})


if __name__ == "__main__":
  flags.run(main)
