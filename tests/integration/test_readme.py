"""What the README and the guides promise: their commands, word for word."""

import ast
import os
import pathlib
import re
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import worlds

ROOT = pathlib.Path(__file__).resolve().parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
README = (ROOT / "README.md").read_text()
OWN_DATA = README.split("## Your own data")[1].split("\n## ")[0]
# The test's own: a few steps of a small model instead of twenty epochs.
SHORT = (
  "--config.training.num_steps=6 --config.training.validate_every=6 "
  "--config.model.d_model=16 --config.model.d_ff=16 "
  "--config.model.num_heads=2 --config.model.num_kv_heads=2"
)


def blocks(text, language):
  return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


def joined(command):
  """A command without its line breaks."""
  return re.sub(r"\s*\\?\n\s*", " ", command).strip()


def run(command, folder, extra=""):
  """Runs a line of the README in `folder`; gives what it printed."""
  python = ".venv/bin/python "
  assert command.startswith(python), "runs without an activated .venv"
  line = f"{sys.executable} {command.removeprefix(python)} {extra}"
  # A terminal wide enough that no title is broken over two lines.
  environment = {
    **os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200",
    "XDG_CACHE_HOME": str(folder / "cache"),
  }  # fmt: skip
  done = subprocess.run(
    line, shell=True, cwd=folder, env=environment, capture_output=True,
    text=True,
  )  # fmt: skip
  assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
  return done.stdout


@pytest.fixture(scope="module")
def stranger(tmp_path_factory):
  """(folder, what each of the three commands printed)."""
  folder = worlds.write_csv(tmp_path_factory.mktemp("stranger"))
  # The names the README uses: a user `alice`, items `i7` and `i3`.
  for name, table in (("events.csv", "u-0,"), ("items.csv", "")):
    text = (folder / name).read_text().replace("it_", "i")
    (folder / name).write_text(text.replace(table, "alice,") if table else text)
  (block,) = blocks(OWN_DATA, "bash")
  commands = re.findall(r"(?:[^\n]*\\\n)*[^\n]+", block)
  assert [re.search(r"launch\.\w+", c).group() for c in commands] == [
    "launch.prepare", "launch.train", "launch.recommend",
  ]  # fmt: skip
  return folder, [
    run(joined(c), folder, SHORT if "launch.train" in c else "")
    for c in commands
  ]


def log_of(folder, user):
  """Items of a user in the events file."""
  lines = (folder / "events.csv").read_text().splitlines()[1:]
  return {line.split(",")[1] for line in lines if line.split(",")[0] == user}


@pytest.mark.slow
def test_three_commands_recommend_to_alice(stranger):
  folder, (prepared, trained, recommended) = stranger
  assert re.search(r"events\D+480\b", prepared)
  assert "lazy_decoder" in trained
  titles = {}
  for line in (folder / "items.csv").read_text().splitlines()[1:]:
    item, title, _ = line.split(",")
    titles[item] = title
  rows = re.findall(r"^ +\d+ +(i\d+) +(.*?) +-?[\d.]+ *$", recommended, re.M)
  assert len(rows) == 10
  for item, title in rows:
    assert titles[item] == title
  assert not {item for item, _ in rows} & log_of(folder, "alice")


@pytest.mark.slow
def test_the_python_block_recommends(stranger):
  folder, _ = stranger
  (block,) = blocks(OWN_DATA, "python")
  script = folder / "block.py"
  script.write_text(
    block + "\nprint(items, scores)\nassert len(items[0]) == 10"
  )
  shown = run(".venv/bin/python block.py", folder)
  assert not {"'i7'", "'i3'"} & set(re.findall(r"'i\d+'", shown))


