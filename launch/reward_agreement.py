r"""Whether reward models tell one request's answers apart as the truth does.

  python -m launch.reward_agreement --workdir=runs/aligned --runs=sft_session \
    --judges=session_reward,p_score
  python -m launch.reward_agreement --workdir=runs/aligned \
    --runs=sft_session+sft_session_s1 \
    --judges=session_reward+session_reward_s1,p_score+p_score_s1 --output=r.json

On the simulated world. `+` joins seeds: the first seed of each judge judges the
first seed of the run, and so on.
"""

import dataclasses

import rich
from absl import app
from absl import flags as absl_flags

from launch import flags
from onerec_jax import files, runs
from onerec_jax.evaluation import agreement, judged

_RUNS = absl_flags.DEFINE_list("runs", [], "One session model, or its seeds.")
_JUDGES = absl_flags.DEFINE_list("judges", [], "Reward models.")
_SPLIT = absl_flags.DEFINE_enum(
  "split", "validation", ["validation", "test"], "Which requests are asked."
)
_SESSIONS = absl_flags.DEFINE_integer("sessions", 32, "W, answers to each.", 2)
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
  judges = flags.seeds("judges", _JUDGES.value)
  if len(models) > 1 or any(len(of) != len(models[0]) for of in judges):
    raise app.UsageError(
      "--runs names one model, and each of --judges has as many seeds as it"
    )
  for name, of in zip(models[0], zip(*judges)):
    runs.say_if_stopped(flags.workdir(), name)
    for judge in of:
      if judged.was_made_from(flags.workdir(), name, judge):
        print(
          f"{name}: made of {judge}, whose mistakes chose its answers; name "
          "what it started from"
        )
  asked = _SPLIT.value, _SESSIONS.value, _REQUESTS.value
  each = [
    agreement.of_run(flags.workdir(), name, of, *asked)
    for name, of in zip(models[0], zip(*judges))
  ]
  found = {
    of[0]: [seed[judge] for seed, judge in zip(each, of)] for of in judges
  }
  rich.print(agreement.table(found))
  if _OUTPUT.value:
    record = {
      "split": _SPLIT.value, "sessions": _SESSIONS.value,
      "requests": _REQUESTS.value, "runs": models[0],
      "judges": {
        judge: [
          {head: dataclasses.asdict(value) for head, value in seed.items()}
          for seed in seeds
        ]
        for judge, seeds in found.items()
      },
    }  # fmt: skip
    files.write_json(_OUTPUT.value, record)


if __name__ == "__main__":
  flags.run(main)
