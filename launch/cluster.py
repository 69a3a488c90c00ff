"""Writes what a cluster needs to train a sweep's runs (launch.sweep --write).

One file a kind: a SLURM array, a Kubernetes JobSet a run (GKE), an `xpk
workload create` a run, or a script that walks through the runs on a Cloud TPU
VM. Each run is `python -m launch.sweep --index=N --distributed`: it goes on
where it was, ends at once where it is done, and ends with status 75 when it
was preempted and wants to be started again.
"""

import json
import math
import pathlib
import re
import shlex
import string
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from absl import flags

from onerec_jax import files

_STRING, _INTEGER = flags.DEFINE_string, flags.DEFINE_integer
_FLAGS = (
  (_STRING, "output", ".", "Directory to write to."),
  (
    _STRING,
    "setup",
    None,
    "Shell that goes to the code and its Python. Default: slurm `source "
    ".venv/bin/activate`, tpu_vm the same after `cd onerec_jax`, xpk and gke "
    "`cd /onerec_jax`.",
  ),
  (_INTEGER, "nodes", 1, "slurm: nodes of a run."),
  (_INTEGER, "gpus_per_node", 0, "slurm: one process each; 0: CPUs."),
  (_STRING, "time_limit", "24:00:00", "slurm: of one start of a run."),
  (_INTEGER, "simultaneous", 8, "slurm: runs at one time."),
  (
    flags.DEFINE_list,
    "sbatch",
    [],
    "slurm: more options, as --partition=gpu,--account=me.",
  ),
  (_STRING, "project", None, "tpu_vm, xpk: Google Cloud project."),
  (_STRING, "zone", None, "tpu_vm, xpk: its zone."),
  (_STRING, "tpu_name", None, "tpu_vm: of a TPU VM that is there."),
  (_STRING, "cluster", None, "xpk: of a cluster that is there."),
  (_STRING, "tpu_type", None, "xpk: as v5p-128."),
  (_INTEGER, "num_slices", 1, "xpk, gke: slices of a run."),
  (_STRING, "image", None, "xpk, gke: container image with the code."),
  (_INTEGER, "max_restarts", 10, "xpk, gke: after failures of a run."),
  (_STRING, "tpu_accelerator", None, "gke: node label, as tpu-v5p-slice."),
  (_STRING, "tpu_topology", None, "gke: node label, as 4x4x4."),
  (_INTEGER, "chips_per_host", 4, "gke: of the machine type."),
  (
    _STRING,
    "volume_claim",
    None,
    "gke: claim of a volume that all hosts can write to.",
  ),
  (_STRING, "mount_path", "/shared", "gke: where it is mounted."),
)

_NAME_LIMIT = 40
"""Of xpk; a JobSet's pods add up to 16 letters and have 63."""


Jobs = Mapping[int, str]
"""Index of a run in its sweep → its name."""


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines --output and what describes a cluster."""
  for define, name, default, meaning in _FLAGS:
    define(name, default, meaning, flag_values=values)


_SLURM = string.Template("""\
#!/bin/bash
# sbatch $file
#SBATCH --job-name=$sweep
#SBATCH --array=$array%$simultaneous
#SBATCH --nodes=$nodes
$resources
#SBATCH --time=$time_limit
#SBATCH --output=%x_%a.log
#SBATCH --open-mode=append
#SBATCH --requeue
# Before the time is up; the run then saves its state and ends with status 75.
#SBATCH --signal=TERM@120
$setup || exit 1
srun $command --index="$$SLURM_ARRAY_TASK_ID"
status=$$?
if [ "$$status" -eq 75 ]; then
  scontrol requeue "$${SLURM_ARRAY_JOB_ID}_$${SLURM_ARRAY_TASK_ID}"
fi
exit "$$status"
""")

_TPU_VM = string.Template("""\
#!/bin/bash
# bash $file
# When the TPU itself was taken away: make it anew, then run this again.
failed=()
$runs
if [ "$${#failed[@]}" -gt 0 ]; then
  echo "failed: $${failed[*]}" >&2
  exit 1
fi
""")

_TPU_VM_RUN = string.Template("""\
gcloud compute tpus tpu-vm ssh $tpu_name --project=$project --zone=$zone \\
  --worker=all --command=$command || failed+=($name)""")

_XPK = string.Template("""\
#!/bin/bash
# bash $file
set -e
$runs
""")

_XPK_RUN = string.Template("""\
xpk workload create --cluster=$cluster --workload=$name \\
  --project=$project --zone=$zone --tpu-type=$tpu_type \\
  --num-slices=$num_slices --docker-image=$image \\
  --max-restarts=$max_restarts --restart-on-user-code-failure \\
  --termination-grace-period-seconds=120 \\
  --command=$command""")

_GKE_RUN = string.Template("""\
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $max_restarts
    rules:
    # Preempted: again, however often. Anything else counts.
    - action: RestartJobSetAndIgnoreMaxRestarts
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    replicas: $num_slices
    template:
      spec:
        parallelism: $hosts
        completions: $hosts
        completionMode: Indexed
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes:
              containerName: train
              operator: In
              values: [75]
          - action: FailJob
            onPodConditions:
            - type: DisruptionTarget
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 120
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: $tpu_accelerator
              cloud.google.com/gke-tpu-topology: $tpu_topology
            containers:
            - name: train
              image: $image
              command: [bash, -c, $command]
              ports:
              - containerPort: 8471
              resources:
                limits:
                  google.com/tpu: $chips_per_host
              volumeMounts:
              - name: work
                mountPath: $mount_path
            volumes:
            - name: work
              persistentVolumeClaim:
                claimName: $volume_claim