@pytest.mark.slow
def test_many_users_at_once(stranger):
  folder, _ = stranger
  prose = re.sub(r"```.*?```", "", OWN_DATA, flags=re.DOTALL)
  (command,) = (
    joined(span)
    for span in re.findall(r"`([^`]+)`", prose)
    if "--users_file" in span
  )
  users = ["alice", "u-1", "u-7"]
  pq.write_table(pa.table({"user_id": users}), folder / "users.parquet")
  run(command, folder)
  rows = pq.read_table(folder / "recommendations.parquet").to_pylist()
  assert [r["rank"] for r in rows] == list(range(1, 11)) * 3
  for user in users:
    items = {r["item_id"] for r in rows if r["user_id"] == user}
    assert len(items) == 10
    assert not items & log_of(folder, user)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_commands_of_a_page_need_no_activated_environment(page):
  commands = re.findall(r"(\S*)python -m \w+", page.read_text())
  assert all(command.endswith(".venv/bin/") for command in commands)


def _missing(text):
  """Paths in code that are not there, as `launch/quickstart.sh`."""
  rooms = "onerec_jax|launch|experiments|docs|tests|benchmarks|results"
  named = re.findall(rf"(?<![\w/.])(?:{rooms})/[\w/]*\.(?:py|sh|md)\b", text)
  return [path for path in named if not (ROOT / path).exists()]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_every_file_a_page_names_is_there(page):
  text = page.read_text()
  links = re.findall(r"\]\((?!https?:)([^)#]+)", text)
  missing = [link for link in links if not (page.parent / link).exists()]
  assert not missing + _missing(text)


@pytest.mark.parametrize("room", ["experiments", "launch", "benchmarks"])
def test_every_file_a_program_names_is_there(room):
  """Programs say in their docstrings which page has their figures."""
  modules = sorted((ROOT / room).rglob("*.py"))
  texts = {
    path: ast.get_docstring(ast.parse(path.read_text())) for path in modules
  }
  assert sum(bool(text) for text in texts.values()) > len(modules) / 2
  missing = {
    str(path.relative_to(ROOT)): found
    for path, text in texts.items()
    if (found := _missing(text or ""))
  }
  assert not missing


def programs():
  """Program → flags that the pages and its own text use with it."""
  found = {}
  texts = [page.read_text() for page in PAGES]
  texts += [path.read_text() for path in (ROOT / "launch").glob("*.py")]
  for text in texts:
    # A command ends with its line, unless that ends with a backslash, or at
    # a semicolon.
    for command in re.findall(
      r"-m (launch\.\w+(?:[^\n`;]*\\\n)*[^\n`;]*)", text
    ):
      flags = re.findall(r"--?([a-z]\w*)", command)
      name = re.match(r"launch\.\w+", command).group()
      found.setdefault(name, set()).update(f for f in flags if f != "m")
  return found


# Imports once what most of them need, and ends each as soon as it has spoken:
# both would take longer than the help.
_HELP = """
import gc, os, runpy, sys
from onerec_jax import workflow, workflow_report
from onerec_jax.inference import recommender
gc.freeze()
for program in sys.argv[1:]:
  print(f"== {program}", flush=True)
  if os.fork() == 0:
    sys.argv = [program, "--help"]
    try:
      runpy.run_module(program, run_name="__main__", alter_sys=True)
    except SystemExit:
      sys.stdout.flush()
      os._exit(0)
  os.wait()
"""


def test_every_program_has_help_with_its_flags():
  wanted = programs() | {"launch.quickstart": {"dataset", "data_dir", "users"}}
  done = subprocess.run(
    [sys.executable, "-c", _HELP, *wanted], cwd=ROOT, capture_output=True,
    text=True,
  )  # fmt: skip
  assert done.returncode == 0
  assert "Traceback" not in done.stderr, done.stderr
  shown = dict(
    re.findall(r"^== (\S+)\n(.*?)(?=^==|\Z)", done.stdout, re.M | re.S)
  )
  assert set(shown) == set(wanted)
  for program, flags in wanted.items():
    assert len(shown[program].splitlines()[0]) > 20, "says what it is for"
    for flag in flags:
      pattern = rf"^ +(-{flag},)?--(\[no\])?{flag}:"
      assert re.search(pattern, shown[program], re.M), f"{program} --{flag}"
