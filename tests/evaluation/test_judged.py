"""Runs judged by reward models, against the judges asked request by request."""

import copy
import dataclasses

import jax
import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax import files, model_configs, semantic_ids
from onerec_jax.data import prepare, shards, splits
from onerec_jax.data import rows as rows_lib
from onerec_jax.evaluation import bootstrap, held_out, judged, preference
from onerec_jax.inference import assemble
from tests import tiny

pytestmark = pytest.mark.usefixtures("one_device")

USERS, ITEMS, M, W = 10, 24, 2, 3
SIZES = {
  "d_model": 16, "num_heads": 2, "d_ff": 16, "sid_embed_dim": 4,
  "feature_embed_dim": 4,
}  # fmt: skip
REWARD = {"num_layers": 1, "dropout": 0.0, **SIZES}
OBJECTIVES = ("click", "like")
MODELS = {
  "sasrec": model_configs.SASRecConfig(
    d_model=16, num_heads=2, d_ff=16, num_layers=1
  ),
  "session": model_configs.SessionDecoderConfig(
    session_items=M, encoder_layers=1, decoder_layers=1,
    moe=model_configs.MoEConfig(), **SIZES,
  ),
  "by_session": model_configs.SessionRewardConfig(session_size=M, **REWARD),
  "by_item": model_configs.PScoreConfig(objectives=OBJECTIVES, **REWARD),
}  # fmt: skip
PATHWAYS = config_lib.PathwaysConfig(short=3, positive=4)


