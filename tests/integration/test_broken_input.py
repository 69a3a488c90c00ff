"""Broken input through the front door: named, with advice, nothing lost.

Each case is what a user would do: launch.prepare on their files, training,
recommending. The programs run in this process; what would be printed is the
message looked at here.
"""

import os
import pathlib
import shutil
import subprocess
from types import SimpleNamespace

import jax
import pytest
from flax import linen as nn

import launch.flags
from launch import prepare as program
from onerec_jax import checkpoint, files, model_configs, workflow
from onerec_jax import config as config_lib
from onerec_jax.data import rows as rows_lib
from onerec_jax.data import shards
from onerec_jax.inference import assemble
from onerec_jax.inference.recommender import Recommender, Request
from tests import worlds

ROWS = [
  (user, item, time)
  for user in ("ann", "bob", "cyd")
  for time, item in enumerate(("x", "y", "z", "x", "y"))
]
ITEMS = "item_id,title\nx,Ex\ny,Why\nz,Zed\n"


def csv(rows, header="user_id,item_id,timestamp_ms"):
  lines = [",".join(map(str, row)) for row in rows]
  return "\n".join([header, *lines]) + "\n"


def content(folder):
  """Every file below a folder, whatever its name."""
  return {
    path.relative_to(folder): path.read_bytes()
    for path in folder.rglob("*")
    if path.is_file()
  }


@pytest.fixture
def door(tmp_path, monkeypatch):
  """launch.prepare on these files: the manifest, or the text it ends with."""

  def run(*texts, **fields):
    config = config_lib.Config()
    config.prepare.dataset = "tables"
    for name, text in zip(("events", "items"), texts):
      path = tmp_path / f"{name}.csv"
      path.write_text(text)
      setattr(config.prepare, name, str(path))
    for name, value in fields.items():
      setattr(config.prepare, name, value)
    work = SimpleNamespace(value=str(tmp_path / "work"))
    monkeypatch.setattr(launch.flags, "_WORKDIR", work)
    monkeypatch.setattr(program, "_CONFIG", SimpleNamespace(value=config))
    try:
      program.main(["launch.prepare"])
    except SystemExit as end:
      return str(end.code)
    return shards.read_manifest(tmp_path / "work" / "prepared")

  run.prepared = tmp_path / "work" / "prepared"
  run.folder = tmp_path
  return run


BROKEN = {
  "no column of items": (
    csv(ROWS, "user_id,article,timestamp_ms"),
    ["events.csv", "needs a column 'item_id'", "'article'", "Rename"],
  ),
  "a misspelt column": (
    csv([(*row, 5) for row in ROWS], "user_id,item_id,timestamp_ms,ratng"),
    ["events.csv", "'ratng'", "rename it to 'rating'"],
  ),
  "a time that is none": (
    csv([*ROWS[:2], ("ann", "z", "soon")]),
    ["events.csv", "row 3", "'timestamp_ms'", "'soon'", "on_bad_row=skip"],
  ),
  "a user without an id": (
    csv([ROWS[0], ("", "x", 7)]),
    ["events.csv", "row 2", "'user_id'", "missing", "on_bad_row=skip"],
  ),
  "an item the catalogue lacks": (
    csv([*ROWS, ("ann", "ghost", 9)]),
    ["events.csv", "row 16", "'ghost'", "not in the items table", "skip"],
  ),
  "a column named as one of ours": (
    csv([(*row, 5) for row in ROWS], "user_id,item_id,timestamp_ms,source_row"),
    ["events.csv", "'source_row'", "rename it"],
  ),
  "a column that is there in two spellings": (
    csv([(*row, 5) for row in ROWS], "user_id,item_id,timestamp_ms,Item_ID"),
    ["events.csv", "'item_id' and 'Item_ID'", "rename one"],
  ),
  "a field too many": (
    csv([*ROWS[:4], ("ann", "x", 9, "extra")]),
    ["events.csv", "row 5", "4 fields", "header has 3", "on_bad_row=skip"],
  ),
  "nothing but a header": (csv([]), ["no events are left: the input has none"]),
  "an empty file": ("", ["events.csv", "empty", "must name columns"]),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named_and_what_was_prepared_stays(door, case):
  assert door(csv(ROWS), ITEMS)["num_events"] == 15
  before = content(door.prepared)
  text, parts = BROKEN[case]
  error = door(text, ITEMS)
  assert isinstance(error, str), "was accepted"
  assert error.startswith("error: ")
  for part in parts:
    assert part in error
  assert content(door.prepared) == before
  # No half-made folder is left beside it.
  assert [path.name for path in door.prepared.parent.iterdir()] == ["prepared"]
  # What stayed is whole, and with the old file it is up to date.
  stamp = (door.prepared / "manifest.json").stat().st_mtime_ns
  assert door(csv(ROWS), ITEMS)["num_events"] == 15
  assert (door.prepared / "manifest.json").stat().st_mtime_ns == stamp


def test_a_file_that_is_not_utf8_is_named(door):
  path = door.folder / "latin.csv"
  path.write_bytes(csv([("ren\u00e9", "x", 1)]).encode("latin-1"))
  error = door(events=str(path))
  for part in ("latin.csv", "not UTF-8", "Save it again"):
    assert part in error


def test_seconds_named_milliseconds_are_warned_of(door, capsys):
  late = [(user, item, 1_700_000_000 + time) for user, item, time in ROWS]
  assert "look like seconds" in door(csv(late), ITEMS)["notes"][0]
  assert "warning: every timestamp_ms" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["events", "items"])
