r"""What the sessions of runs are worth to the users of the simulated world.

  python -m launch.true_preference --workdir=runs/aligned --runs=sft,dpo,ipa
  python -m launch.true_preference --workdir=runs/aligned \
    --runs=sft_0+sft_1+sft_2,ipa_0+ipa_1+ipa_2 --output=results/raw/ipa.json

The first is what the others are compared with; `+` joins seeds of one model.
"""

import itertools

from absl import flags as absl_flags

from launch import flags
from onerec_jax import files, runs
from onerec_jax.evaluation import preference

_RUNS = absl_flags.DEFINE_list("runs", [], "Runs; the first is the baseline.")
_SPLIT = absl_flags.DEFINE_enum(
  "split", "test", ["validation", "test"], "Which requests are asked."
)
_SESSIONS = absl_flags.DEFINE_integer("sessions", 16, "W of session models.", 1)
_REQUESTS = absl_flags.DEFINE_integer(
  "requests", 0, "At most so many; 0: all.", 0
)
_OUTPUT = absl_flags.DEFINE_string("output", "", "JSON to write.")
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  flags.start()
  models = flags.seeds("runs", _RUNS.value)
  for name in itertools.chain(*models):
    runs.say_if_stopped(flags.workdir(), name)
  asked = _SPLIT.value, _SESSIONS.value, _REQUESTS.value
  measure = lambda name: preference.of_run(flags.workdir(), name, *asked)
  rows = preference.compare([[*map(measure, seeds)] for seeds in models])
  preference.print_table(rows, f"true preference, {_SPLIT.value}")
  if _OUTPUT.value:
    files.write_json(_OUTPUT.value, {"split": _SPLIT.value, "rows": rows})


if __name__ == "__main__":
  flags.run(main)
