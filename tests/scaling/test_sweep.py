"""Sweeps: what is run, what is skipped, what is refused, what is collected."""

import json
import os
import pathlib
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.scaling import ladder
from onerec_jax import config as config_lib
from onerec_jax import files, model_configs, partitioning, workflow
from onerec_jax.data import pipeline
from onerec_jax.inference import assemble
from onerec_jax.models import registry
from onerec_jax.scaling import collect, sweep
from onerec_jax.scaling import points as points_lib
from onerec_jax.training import metrics_writer
from tests import worlds

# As in the processes of their own that some of the runs get.
pytestmark = pytest.mark.usefixtures("one_device")

ROOT = pathlib.Path(__file__).resolve().parents[2]

FILE = """
import pathlib
from onerec_jax import model_configs
from onerec_jax.scaling import sweep
from tests import worlds

def get_sweep(arg):
  lazy = sweep.changed(worlds.config(pathlib.Path(arg)), {
    "training.num_steps": 4, "training.validate_every": 2,
    "training.log_every": 2, "training.seed": 7,
  })
  plain = model_configs.SASRecConfig(num_layers=1, d_model=16, d_ff=32)
  return {"plain": sweep.changed(lazy, {"model": plain}), "lazy": lazy}
"""


def written(folder, body):
  path = folder / "some_sweep.py"
  path.write_text("from onerec_jax import config as c\n" + body)
  return str(path)


# --- Expansion --------------------------------------------------------------


def test_a_changed_config_differs_in_those_fields_alone():
  base = config_lib.Config()
  model = model_configs.DecoderOnlyConfig(num_layers=3)
  found = sweep.changed(
    base, {"model": model, "model.d_model": 8, "training.seed": 5}
  )
  expected = config_lib.Config()
  expected.model = model_configs.DecoderOnlyConfig(num_layers=3, d_model=8)
  expected.training.seed = 5
  assert found == expected
  # Neither the base nor the value shares anything with what comes out.
  assert base == config_lib.Config()
  assert model.d_model == model_configs.DecoderOnlyConfig().d_model
  found.prepare.simulation.num_users = 1
  assert base == config_lib.Config()


@pytest.mark.parametrize(
  ("path", "message"),
  [
    ("trainning.seed", r"'trainning' that config does not have"),
    ("training.sed", r"'sed' that config\.training does not have"),
    ("training.seed.x", r"'x' that config\.training\.seed does not have"),
    ("model.encoder_layers", r"'encoder_layers' that config\.model does not"),
  ],
)
def test_an_unknown_field_is_refused_by_name(path, message):
  with pytest.raises(ValueError, match=message):
    sweep.changed(config_lib.Config(), {path: 1})


def test_names_and_order_are_the_files(tmp_path):
  body = """def get_sweep(arg):
  return {f"{arg[-1]}_{x}": c.Config(name="other") for x in "zay"}
"""
  found = sweep.expand(written(tmp_path, body) + ":with:3")
  names = ["3_z", "3_a", "3_y"]
  assert [config.name for config in found.configs] == names
  assert found.name == "some_sweep_with_3"
  assert found.select("_[ay]") == [1, 2]
  assert found.config(2).name == "3_y"
  with pytest.raises(ValueError, match="no run 3; its 3 runs count from 0"):
    found.config(3)
  with pytest.raises(ValueError, match="matches 'q': 3_z, 3_a, 3_y"):
    found.select("q")
  with pytest.raises(ValueError, match=r"'\(' is no regular expression"):
    found.select("(")


@pytest.mark.parametrize(
  ("body", "message"),
  [
    ("", "has no get_sweep"),
    ("get_sweep = lambda arg: {}", "returned no run"),
    ("get_sweep = lambda arg: {'a/b': c.Config()}", "'a/b' cannot be"),
    ("get_sweep = lambda arg: {'..': c.Config()}", r"'\.\.' cannot be"),
    (
      "get_sweep = lambda arg: {'a': c.Config(), 'b': "
      "c.Config(prepare=c.PrepareConfig(split='time'))}",
      "runs a and b prepare other data",
    ),
  ],
)
def test_what_is_no_sweep_is_refused(tmp_path, body, message):
  with pytest.raises(ValueError, match=message):
    sweep.expand(written(tmp_path, body))


def test_a_file_that_is_not_there_is_named():
  with pytest.raises(FileNotFoundError, match="nowhere.py"):
    sweep.expand("nowhere.py:arg")


# --- The ladder -------------------------------------------------------------