def write_log(folder):
  """Requests of one to three items; later ones are of two or three."""
  rng = np.random.default_rng(0)
  lines = ["user_id,item_id,timestamp_ms,request_id,click,like"]
  for user in range(USERS):
    for request in range(6):
      for slot in range(rng.integers(1 + (request > 2), 4)):
        time = 10**12 + request * 1_000_000 + user * 1_000 + slot
        flags = ",".join(str(x).lower() for x in rng.random(2) < 0.5)
        item = rng.integers(ITEMS // 2 if user % 2 else ITEMS)
        lines.append(f"u{user},i{item},{time},r{request},{flags}")
  (folder / "events.csv").write_text("\n".join(lines) + "\n")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
  """Name → system and random parameters; nothing is trained.

  The judges read longer histories than sasrec does, and pathways.
  """
  folder = tmp_path_factory.mktemp("judged")
  write_log(folder)
  c = config_lib.Config(name="data")
  c.prepare.dataset, c.prepare.events = "tables", str(folder / "events.csv")
  c.prepare.split = "time"
  c.prepare.validation_from_ms = 10**12 + 4_000_000
  c.prepare.test_from_ms = 10**12 + 5_000_000
  c.evaluation.batch_size, c.evaluation.beam_width = 8, 6
  data = shards.PreparedData.open(prepare.prepare(c.prepare, folder / "work"))
  numbers = np.arange(-1, data.num_items).clip(0)
  codes = np.stack(np.divmod(numbers, 5), axis=1).astype(np.int32)
  coded = semantic_ids.SemanticIds(codes, (5, 5), [], "by number", {})
  found = {}
  for seed, (name, model) in enumerate(MODELS.items()):
    config = copy.deepcopy(c)
    config.name, config.model = name, model
    config.pipeline.max_history = 3 if name == "sasrec" else 7
    if name == "by_session":
      config.pipeline.pathways = PATHWAYS
    sids = None if name == "sasrec" else coded
    found[name] = tiny.with_params(assemble.assemble(config, data, sids), seed)
  found["again"] = tiny.with_params(found["sasrec"][0], 9)
  return found


def ways(runs, patch):
  """judged.load of a judge's name; of_run of a judge and a run's name."""
  patch.setattr(assemble, "load", lambda _, name, mesh: runs[name])
  judge = lambda name: judged.load("", name, "test", progress=False)
  of_run = lambda judge, name, width=W: judged.of_run(
    judge, "", name, width, progress=False
  )
  return judge, of_run


@pytest.fixture
def load(runs, monkeypatch):
  return ways(runs, monkeypatch)


@pytest.fixture(scope="module")
def by_session(runs):
  """The judge of sessions, and what it makes of each run."""
  with pytest.MonkeyPatch.context() as patch:
    judge, of_run = ways(runs, patch)
    judge = judge("by_session")
    found = {n: of_run(judge, n) for n in ("session", "sasrec", "again")}
  return judge, found


def history(system, requests, row):
  record = system.prepared.user(int(requests.user[row]) - 1)
  return rows_lib.before(system.prepared, record, int(requests.first[row]))


def asked(runs, name):
  """(request, answers) → head → probabilities, by hand; σ in numpy."""
  system, params = runs[name]
  scores = jax.jit(
    lambda *given: system.model.apply(
      {"params": params}, *given, method="scores"
    )
  )

  def ask(requests, row, answers):
    batch = tiny.asking(system, [history(system, requests, row)])
    answers = np.asarray(answers, np.int32)[None]
    found = scores(batch, system.catalogue, answers)
    of = lambda logit: 1 / (1 + np.exp(-np.asarray(logit, np.float64)[0]))
    return {head: of(logit) for head, logit in found.items()}

  return ask


def allowed(system, requests, row):
  seen = history(system, requests, row).items
  known = np.flatnonzero(system.prepared.item_counts)
  return np.setdiff1d(known, [0, *seen])


WEIGHTS = {"swt": 1.0, "vtr": 0.5, "wtr": 0.5, "ltr": 1.0}


def test_sessions_by_a_session_reward(runs, by_session):
  judge, found = by_session
  requests = held_out.requests(judge.system.prepared, splits.TEST, M)
  assert len(requests) == len(judge.requests) == USERS
  whole, alone = found["session"], found["sasrec"]
  assert whole.sessions.shape == (USERS, W, M)
  assert alone.sessions.shape == (USERS, 1, M)
  assert set(whole.values) == {*WEIGHTS, "value"}
  ask, columns = asked(runs, "by_session"), whole.columns()
  for row in range(USERS):
    shown = whole.sessions[row]
    assert len({tuple(s) for s in shown.tolist()}) == W
    assert np.isin(shown, allowed(judge.system, requests, row)).all()
    logged = [requests.items[row][:M]]
    every = np.concatenate([shown, alone.sessions[row], logged])
    by_hand = ask(requests, row, every)
    by_hand["value"] = sum(w * by_hand[n] for n, w in WEIGHTS.items())
    for figure, value in by_hand.items():
      of = columns[f"{figure}_mean"][row], columns[f"{figure}_max"][row]
      expected = value[:W].mean(), value[:W].max()
      assert of == pytest.approx(expected, rel=1e-5)
      assert alone.values[figure][row] == pytest.approx(value[W], rel=1e-5)
      for name in ("mean", "max"):
        got = judge.log[f"{figure}_{name}"][row]
        assert got == pytest.approx(value[-1], rel=1e-5)


def test_a_point_wise_run_answers_with_its_best_items(runs, by_session):
  """Whatever it reads itself: three events, and the judge pathways."""
  judge, found = by_session
  system, params = runs["sasrec"]
  scores = jax.jit(
    lambda *given: system.model.apply(
      {"params": params}, *given, method="item_scores"
    )
  )
  for row in range(USERS):
    batch = tiny.asking(system, [history(system, judge.requests, row)])
    every = np.asarray(scores(batch, system.catalogue))[0, 0]
    may = allowed(system, judge.requests, row)
    best = may[np.argsort(-every[may], kind="stable")][:M]
    np.testing.assert_array_equal(found["sasrec"].sessions[row, 0], best)


def test_items_by_a_p_score(runs, by_session, load, monkeypatch):
  judge, of_run = load
  judge = judge("by_item")
  requests = judge.requests
  items = of_run(judge, "sasrec", 4)
  # The search of sessions is known already.
  sessions = by_session[1]["session"].sessions
  monkeypatch.setattr(preference, "ask", lambda *_: sessions)
  whole = of_run(judge, "session")
  assert items.sessions.shape == (USERS, 4, 1)
  assert whole.sessions.shape == (USERS, W, M)
  # One head is all of its value.
  assert set(items.values) == {*OBJECTIVES, "p"}
  assert {len(shown) for shown in requests.items} == {2, 3}
  ask = asked(runs, "by_item")
  for row in range(USERS):
    logged = np.zeros(3, np.int32)
    logged[: len(requests.items[row])] = requests.items[row]
    every = items.sessions[row].ravel(), sessions[row].ravel(), logged
    by_hand = ask(requests, row, np.concatenate(every))
    for head, value in by_hand.items():
      of_items, of_sessions, of_log = np.split(value, [4, 4 + W * M])
      got = items.values[head][row], whole.values[head][row]
      np.testing.assert_allclose(got[0], of_items, rtol=1e-5)
      mean = of_sessions.reshape(W, M).mean(axis=1)
      np.testing.assert_allclose(got[1], mean, rtol=1e-5)
      of_log = of_log[logged > 0]
      got = judge.log[f"{head}_mean"][row], judge.log[f"{head}_max"][row]
      assert got == pytest.approx((of_log.mean(), of_log.max()), rel=1e-5)


def test_seeds_are_joined_and_paired(by_session):
  judge, found = by_session
  base, *seeds = found.values()
  rows = preference.compare([[base], seeds])
  by = {(row["model"], row["figure"]): row for row in rows}
  own = [s.values["value"][:, 0].astype(np.float64) for s in seeds]
  row, column = by[1, "value_mean"], base.values["value"].mean(axis=1)
  assert row["mean"] == pytest.approx(np.mean(own))
  assert row["std"] == pytest.approx(np.std([s.mean() for s in own], ddof=1))
  paired = (own[0] + own[1]) / 2 - column
  (expected,) = bootstrap.intervals(paired[:, None], base.user)
  expected = dataclasses.asdict(expected)
  expected["difference"] = expected.pop("mean")
  assert {n: row[n] for n in expected} == pytest.approx(expected, rel=1e-4)
  assert row["logged"] == pytest.approx(judge.log["value_mean"].mean())
  assert "oracle" not in row
  # The best of three sessions is not the best of one.
  assert "difference" not in by[1, "value_max"]
  preference.print_table(rows, "judged by by_session")


def test_what_cannot_be_judged_is_refused(runs, load, monkeypatch):
  judge, of_run = load
  with pytest.raises(ValueError, match="sasrec is a sasrec.*p_score"):
    judge("sasrec")
  by_item = judge("by_item")
  with pytest.raises(ValueError, match=r"other answers .* empty slot.*answers"):
    judged.measure(by_item, "other", np.zeros((USERS, 1, 1), np.int32), False)
  longer = copy.deepcopy(runs["by_session"][0])
  longer = dataclasses.replace(
    by_item, system=dataclasses.replace(
      longer, model=longer.model.clone(session_size=3)
    ),
  )  # fmt: skip
  with pytest.raises(ValueError, match="session answers with sessions of 2"):
    of_run(longer, "session")
  system = copy.copy(by_item.system)
  prepared = copy.copy(system.prepared)
  prepared.manifest = prepared.manifest | {"fingerprint": "other"}
  monkeypatch.setitem(
    runs, "sasrec", (dataclasses.replace(system, prepared=prepared), None)
  )
  with pytest.raises(ValueError, match="sasrec was trained on the data other"):
    of_run(by_item, "sasrec")


def test_a_run_that_its_judge_taught_is_known(tmp_path):
  made = {
    "sft": (), "p_score": (), "ecpo": ("sft", "p_score"), "gbpo": ("ecpo",),
  }  # fmt: skip
  for name, others in made.items():
    record = {"made_from": dict.fromkeys(others, "1")} if others else {}
    files.write_json(tmp_path / "models" / name / "config.json", record)
  of = lambda *names: judged.was_made_from(tmp_path, *names)
  assert of("ecpo", "p_score")
  assert of("gbpo", "p_score"), "by way of its start"
  assert of("p_score", "p_score")
  assert not of("gbpo", "p_score_s1")
  assert not of("sft", "p_score")
