r"""Runs judged by a trained reward model, on any data: OneRec's Table 1.

  python -m launch.judge --workdir=runs/aligned --judge=p_score_s1 \
    --runs=sft_item,ecpo
  python -m launch.judge --workdir=runs/aligned --judge=session_reward_s3 \
    --runs=sft_0+sft_1+sft_2,ipa_0+ipa_1+ipa_2 --output=judged.json

The first run is what the others are compared with; `+` joins seeds of one
model. Let a reward model judge that the runs were not aligned on
(docs/rewards.md).
"""

import itertools

from absl import app
from absl import flags as absl_flags

from launch import flags
from onerec_jax import files, runs
from onerec_jax.evaluation import judged, preference

_JUDGE = absl_flags.DEFINE_string("judge", "", "The reward model's run.")
_RUNS = absl_flags.DEFINE_list("runs", [], "Runs; the first is the baseline.")
_SPLIT = absl_flags.DEFINE_enum(
  "split", "test", ["validation", "test"], "Which requests are asked."
)
_ANSWERS = absl_flags.DEFINE_integer(
  "answers", 16, "W: sessions of session models; of others items for P-Scores.",
  1,
)  # fmt: skip
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
  if not _JUDGE.value:
    raise app.UsageError("--judge is needed, as --judge=p_score")
  workdir = flags.workdir()
  judge = judged.load(workdir, _JUDGE.value, _SPLIT.value, _REQUESTS.value)
  for name in itertools.chain(*models):
    runs.say_if_stopped(workdir, name)
    if judged.was_made_from(workdir, name, _JUDGE.value):
      print(
        f"{name}: made of its judge {_JUDGE.value}, whose mistakes count as "
        "gains; let a reward model of another seed judge"
      )
  measure = lambda name: judged.of_run(judge, workdir, name, _ANSWERS.value)
  rows = preference.compare([[*map(measure, seeds)] for seeds in models])
  preference.print_table(rows, f"judged by {_JUDGE.value}, {_SPLIT.value}")
  if _OUTPUT.value:
    record = {
      "judge": _JUDGE.value, "split": _SPLIT.value, "answers": _ANSWERS.value,
      "requests": _REQUESTS.value, "rows": rows,
    }  # fmt: skip
    files.write_json(_OUTPUT.value, record)


if __name__ == "__main__":
  flags.run(main)