@pytest.mark.parametrize("name", ["beauty", "movielens"])
def test_the_ladder_compares_like_with_like(name):
  runs = ladder.get_sweep(f"{name}:2")
  assert len(runs) == 2 * 3 * 5
  sizes = {}
  for run, config in runs.items():
    model = registry.create(config.model, 50, (8, 8, 8), {}, {})
    width = config.model.d_model
    counted = registry.block_parameters(model)
    assert counted == pytest.approx(36 * width**2, rel=0.015), run
    assert not config.model.constrained_softmax
    sizes.setdefault(config.model.system, set()).add(counted)
    # But for model and seed all runs are the same.
    config.training.seed, config.model = 0, model_configs.DecoderOnlyConfig()
  assert len({json.dumps(config_lib.to_dict(c)) for c in runs.values()}) == 1
  assert len(sizes) == 3
  for found in sizes.values():
    assert len(found) == 5
    assert np.log10(max(found) / min(found)) >= 1.5


def test_a_ladder_that_is_not_there_is_refused():
  with pytest.raises(ValueError, match="'beuty'; there are beauty, movielens"):
    ladder.get_sweep("beuty")
  with pytest.raises(ValueError, match="want a number of seeds, as beauty:3"):
    ladder.get_sweep("beauty:x")


# --- Running here -----------------------------------------------------------


def fake_manifest(workdir, scripts):
  """A manifest whose commands are shell scripts, in the run's directory."""
  entries = []
  for name, script in scripts.items():
    run = workdir / "models" / name
    run.mkdir(parents=True)
    done = (run / "finished.json").exists()
    entries.append(
      sweep.Entry(
        name,
        "0123456789ab",
        ["sh", "-c", f"cd {run} && echo {name} >> ../log; {script}"],
        "done" if done else "pending",
      )
    )
  return sweep.Manifest(workdir / "sweeps" / "fake.json", "fake.py", entries)


def test_crashes_and_preemptions_do_not_end_the_others(tmp_path, capsys):
  manifest = fake_manifest(
    tmp_path,
    {
      "crashes": "exit 3",
      "preempted": "mkdir once && exit 75; touch finished.json",
      "before": "exit 1",
      "silent": "true",
      "fine": "touch finished.json",
      "unasked": "touch finished.json",
    },
  )
  manifest.entries[2].state = "done"
  with pytest.raises(ValueError, match="failed: crashes, silent;"):
    sweep.run_locally(manifest, tmp_path, range(5))
  ran = (tmp_path / "models" / "log").read_text().split()
  assert ran == ["crashes", "preempted", "preempted", "silent", "fine"]
  record = files.read_json(manifest.path)
  states = {run["name"]: run["state"] for run in record["runs"]}
  assert [name for name, state in states.items() if state == "done"] == [
    "preempted", "before", "fine",
  ]  # fmt: skip
  shown = capsys.readouterr().out
  assert "fake.py: 4 runs to train, 1 done before" in shown
  assert "[2/4] preempted, about 0 min left" in shown
  assert "crashes ended with status 3" in shown


def test_sigterm_goes_to_the_run_and_ends_the_sweep(tmp_path):
  manifest = fake_manifest(
    tmp_path,
    {
      "one": f"trap 'touch saved; exit 75' TERM; kill -TERM {os.getpid()}; "
      "while :; do sleep 0.02; done",
      "two": "touch finished.json",
    },
  )
  before = signal.getsignal(signal.SIGTERM)
  with pytest.raises(SystemExit) as end:
    sweep.run_locally(manifest, tmp_path, [0, 1])
  assert end.value.code == 75
  assert (tmp_path / "models" / "one" / "saved").exists()
  assert (tmp_path / "models" / "log").read_text() == "one\n"
  assert signal.getsignal(signal.SIGTERM) == before


def test_ctrl_c_comes_to_the_run_once_and_ends_the_sweep(tmp_path, ctrl_c):
  manifest = fake_manifest(
    tmp_path,
    {
      "one": "trap 'echo x >> caught; sleep 0.3; exit 1' INT; "
      f"{sys.executable} -c 'import os; print(os.getpgid(0))' > group; "
      f"kill -INT {os.getpid()}; "
      "while :; do sleep 0.02; done",
      "two": "touch finished.json",
    },
  )
  with pytest.raises(KeyboardInterrupt):
    sweep.run_locally(manifest, tmp_path, [0, 1])
  run = tmp_path / "models" / "one"
  assert (run / "caught").read_text() == "x\n"
  # What a terminal sends to this process's group does not come there as well.
  assert int((run / "group").read_text()) != os.getpgid(0)
  assert (tmp_path / "models" / "log").read_text() == "one\n"


