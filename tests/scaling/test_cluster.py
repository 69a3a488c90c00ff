"""What is written for clusters, run with stand-ins for the clusters' tools."""

import os
import shlex
import subprocess

import pytest
import yaml
from absl import flags

from launch import cluster

COMMAND = ["python", "-m", "launch.sweep", "--sweep=a b.py:x", "--workdir=/w"]
JOBS = {0: "lazy_d24", 1: "lazy_d40", 2: "lazy_d56", 7: "Naive.d24", 9: "9th"}
GOOGLE = ["--project=p", "--zone=z"]
GKE = [
  "--image=repo/image:1", "--tpu_accelerator=tpu-v5p-slice",
  "--tpu_topology=4x4x4", "--volume_claim=disk", "--num_slices=2",
]  # fmt: skip


def write(kind, folder, arguments=(), jobs=JOBS):
  settings = flags.FlagValues()
  cluster.define_flags(settings)
  settings(["test", f"--output={folder}", *arguments])
  path = cluster.write(kind, "ladder", jobs, COMMAND, settings)
  assert path.parent == folder
  return path


def stand_in(folder, name, script):
  """A program of that name that logs its arguments, then runs `script`."""
  tool = folder / "bin" / name
  tool.parent.mkdir(exist_ok=True)
  tool.write_text(
    f"#!/bin/bash\nprintf '%q ' {name} \"$@\" >> {folder}/log\n"
    f"echo >> {folder}/log\n{script}\n"
  )
  tool.chmod(0o755)


def bash(folder, *command, **environment):
  path = f"{folder}/bin:{os.environ['PATH']}"
  return subprocess.run(
    ["bash", *command], cwd=folder, capture_output=True, text=True, check=False,
    env=dict(os.environ, PATH=path, **environment),
  )  # fmt: skip


def log(folder):
  """Calls of the stand-ins, as lists of arguments."""
  return [shlex.split(x) for x in (folder / "log").read_text().splitlines()]


def expected(index):
  return [*COMMAND, "--distributed", f"--index={index}"]


# --- SLURM ------------------------------------------------------------------


@pytest.mark.parametrize("status", [0, 1, 75])
def test_slurm_puts_a_preempted_run_back(tmp_path, status):
  path = write("slurm", tmp_path, ["--setup=true"])
  stand_in(tmp_path, "srun", f"exit {status}")
  stand_in(tmp_path, "scontrol", "")
  ended = bash(tmp_path, path, SLURM_ARRAY_JOB_ID="31", SLURM_ARRAY_TASK_ID="7")
  assert ended.returncode == status, ended.stderr
  calls = [["srun", *expected(7)], ["scontrol", "requeue", "31_7"]]
  assert log(tmp_path) == calls[: 2 if status == 75 else 1]


def test_slurm_options(tmp_path):
  path = write(
    "slurm",
    tmp_path,
    ["--nodes=2", "--gpus_per_node=8", "--sbatch=--partition=gpu,--qos=low"],
  )
  lines = path.read_text().splitlines()
  found = [x.removeprefix("#SBATCH ") for x in lines if x.startswith("#SB")]
  assert sorted(found) == sorted(
    [
      "--job-name=ladder",
      "--array=0-2,7,9%8",
      "--nodes=2",
      "--ntasks-per-node=8",
      "--gpus-per-node=8",
      "--partition=gpu",
      "--qos=low",
      "--time=24:00:00",
      "--output=%x_%a.log",
      "--open-mode=append",
      "--requeue",
      "--signal=TERM@120",
    ]  # fmt: skip
  )
  # sbatch reads no option below the first command.
  first = next(i for i, x in enumerate(lines) if x and x[0] != "#")
  assert not any(x.startswith("#SBATCH") for x in lines[first:])
  assert lines[0] == "#!/bin/bash"
  text = write("slurm", tmp_path).read_text()
  assert "--ntasks-per-node=1\n" in text
  assert "gpus" not in text


# --- Cloud TPU VM -----------------------------------------------------------


def test_tpu_vm_walks_through_the_runs(tmp_path):
  path = write("tpu_vm", tmp_path, [*GOOGLE, "--tpu_name=t", "--setup=true"])
  # gcloud as on a worker: it runs what --command says.
  stand_in(
    tmp_path,
    "gcloud",
    'for x in "$@"; do case $x in --command=*) '
    'bash -c "${x#--command=}"; exit;; esac; done',
  )
  # Run 1 is preempted once, run 2 fails.
  stand_in(
    tmp_path,
    "python",
    'case "$*" in *--index=1) mkdir once 2> /dev/null && exit 75;; '
    "*--index=2) exit 3;; esac; exit 0",
  )
  ended = bash(tmp_path, path)
  assert ended.returncode == 1
  assert ended.stderr == "failed: lazy-d56\n"
  calls = log(tmp_path)
  ran = [call for call in calls if call[0] == "python"]
  assert ran == [expected(i) for i in (0, 1, 1, 2, 7, 9)]
  asked = [call for call in calls if call[0] == "gcloud"]
  assert len(asked) == 5
  for call in asked:
    assert call[:6] == ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "t"]
    assert {"--project=p", "--zone=z", "--worker=all"} < set(call)


