r"""An online A/B test in the simulated world.

  python -m launch.ab_test --workdir=runs/aligned --control=sft_session \
    --treatment=ipa_dpo --days=5 --output=runs/aligned/ab/ipa
  python -m launch.ab_test --workdir=... --control=cascade \
    --treatment=sft_item --days=5 --updates=50 --output=...

An arm is a run; `retrieval/ranker`; `cascade` (two_tower/p_score); or
`logging`, `oracle`, `uniform`. docs/ab_test.md says what is measured.
"""

import pathlib

from absl import app
from absl import flags as absl_flags

from launch import flags
from onerec_jax import online, runs

_CONTROL = absl_flags.DEFINE_string("control", "", "Arm to compare with.")
_TREATMENT = absl_flags.DEFINE_string("treatment", "", "Arm to judge.")
_DAYS = absl_flags.DEFINE_integer("days", 3, "Days of the test.", 1)
_FROM_DAY = absl_flags.DEFINE_integer(
  "from_day", 0, "First day; what was logged from there on counts as not "
  "happened. 0: after the log.", 0,
)  # fmt: skip
_UPDATES = absl_flags.DEFINE_integer(
  "updates", 0, "Steps each arm's models train on after each day; 0: frozen.", 0
)
_RATE = absl_flags.DEFINE_float(
  "learning_rate", 0.0, "Of these; 0: a tenth of the run's own.", 0.0
)
_SAMPLES = absl_flags.DEFINE_enum(
  "samples", "own", online.SAMPLES, "What an arm's models train on: the log "
  "and its own days; the log, asked about its own days; or the log and the "
  "days that the logging policy would have had.",
)  # fmt: skip
_OUTPUT = absl_flags.DEFINE_string("output", "", "Folder for the results.")
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  flags.start()
  if not (_CONTROL.value and _TREATMENT.value and _OUTPUT.value):
    raise app.UsageError("--control, --treatment and --output are needed")
  if _SAMPLES.value != "own" and not _UPDATES.value:
    raise app.UsageError(
      f"--samples={_SAMPLES.value} says what is trained on, and --updates=0 "
      "trains nothing: set both or none"
    )
  for name in f"{_CONTROL.value}/{_TREATMENT.value}".split("/"):
    runs.say_if_stopped(flags.workdir(), name)
  settings = online.Settings(
    _DAYS.value, _FROM_DAY.value, _UPDATES.value, _RATE.value,
    _SAMPLES.value, pathlib.Path(_OUTPUT.value),
  )  # fmt: skip
  online.ab_test(flags.workdir(), _CONTROL.value, _TREATMENT.value, settings)


if __name__ == "__main__":
  flags.run(main)
