r"""Trains the runs of a sweep here, or writes what a cluster needs for it.

Runs with an `alignment.start` are aligned (launch.align), others trained.

python -m launch.sweep --sweep=experiments/scaling/ladder.py:smoke \
  --workdir=runs/ladder [--run_locally] [--only=d24] [--points=points.json]
python -m launch.sweep ... --index=3 [--distributed]
python -m launch.sweep ... --write=slurm --output=scripts

Without an action it prints what is done. See docs/sweeps.md.
"""

import sys

from absl import flags as absl_flags

from launch import cluster, flags
from onerec_jax import files, workflow, workflow_align
from onerec_jax.scaling import collect
from onerec_jax.scaling import sweep as sweeps

_SWEEP = absl_flags.DEFINE_string("sweep", None, "<file>:<argument>.")
absl_flags.mark_flag_as_required("sweep")
_LOCALLY = absl_flags.DEFINE_bool("run_locally", False, "Train, one by one.")
_ONLY = absl_flags.DEFINE_string("only", "", "Regular expression of run names.")
_INDEX = absl_flags.DEFINE_integer("index", None, "Train this run alone.")
_WRITE = absl_flags.DEFINE_enum("write", None, cluster.KINDS, "Kind of script.")
_POINTS = absl_flags.DEFINE_string("points", "", "JSON of finished runs.")
_DISTRIBUTED = flags.define_distributed()
cluster.define_flags()
absl_flags.adopt_module_key_flags(flags)
absl_flags.adopt_module_key_flags(cluster)


@flags.program
def main() -> None:
  """Entry point."""
  sweep = sweeps.expand(_SWEEP.value)
  workdir = flags.workdir(sweep.configs[0])
  if _INDEX.value is not None:
    flags.start(_DISTRIBUTED.value)
    config = sweep.config(_INDEX.value)
    make = workflow_align.align if config.alignment.start else workflow.train
    make(config, workdir)
    return
  program = ["-m", "launch.sweep", f"--sweep={sweep.spec}"]
  program.append(f"--workdir={workdir}")
  manifest = sweeps.survey(sweep, workdir, [sys.executable, *program])
  chosen = sweep.select(_ONLY.value)
  if _WRITE.value:
    jobs, program = manifest.pending(chosen), ["python", *program]
    print(cluster.write(_WRITE.value, sweep.name, jobs, program))
  elif _LOCALLY.value:
    sweeps.run_locally(manifest, workdir, chosen)
  else:
    manifest.save()
    print(*(f"{i} {manifest.entries[i]}" for i in chosen), sep="\n")
  if _POINTS.value:
    files.write_json(_POINTS.value, collect.points(sweep, workdir))


if __name__ == "__main__":
  flags.run(main)