# --- xpk and GKE ------------------------------------------------------------


def runs_as(folder, command):
  """What `bash -c command` in an image ends up running."""
  stand_in(folder, "python", "")
  (folder / "log").unlink(missing_ok=True)
  assert bash(folder, "-c", command).returncode == 0
  return log(folder)[-1]


def test_xpk_creates_a_workload_a_run(tmp_path):
  path = write(
    "xpk",
    tmp_path,
    [*GOOGLE, "--cluster=c", "--tpu_type=v5p-128", "--image=i", "--setup=:"],
  )
  stand_in(tmp_path, "xpk", "")
  assert bash(tmp_path, path).returncode == 0
  calls = log(tmp_path)
  names = ["lazy-d24", "lazy-d40", "lazy-d56", "naive-d24", "run-9th"]
  assert len(calls) == 5
  for call, name, index in zip(calls, names, JOBS):
    assert call[:3] == ["xpk", "workload", "create"]
    options = dict(
      x.removeprefix("--").split("=", 1) for x in call[3:] if "=" in x
    )
    assert runs_as(tmp_path, options.pop("command")) == expected(index)
    assert options == {
      "cluster": "c", "workload": name, "project": "p", "zone": "z",
      "tpu-type": "v5p-128", "num-slices": "1", "docker-image": "i",
      "max-restarts": "10", "termination-grace-period-seconds": "120",
    }  # fmt: skip
    assert call[-2] == "--termination-grace-period-seconds=120"
    assert "--restart-on-user-code-failure" in call


def test_gke_has_a_job_set_a_run(tmp_path):
  path = write("gke", tmp_path, [*GKE, "--setup=echo \"a: # 'b'\""])
  assert path.suffix == ".yaml"
  documents = list(yaml.safe_load_all(path.read_text()))
  assert [d["metadata"]["name"] for d in documents] == [
    "lazy-d24", "lazy-d40", "lazy-d56", "naive-d24", "run-9th",
  ]  # fmt: skip
  for document, index in zip(documents, JOBS):
    assert document["kind"] == "JobSet"
    (replicated,) = document["spec"]["replicatedJobs"]
    assert replicated["replicas"] == 2
    job = replicated["template"]["spec"]
    # 4·4·4 chips, 4 a host.
    assert job["parallelism"] == job["completions"] == 16
    rules = job["podFailurePolicy"]["rules"]
    pod = job["template"]["spec"]
    (container,) = pod["containers"]
    assert rules[0]["onExitCodes"] == {
      "containerName": container["name"], "operator": "In", "values": [75],
    }  # fmt: skip
    # Kubernetes takes that policy with this restart policy alone.
    assert pod["restartPolicy"] == "Never"
    assert pod["nodeSelector"] == {
      "cloud.google.com/gke-tpu-accelerator": "tpu-v5p-slice",
      "cloud.google.com/gke-tpu-topology": "4x4x4",
    }
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["image"] == "repo/image:1"
    assert container["volumeMounts"][0]["name"] == pod["volumes"][0]["name"]
    shell, option, command = container["command"]
    assert (shell, option) == ("bash", "-c")
    assert runs_as(tmp_path, command) == expected(index)


# --- What is refused --------------------------------------------------------


@pytest.mark.parametrize(
  ("kind", "arguments", "jobs", "message"),
  [
    ("slurm", [], {}, "ladder are done"),
    ("tpu_vm", ["--zone=z"], JOBS, "needs --tpu_name, --project$"),
    ("gke", GKE[1:], JOBS, "needs --image$"),
    ("gke", [*GKE, "--chips_per_host=5"], JOBS, "64 chips, no multiple"),
    ("gke", GKE, {0: "a" * 41}, "a' has a name of over 40 letters"),
    ("gke", GKE, {0: "a_b", 1: "A-b"}, "'a_b' and 'A-b' are both 'a-b'"),
  ],
)
def test_what_no_cluster_takes_is_refused(
  tmp_path, kind, arguments, jobs, message
):
  with pytest.raises(ValueError, match=message):
    write(kind, tmp_path, arguments, jobs)
  assert not list(tmp_path.iterdir())