# --- A sweep of two tiny runs -----------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
  """(sweep, work directory) of two runs of a few steps."""
  folder = tmp_path_factory.mktemp("sweep")
  worlds.write_csv(folder / "raw")
  (folder / "two.py").write_text(FILE)
  found = sweep.expand(f"{folder}/two.py:{folder}/raw")
  # The first in this process, as a task of an array would; the other by
  # `run_locally`, which finds the first done.
  workflow.train(found.config(0), folder)
  patch = pytest.MonkeyPatch()
  patch.chdir(ROOT)
  patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
  manifest = sweep.survey(found, folder, command(found.spec, folder))
  sweep.run_locally(manifest, folder, [0, 1])
  patch.undo()
  return found, folder


def command(spec, folder):
  program = [sys.executable, "-m", "launch.sweep"]
  return [*program, f"--sweep={spec}", f"--workdir={folder}"]


@pytest.mark.slow
def test_a_second_call_skips_what_is_done(trained):
  found, folder = trained
  manifest = sweep.survey(found, folder, ["train"])
  assert [entry.state for entry in manifest.entries] == ["done", "done"]
  assert not manifest.pending([0, 1])
  record = files.read_json(manifest.path)
  assert record["sweep"] == found.spec
  for index, run in enumerate(record["runs"]):
    assert run == {
      "name": ["plain", "lazy"][index],
      "fingerprint": config_lib.fingerprint(found.config(index)),
      "command": [*command(found.spec, folder), f"--index={index}"],
      "state": "done",
    }


@pytest.mark.slow
def test_a_changed_config_under_the_same_name_is_refused(trained):
  found, folder = trained
  configs = list(found.configs)
  configs[1] = sweep.changed(configs[1], {"training.num_steps": 6})
  other = sweep.Sweep(found.spec, found.name, configs)
  with pytest.raises(
    ValueError, match=r"lazy holds .* \(config\.training\.num_steps: 4 → 6"
  ):
    sweep.survey(other, folder, [])
  # Under a name of its own it is a run to train.
  configs[1] = sweep.changed(configs[1], {"name": "longer"})
  assert sweep.survey(other, folder, []).pending([0, 1]) == {1: "longer"}


@pytest.mark.slow
def test_points_are_what_the_runs_recorded(trained):
  found, folder = trained
  shown = subprocess.run(
    [*command(found.spec, folder), f"--points={folder}/points.json"],
    cwd=ROOT, env=dict(os.environ, JAX_PLATFORMS="cpu"), text=True,
    capture_output=True, timeout=300, check=True,
  ).stdout  # fmt: skip
  assert shown == "0 done    plain\n1 done    lazy\n"
  points = files.read_json(folder / "points.json")
  assert [p["name"] for p in points] == ["plain", "lazy"]
  assert [p["architecture"] for p in points] == ["sasrec", "lazy_decoder"]
  # d 16, F 32: 4·d² + 3·d·F and 6·d² + 3·d·F.
  assert [p["parameters"] for p in points] == [2560, 3072]
  for point, config in zip(points, found.configs):
    run = folder / "models" / config.name
    lines = metrics_writer.read(run / "metrics.jsonl")
    every = [(r["loss"], r["step"]) for r in lines if r["kind"] == "validation"]
    assert len(every) == 2
    assert (point["loss"], point["loss_step"]) == min(every)
    assert (point["seed"], point["steps"]) == (7, 4)
    last = [r for r in lines if r["kind"] == "train"][-1]
    step_flops = last["gflops_per_s"] * 1e9 * last["step_ms"] / 1e3
    assert point["flops"] == pytest.approx(4 * step_flops)
  grouped = points_lib.read(folder / "points.json")
  assert grouped["sasrec"].parameters.tolist() == [2560]
  assert grouped["lazy_decoder"].tokens.tolist() == [points[1]["targets"]]


@pytest.mark.slow
def test_targets_and_parameters_of_points_are_counted(trained):
  found, folder = trained
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  for point, config in zip(collect.points(found, folder), found.configs):
    system, params = assemble.load(folder, config.name, mesh)
    sizes = [np.prod(x.shape) for x in jax.tree.leaves(params)]
    assert point["total_parameters"] == sum(sizes)
    batches, _ = pipeline.training_dataset(
      system.prepared, config.pipeline, config.training.seed
    )
    seen = [np.sum(b.targets > 0) for b, _ in zip(batches, range(4))]
    assert point["targets"] == sum(seen)


@pytest.mark.slow
def test_a_run_without_a_loss_makes_no_point(trained):
  found, folder = trained
  metrics = folder / "models" / "lazy" / "metrics.jsonl"
  content = metrics.read_text()
  try:
    metrics.write_text(content.replace('"validation"', '"train"'))
    with pytest.raises(
      ValueError, match="lazy/metrics.jsonl has no validation"
    ):
      collect.points(found, folder)
  finally:
    metrics.write_text(content)
  nothing = sweep.Sweep("x", "x", [config_lib.Config(name="absent")])
  assert collect.points(nothing, folder) == []
