"""What programs do before they start."""

import importlib.util
import json
import pathlib
import signal
import subprocess
import sys
from types import SimpleNamespace

import absl.flags
import jax
import numpy as np
import pytest
from absl import app

from launch import flags
from onerec_jax import workflow
from onerec_jax.evaluation import result

LAUNCH = pathlib.Path(__file__).resolve().parents[2] / "launch"


def test_the_compilation_cache_lies_where_the_environment_says(
  tmp_path, monkeypatch
):
  told = {}
  monkeypatch.setattr(
    type(jax.config),
    "update",
    lambda _, name, value: told.update({name: value}),
  )
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
  flags.start()
  place = str(tmp_path / "onerec_jax/jax")
  assert told.pop("jax_compilation_cache_dir") == place
  # JAX reads the variable itself.
  monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "own"))
  flags.start()
  assert "jax_compilation_cache_dir" not in told


def test_seeds_are_joined_by_plus():
  assert flags.seeds("runs", ["a+b", "c"]) == [["a", "b"], ["c"]]


@pytest.mark.parametrize(
  ("values", "told"),
  [([], "--runs is needed"), (["a", ""], "has ''"), (["a+"], r"has 'a\+'"),
   (["a+b+a"], "runs that differ")],
)  # fmt: skip
def test_values_that_join_no_seeds_are_refused(values, told):
  with pytest.raises(app.UsageError, match=told):
    flags.seeds("runs", values)


def test_an_experiment_that_is_no_file_is_one_line():
  done = subprocess.run(
    [
      sys.executable, "-m", "launch.train",
      "--config=experiments/tables/sasrec",
    ],
    cwd=LAUNCH.parent, capture_output=True, text=True,
  )  # fmt: skip
  assert done.returncode == 1
  (told,) = done.stderr.splitlines()
  assert told == (
    "error: --config: there is no file experiments/tables/sasrec; did you mean "
    "experiments/tables/sasrec.py?"
  )


@pytest.mark.slow
@pytest.mark.parametrize(
  ("arguments", "told"),
  [
    (
      ["--config.training.num_step=3"],
      "no field 'num_step'; did you mean num_",
    ),
    (["--config.trainin.num_steps=3"], "'trainin'; did you mean training?"),
    (
      ["--config=experiments/tables/sasrec.py", "--config.model.d_modl=3"],
      "no field 'd_modl'; did you mean d_model?",
    ),
  ],
)
def test_a_config_field_that_is_not_there_is_named(arguments, told):
  command = [sys.executable, "-m", "launch.prepare", "--workdir=none"]
  done = subprocess.run(
    [*command, *arguments], cwd=LAUNCH.parent, capture_output=True, text=True
  )
  assert done.returncode == 1
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ")
  assert told in line


def test_ctrl_c_is_one_line_and_ends_loops_of_shells(monkeypatch, capsys):
  def interrupted():
    raise KeyboardInterrupt

  raised = []
  monkeypatch.setattr(flags.signal, "raise_signal", raised.append)
  handler = signal.getsignal(signal.SIGINT)
  try:
    flags.program(interrupted)(["launch.any"])
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
  finally:
    signal.signal(signal.SIGINT, handler)
  assert raised == [signal.SIGINT]
  told = "interrupted; the same command goes on\n"
  assert capsys.readouterr().err == told


def _program(monkeypatch, name):
  """A program whose flags are its own, whatever this process has imported."""
  for kind in ("list", "enum", "bool", "string"):
    monkeypatch.setattr(
      absl.flags, f"DEFINE_{kind}",
      lambda name, default, *rest: SimpleNamespace(value=default),
    )  # fmt: skip
  monkeypatch.setattr(flags, "start", lambda: None)
  spec = importlib.util.spec_from_file_location(name, LAUNCH / f"{name}.py")
  found = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(found)
  return found


def _evaluation(name, hits):
  hits = np.asarray(hits, np.float32)
  per_query = {
    f"{column}{metric}@5": hits
    for column in ("", "filtered/")
    for metric in ("recall", "ndcg")
  }
  figures = {metric: float(hits.mean()) for metric in per_query}
  return result.Evaluation(
    name, "test", figures | {"queries": len(hits), "coverage@5": 1.0}, {},
    np.arange(len(hits), dtype=np.int32), np.ones(len(hits), np.int32),
    np.ones((len(hits), 5), np.int32), np.ones((len(hits), 5), np.int32),
    per_query,
  )  # fmt: skip


def test_what_evaluation_prints_is_in_its_json(tmp_path, monkeypatch, capsys):
  program = _program(monkeypatch, "evaluate")
  found = {
    "mine": _evaluation("mine", [1, 1, 1, 0]),
    "popularity": _evaluation("popularity", [0, 1, 0, 0]),
  }
  monkeypatch.setattr(workflow, "evaluate", lambda _, name, *__: found[name])
  monkeypatch.setattr(flags, "workdir", lambda: tmp_path)
  program._MODELS.value = [*found]
  program._OUTPUT.value = str(tmp_path / "found.json")
  program.main(["launch.evaluate"])
  record = json.loads((tmp_path / "found.json").read_text())
  assert record["split"] == "test"
  assert set(record["models"]) == set(found)
  rows = record["comparisons"]
  assert {(row["a"], row["b"]) for row in rows} == {("mine", "popularity")}
  assert {row["metric"] for row in rows} == set(found["mine"].per_query)
  printed = capsys.readouterr().out
  for row in rows:
    assert row["difference"] == 0.5
    assert f"({row['low']:+.4f} to {row['high']:+.4f})" in printed


def test_seeds_are_joined_and_compared_as_one_model(
  tmp_path, monkeypatch, capsys
):
  program = _program(monkeypatch, "evaluate")
  found = {
    "mine_seed0": _evaluation("mine_seed0", [1, 1, 1, 0]),
    "mine_seed1": _evaluation("mine_seed1", [1, 0, 0, 0]),
    "base": _evaluation("base", [0, 1, 0, 0]),
  }
  monkeypatch.setattr(workflow, "evaluate", lambda _, name, *__: found[name])
  monkeypatch.setattr(flags, "workdir", lambda: tmp_path)
  program._MODELS.value = ["mine_seed0+mine_seed1", "base"]
  program._BASELINES.value = ["base"]
  program._OUTPUT.value = str(tmp_path / "found.json")
  program.main(["launch.evaluate"])
  record = json.loads((tmp_path / "found.json").read_text())
  assert set(record["models"]) == set(found)
  (average,) = record["averages"].values()
  # Of .75 and .25.
  assert average["ndcg@5"] == {"mean": 0.5, "std": 0.125**0.5, "seeds": 2}
  assert {row["difference"] for row in record["comparisons"]} == {0.25}
  assert "0.5000 ± 0.3536 │ 0.5000 ± 0.3536" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mine+mine", "mine+"])
def test_what_joins_no_seeds_is_refused(tmp_path, monkeypatch, name):
  program = _program(monkeypatch, "evaluate")
  monkeypatch.setattr(flags, "workdir", lambda: tmp_path)
  program._MODELS.value = [name]
  with pytest.raises(app.UsageError, match="joins seeds"):
    program.main(["launch.evaluate"])


def test_a_baseline_that_is_not_among_the_models_is_refused(
  tmp_path, monkeypatch
):
  program = _program(monkeypatch, "evaluate")
  monkeypatch.setattr(flags, "workdir", lambda: tmp_path)
  program._MODELS.value, program._BASELINES.value = ["mine"], ["mien"]
  with pytest.raises(app.UsageError, match="mien, which --models has not"):
    program.main(["launch.evaluate"])
