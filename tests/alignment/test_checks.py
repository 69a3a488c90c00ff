"""What is refused before an alignment, and what is told."""

from unittest import mock

import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import files
from onerec_jax.alignment import checks
from onerec_jax.alignment_config import AlignmentConfig
from onerec_jax.data import prepare, shards
from onerec_jax.inference import assemble, prefix_index
from onerec_jax.scaling import sweep
from onerec_jax.semantic_ids import SemanticIds
from tests import tiny

free_lazy = tiny.lazy_decoder(constrained_softmax=False)
sessions = tiny.session_decoder(constrained_softmax=False)


def refused(model, **settings):
  codes = np.asarray(tiny.catalogue().codes)
  system = mock.Mock(spec=assemble.System)
  system.config = config_lib.Config(
    alignment=AlignmentConfig(objective="ecpo", **settings)
  )
  system.model = model
  system.index = prefix_index.build(codes, model.codebook_sizes)
  return [*checks._about_answers(system)]


@pytest.mark.parametrize(
  ("model", "settings"),
  [
    (free_lazy, {"constrained": False, "group": 192}),
    (free_lazy, {"constrained": False, "group": 500, "search": "sample"}),
    (free_lazy, {"group": 40}),
    (sessions, {}),
  ],
)
def test_answers_that_can_be_given_are_asked_for(model, settings):
  assert refused(model, **settings) == []


@pytest.mark.parametrize(
  ("model", "settings", "told"),
  [
    (free_lazy, {"constrained": False, "group": 193}, "192 tuples of codes"),
    (free_lazy, {"group": 193}, "semantic IDs"),
    (tiny.lazy_decoder(), {"constrained": False}, "softmax over all codes"),
    (sessions, {"search": "sample"}, "draws items, not sessions"),
    (sessions, {"constrained": False}, "sessions are made of items"),
  ],
)
def test_others_are_refused(model, settings, told):
  (found,) = refused(model, **settings)
  assert told in found


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory):
  """Work directories of a start, with and without dislikes."""
  found = {}
  for name in ("like", "dislike"):
    folder = found[name] = tmp_path_factory.mktemp(name)
    columns = ["user_id,item_id,timestamp_ms,play_time_ms,like"]
    rows = [
      f"u{user},i{event},{10**12 + event},{1000 * event},{event % 2}"
      for user in range(3)
      for event in range(6)
    ]
    if name == "dislike":
      columns.append("dislike")
      rows = [f"{row},{event % 3 // 2}" for event, row in enumerate(rows)]
    text = "\n".join([",".join(columns), *rows]) + "\n"
    (folder / "events.csv").write_text(text)
    c = config_lib.Config()
    c.prepare.dataset = "tables"
    c.prepare.events = str(folder / "events.csv")
    prepare.prepare(c.prepare, folder)
    write_run(folder, "start", {})
    write_run(folder, "of_positives", {"pipeline.imitate": "positive"})
  return found


def write_run(folder, name, changes):
  """What a run says of itself; it has no parameters."""
  config = sweep.changed(config_lib.Config(name=name), changes)
  prepared = shards.PreparedData.open(folder / "prepared")
  record = {
    "config": config_lib.to_dict(config),
    "prepared": prepared.manifest["fingerprint"],
    "semantic_ids": "ids",
  }
  files.write_json(folder / "models" / name / "config.json", record)


def check(folder, **settings):
  """An alignment of beams, or with `objective=""` of none."""
  system = mock.Mock(spec=assemble.System)
  values = {
    "start": "start",
    "objective": "ecpo",
    "rewards": ("tests.alignment.judges:low_ids",),
  }
  if settings.get("objective") == "":
    values["rewards"] = ()
  values |= settings
  system.config = sweep.changed(
    config_lib.Config(name="aligned"),
    {
      name if "." in name else f"alignment.{name}": value
      for name, value in ({"pipeline.labels": True} | values).items()
    },
  )
  system.model = free_lazy
  codes = np.asarray(tiny.catalogue().codes)
  system.index = prefix_index.build(codes, free_lazy.codebook_sizes)
  system.prepared = shards.PreparedData.open(folder / "prepared")
  system.semantic_ids = mock.Mock(spec=SemanticIds, fingerprint="ids")
  checks.check(system, folder)


FEEDBACK = {"objective": "", "feedback": "like"}