""")


def write(
  kind: str,
  sweep: str,
  jobs: Jobs,
  command: Sequence[str],
  settings: flags.FlagValues = flags.FLAGS,
) -> pathlib.Path:
  """Writes <output>/<sweep>_<kind>.sh or .yaml.

  Args:
    kind: one of `KINDS`.
    sweep: its name.
    jobs: the runs to train.
    command: that trains one of them, but for --index and --distributed.
    settings: with the values of `define_flags`.

  Returns:
    The file's path.

  Raises:
    ValueError: a flag that the kind needs is missing, named; or no run is left
      to train.
  """
  if not jobs:
    raise ValueError(
      f"all runs asked for of {sweep} are done: nothing to write"
    )
  render, suffix, needed, setup = _KINDS[kind]
  missing = [f"--{name}" for name in needed if not settings[name].value]
  if missing:
    raise ValueError(f"--write={kind} needs {', '.join(missing)}")
  path = pathlib.Path(settings["output"].value) / f"{sweep}_{kind}.{suffix}"
  values = {name: settings[name].value for _, name, _, _ in _FLAGS}
  values |= {"sweep": sweep, "file": path.name}
  values["setup"] = values["setup"] or setup
  text = render(jobs, shlex.join([*command, "--distributed"]), values)
  files.write_bytes(path, text.encode())
  return path


def _slurm(jobs, command, values):
  # jax gives each process of a node the GPU of its number there.
  gpus = values["gpus_per_node"]
  lines = [f"--ntasks-per-node={gpus or 1}"]
  if gpus:
    lines.append(f"--gpus-per-node={gpus}")
  resources = "\n".join(f"#SBATCH {x}" for x in [*lines, *values["sbatch"]])
  array = _ranges(jobs)
  return _SLURM.substitute(
    values, resources=resources, array=array, command=command
  )


def _ranges(indices: Iterable[int]) -> str:
  """[0, 1, 2, 5] → `0-2,5`."""
  found: list[list[int]] = []
  for index in sorted(indices):
    if found and index == found[-1][1] + 1:
      found[-1][1] = index
    else:
      found.append([index, index])
  return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in found)


def _tpu_vm(jobs, command, values):
  # Every worker starts its process again: they are preempted together.
  again = "do [ $? -eq 75 ] || exit 1; done"
  commands = {
    name: f"{values['setup']} && until {command} --index={index}; {again}"
    for name, index in _cluster_names(jobs).items()
  }
  return _TPU_VM.substitute(values, runs=_runs(_TPU_VM_RUN, commands, values))


def _xpk(jobs, command, values):
  commands = _in_image(jobs, command, values)
  return _XPK.substitute(values, runs=_runs(_XPK_RUN, commands, values))


def _runs(template, commands, values):
  quoted = {
    key: shlex.quote(value)
    for key, value in values.items()
    if isinstance(value, str)
  }
  return "\n".join(
    template.substitute(values | quoted, name=name, command=shlex.quote(text))
    for name, text in commands.items()
  )


def _gke(jobs, command, values):
  chips = math.prod(int(x) for x in values["tpu_topology"].split("x"))
  hosts, rest = divmod(chips, values["chips_per_host"])
  if rest or not hosts:
    raise ValueError(
      f"--tpu_topology={values['tpu_topology']} has {chips} chips, no multiple "
      f"of --chips_per_host={values['chips_per_host']}"
    )
  # What JSON quotes, YAML reads as it is.
  quoted = {
    key: json.dumps(value)
    for key, value in values.items()
    if isinstance(value, str)
  }
  return "---\n".join(
    _GKE_RUN.substitute(
      values | quoted, name=name, hosts=hosts, command=json.dumps(text)
    )
    for name, text in _in_image(jobs, command, values).items()
  )


def _in_image(jobs, command, values):
  # exec: the signal of a preemption must reach Python, not a shell.
  return {
    name: f"{values['setup']} && exec {command} --index={index}"
    for name, index in _cluster_names(jobs).items()
  }


def _cluster_names(jobs: Jobs) -> dict[str, int]:
  """Names that Kubernetes takes → indices.

  Raises:
    ValueError: a name is too long, or two become one.
  """
  named: dict[str, int] = {}
  for index, run in jobs.items():
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if not name[:1].isalpha():
      name = f"run-{name}"
    if len(name) > _NAME_LIMIT:
      raise ValueError(
        f"run {run!r} has a name of over {_NAME_LIMIT} letters, which clusters "
        "do not take; shorten it in the sweep"
      )
    if name in named:
      raise ValueError(
        f"runs {jobs[named[name]]!r} and {run!r} are both {name!r} on a "
        "cluster; rename one in the sweep"
      )
    named[name] = index
  return named


class _Kind(NamedTuple):
  """How a kind is written.

  Attributes:
    render: (jobs, command, settings) → text.
    suffix: of the file.
    needed: settings without a default.
    setup: the default.
  """

  render: Callable[[Jobs, str, dict[str, Any]], str]
  suffix: str
  needed: tuple[str, ...]
  setup: str


_ACTIVATE, _IMAGE = "source .venv/bin/activate", "cd /onerec_jax"
_KINDS = {
  "slurm": _Kind(_slurm, "sh", (), _ACTIVATE),
  "tpu_vm": _Kind(
    _tpu_vm,
    "sh",
    ("tpu_name", "project", "zone"),
    f"cd onerec_jax && {_ACTIVATE}",
  ),
  "xpk": _Kind(
    _xpk, "sh", ("cluster", "project", "zone", "tpu_type", "image"), _IMAGE
  ),
  "gke": _Kind(
    _gke,
    "yaml",
    ("image", "tpu_accelerator", "tpu_topology", "volume_claim"),
    _IMAGE,
  ),
}
KINDS = tuple(_KINDS)