def test_a_missing_file_is_named_with_its_flag(door, name):
  door(csv(ROWS), ITEMS)
  before = content(door.prepared)
  given = {n: str(door.folder / f"{n}.csv") for n in ("events", "items")}
  given[name] = str(door.folder / "nothing.csv")
  error = door(**given)
  for part in ("nothing.csv", "does not exist", f"--config.prepare.{name}"):
    assert part in error
  assert content(door.prepared) == before


def test_no_file_at_all_says_which_flag_is_missing(door):
  assert "--config.prepare.events=FILE.csv" in door()


def test_bad_rows_are_counted_when_told_to_skip(door):
  rows = [*ROWS, ("ann", "ghost", 9), ("", "x", 9), ("bob", "x", "soon")]
  found = door(csv(rows), ITEMS, on_bad_row="skip")
  assert found["num_events"] == len(ROWS)
  assert sum(found["skipped_rows"].values()) == 3
  assert found["skipped_rows"]["events.item_id: not in the items table"] == 1


def test_a_duplicate_event_is_left_out_and_counted(door):
  found = door(csv([*ROWS, ROWS[3]]), ITEMS)
  assert found["dropped_events"] == {"duplicate_event": 1}
  assert found["num_events"] == len(ROWS)


def test_unsorted_events_give_the_same_users(door):
  door(csv(ROWS), ITEMS)
  expected = shards.PreparedData.open(door.prepared)
  expected = [expected.user(user).items.tolist() for user in range(3)]
  # Turned within each user, so that users are still met in the same order.
  turned = [row for user in range(3) for row in ROWS[user * 5 :][:5][::-1]]
  door(csv(turned), ITEMS)
  found = shards.PreparedData.open(door.prepared)
  assert [found.user(user).items.tolist() for user in range(3)] == expected
  assert found.user(0).timestamps.tolist() == [0, 1, 2, 3, 4]