@pytest.mark.parametrize(
  "settings",
  [
    {},
    {"weight": 0.0, "format_weight": 0.0, "likelihood": 0.0, "margin": -1.0},
    {"rewards": ("tests.alignment.judges:low_ids=-0.5",)},
    {"search": "sample", "temperature": 2.0},
    FEEDBACK | {"feedback_weight": 0.0},
    FEEDBACK | {"feedback": "play_time"},
    FEEDBACK | {"feedback": "positive"},
    FEEDBACK | {"feedback_loss": "pairs"},
    {"feedback": "like"},
  ],
)
def test_what_can_be_aligned_is_not_refused(workdirs, settings, capsys):
  check(workdirs["dislike"], **settings)
  assert not capsys.readouterr().out


@pytest.mark.parametrize(
  ("settings", "told"),
  [
    ({"weight": np.nan}, "weight=nan must be"),
    ({"weight": -1.0}, "weight=-1.0 must be"),
    ({"weight": np.inf}, "weight=inf must be"),
    ({"format_weight": np.nan}, "format_weight=nan must be"),
    ({"feedback_weight": -1.0}, "feedback_weight=-1.0 must be"),
    ({"likelihood": -1.0}, "likelihood=-1.0 must be"),
    ({"margin": np.nan}, "margin=nan must be finite"),
    ({"rewards": ("",)}, "rewards: '': names no reward"),
    ({"rewards": ("p_score=nan",)}, "rewards: 'p_score=nan': the weight nan"),
    ({"temperature": 2.0}, r"temperature=2\.0 .*search=sample"),
    (FEEDBACK | {"rewards": ("x",)}, r"rewards=\('x',\) .*objective"),
    (FEEDBACK | {"suppressed": "x=y"}, "suppressed='x=y' .*objective"),
    (FEEDBACK | {"format_samples": 5}, "format_samples=5 .*objective"),
    (
      FEEDBACK | {"feedback_loss": "pairs", "logged_policy": True},
      "logged_policy=True .*feedback_loss=gbpo",
    ),
    (FEEDBACK | {"feedback": "play_quantile"}, "no flag: set 'duration'"),
    (FEEDBACK | {"feedback": "play_time_ms"}, "no flag: set 'play_time'"),
    (FEEDBACK | {"feedback": "log_probability"}, "says nothing .*'duration'"),
    (
      FEEDBACK
      | {"feedback": "weight", "pipeline.imitate": "positive"}
      | {"start": "of_positives"},
      "says nothing .*'play_time'",
    ),
    (
      FEEDBACK | {"feedback": "duration"},
      r"\['play_quantile'\].*events' play_time_ms and items' duration_ms",
    ),
    (FEEDBACK | {"feedback": "follow"}, "follow is a column of the events"),
    (FEEDBACK | {"feedback": "hate"}, "hate is no flag; .*dislike.*stage_…"),
    (
      FEEDBACK | {"logged_policy": True},
      "log_probability is a column of the events",
    ),
  ],
)
def test_what_says_nothing_or_is_not_read_is_refused(workdirs, settings, told):
  with pytest.raises(ValueError, match=told):
    check(workdirs["dislike"], **settings)


def test_feedback_without_dislikes_is_told(workdirs, capsys):
  """The same with them is silent, see above; pairs cannot do without."""
  check(workdirs["like"], **FEEDBACK)
  out = capsys.readouterr().out
  assert out.startswith("aligned: the events have no column dislike")
  assert out.count("\n") == 1
  check(workdirs["like"])  # no feedback
  assert not capsys.readouterr().out
  with pytest.raises(ValueError, match="dislike is a column of the events"):
    check(workdirs["like"], **FEEDBACK, feedback_loss="pairs")


def test_a_reward_model_of_other_compressed_histories_is_refused(workdirs):
  """Before its parameters are read: it has none here."""
  folder = workdirs["like"]
  reads = {"pipeline.pathways.lifelong": 8}
  for name, changes in (("same", {}), ("other", {"lifelong.every": 7})):
    write_run(folder, name, reads | changes)
  settings = {"rewards": ("same/click=1", "same=2"), **reads}
  check(folder, **settings)
  with pytest.raises(ValueError, match="other was trained on other compressed"):
    check(folder, **settings | {"rewards": ("same", "other/click=1")})
  with pytest.raises(FileNotFoundError, match="no run 'nobody'"):
    check(folder, **settings | {"rewards": ("nobody",)})
