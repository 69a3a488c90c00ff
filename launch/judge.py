r"""Runs judged by a trained reward model, on any data: OneRec's Table 1.

  python -m launch.judge --workdir=runs/aligned --judge=p_score_s1 \
    --runs=sft_item,ecpo
  python -m launch.judge --workdir=runs/aligned --judge=session_reward_s3 \
    --runs=sft_0+sft_1+sft_2,ipa_0+ipa_1+ipa_2 --output=judged.json

The first run is what the others are compared with; `+` joins seeds of one
model. Let a reward model judge that the runs were not aligned on
(docs/rewards.md).
"""

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
  "answers", 16, "W: sessions of session models; of others items, by a P-Score."
)
_REQUESTS = absl_flags.DEFINE_integer("requests", 0, "At most so many; 0: all.")
_OUTPUT = absl_flags.DEFINE_string("output", "", "JSON to write.")
absl_flags.adopt_module_key_flags(flags)


@flags.program
def main() -> None:
  """Entry point."""
  flags.start()
  if not (_RUNS.value and _JUDGE.value):
    raise app.UsageError(
      "--judge and --runs are needed, as --judge=p_score --runs=sft,ecpo"
    )
  workdir = flags.workdir()
  judge = judged.load(workdir, _JUDGE.value, _SPLIT.value, _REQUESTS.value)
  for name in "+".join(_RUNS.value).split("+"):
    runs.say_if_stopped(workdir, name)
    if judged.was_aligned_on(workdir, name, _JUDGE.value):
      print(
        f"{name}: aligned on its judge {_JUDGE.value}, whose mistakes count as "
        "gains; let a reward model of another seed judge"
      )
  measure = lambda name: judged.of_run(judge, workdir, name, _ANSWERS.value)
  rows = preference.compare(
    [[*map(measure, run.split("+"))] for run in _RUNS.value]
  )
  preference.print_table(rows, f"judged by {_JUDGE.value}, {_SPLIT.value}")
  if _OUTPUT.value:
    record = {"judge": _JUDGE.value, "split": _SPLIT.value, "rows": rows}
    files.write_json(_OUTPUT.value, record)


if __name__ == "__main__":
  flags.run(main)