def test_a_corrupt_shard_is_named_then_made_again_bit_for_bit(door):
  manifest = door(csv(ROWS), ITEMS)
  before = content(door.prepared)
  shard = door.prepared / manifest["shards"][1]["name"]
  broken = bytearray(shard.read_bytes())
  broken[len(broken) // 2] ^= 1
  shard.write_bytes(broken)
  # Training opens what is prepared without being told the files again.
  config = config_lib.Config()
  config.prepare.dataset = "tables"
  with pytest.raises(ValueError) as error:  # noqa: PT011
    workflow.train(config, door.prepared.parent)
  for part in (shard.name, "corrupt", "sha256", "run launch.prepare again"):
    assert part in str(error.value)
  assert door(csv(ROWS), ITEMS) == manifest
  assert content(door.prepared) == before


@pytest.fixture(scope="module")
def run(tmp_path_factory):
  """A work directory with a run of random weights."""
  folder = tmp_path_factory.mktemp("run")
  config = worlds.config(worlds.write_csv(folder / "raw", users=12))
  config.model = model_configs.SASRecConfig(num_layers=1, d_model=8, d_ff=8)
  system = workflow.assembled(config, folder)
  names = sorted(rows_lib.feature_sizes(system.prepared))
  batch = rows_lib.request_batch([], names, config.pipeline, 1)
  params = jax.jit(lambda *args: nn.unbox(system.model.init(*args)["params"]))(
    jax.random.key(0), batch, system.catalogue
  )
  path = assemble.run_directory(folder, config.name)
  record = {
    "config": config_lib.to_dict(config),
    "prepared": system.prepared.manifest["fingerprint"],
    "semantic_ids": "",
  }
  files.write_json(path / "config.json", record)
  checkpoint.save_best(path, 1, params)
  return folder


def test_an_empty_history_is_a_newcomer(run):
  recommender = Recommender.load(run)
  items, scores = recommender.recommend(
    [Request(history=[]), Request(history=["it_1", "it_2"])], k=5
  )
  assert len(set(items[0])) == 5
  assert all(recommender.knows(item) for item in items[0])
  assert scores[0] == sorted(scores[0], reverse=True)
  assert not {"it_1", "it_2"} & set(items[1])


def test_an_unknown_item_in_a_history_is_named_or_left_out(run):
  recommender = Recommender.load(run)
  strange = [Request(history=["it_1", "ghost"])]
  with pytest.raises(ValueError, match=r"history: item 'ghost'.*on_unknown"):
    recommender.recommend(strange)
  with pytest.warns(UserWarning, match="'ghost'"):
    items, _ = recommender.recommend(strange, k=3, on_unknown="skip")
  expected, _ = recommender.recommend([Request(history=["it_1"])], k=3)
  assert items == expected


@pytest.mark.parametrize(
  ("path", "text", "match"),
  [
    ("models/tiny/config.json", "{", r"config\.json is not readable JSON"),
    ("models/tiny/best.json", "{", r"best\.json is not readable JSON"),
    ("prepared/manifest.json", "{}", r"manifest\.json .*launch\.prepare"),
    ("prepared/items.parquet", "PAR1", r"corrupt table .*items\.parquet"),
    ("models/tiny/best.json", '{"step": 2}', r"best/2.*train the model"),
  ],
)
def test_a_broken_artefact_is_named_when_loaded(run, path, text, match):
  broken = run / path
  before = broken.read_bytes()
  broken.write_text(text)
  try:
    with pytest.raises((ValueError, FileNotFoundError), match=match):
      Recommender.load(run, "tiny")
  finally:
    broken.write_bytes(before)


def test_a_run_that_is_not_there_is_named(run, tmp_path):
  with pytest.raises(ValueError, match=r"no run 'huge'.*\['tiny'\]"):
    Recommender.load(run, "huge")
  with pytest.raises(ValueError, match=r"no trained run.*launch\.train"):
    Recommender.load(tmp_path)


# The environment itself, with programs that stand for Python.

PYTHON_STUB = """#!/bin/bash
case "$*" in
  *version_info*) exit {old} ;;
  "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python ;;
  *install*-e*) echo "{name} $*" >> log; [[ ! -e fails ]] ;;
esac
"""


@pytest.fixture
def setup(tmp_path):
  """launch/setup.sh in an empty project, on a PATH of these stubs."""
  root = pathlib.Path(__file__).parents[2]
  (tmp_path / "launch").mkdir()
  shutil.copy(root / "launch" / "setup.sh", tmp_path / "launch")
  for name in ("setup.cfg", "pyproject.toml"):
    (tmp_path / name).write_text("")
  programs = tmp_path / "bin"
  programs.mkdir()

  def run(new=(), **environment):
    names = ("python3", "python3.11", "python3.12", "python3.13", "mine")
    for name in names:
      path = programs / name
      path.write_text(PYTHON_STUB.format(name=name, old=int(name not in new)))
      path.chmod(0o755)
    path = f"{programs}:{os.environ['PATH']}"
    rest = {k: v for k, v in os.environ.items() if k != "PYTHON"}
    return subprocess.run(
      ["bash", "launch/setup.sh"], cwd=tmp_path, capture_output=True, text=True,
      env=rest | {"PATH": path} | environment,
    )  # fmt: skip

  run.folder = tmp_path
  run.log = lambda: (tmp_path / "log").read_text().splitlines()
  return run


@pytest.mark.parametrize(
  ("new", "environment", "taken"),
  [
    (("python3", "python3.12"), {}, "python3"),
    (("python3.12", "python3.13"), {}, "python3.12"),
    (("python3.13",), {}, "python3.13"),
    (("python3", "mine"), {"PYTHON": "mine"}, "mine"),
  ],
)
def test_setup_takes_a_python_that_is_new_enough(
  setup, new, environment, taken
):
  done = setup(new, **environment)
  assert done.returncode == 0, done.stderr
  (line,) = setup.log()
  assert line.startswith(f"{taken} -m pip install")
  assert line.endswith("-e .")
  assert setup(new, **environment).stdout == ""  # nothing is left to do
  assert len(setup.log()) == 1


@pytest.mark.parametrize("environment", [{}, {"PYTHON": "mine"}])
def test_setup_without_such_a_python_says_so(setup, environment):
  done = setup(("python3",) if environment else (), **environment)
  assert done.returncode == 1
  assert "needs Python >= 3.11; name one with PYTHON=" in done.stderr
  assert not (setup.folder / ".venv").exists()


def test_setup_repairs_what_was_interrupted(setup):
  """In the installing, in the making of .venv, and by a Python removed."""
  (setup.folder / "fails").touch()
  assert setup(("python3",)).returncode != 0
  (setup.folder / "fails").unlink()
  assert setup(("python3",)).returncode == 0
  assert "--force-reinstall" in setup.log()[-1]
  assert setup(("python3",)).stdout == ""
  # No pip there, and nothing that says what is whole.
  python = setup.folder / ".venv" / "bin" / "python"
  rest = setup.folder / ".venv" / "half"
  for broken in ("#!/bin/bash\nexit 1\n", None):
    python.unlink()
    if broken:
      python.write_text(broken)
      python.chmod(0o755)
      (setup.folder / ".venv" / "unfinished").touch()
    else:
      python.symlink_to(setup.folder / "nowhere")
      (setup.folder / ".venv" / "installed_base").unlink()
    rest.touch()
    done = setup(("python3",))
    assert done.returncode == 0, done.stderr
    assert not rest.exists()
    assert setup(("python3",)).stdout == ""
