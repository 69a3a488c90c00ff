"""The alignment experiments as they stand: their configs fit each other."""

import pytest

from experiments.kuairand import feedback as kuairand
from experiments.kuairand import p_score as kuairand_p_score
from experiments.movielens import feedback as movielens
from experiments.movielens import p_score as movielens_p_score
from experiments.simulator import ecpo, evidence, gbpo, ipa, sft
from experiments.tables import lazy_decoder, p_score
from onerec_jax.alignment import checks, objectives, rewards
from onerec_jax.scaling import sweep

IPA = (*ipa.VARIANTS, *sorted(objectives.PAIRS))
ALIGNED = [
  *((ipa, arg) for arg in IPA),
  *((ecpo, arg) for arg in ecpo.VARIANTS),
  *((gbpo, arg) for arg in gbpo.VARIANTS),
]


def renewals(config):
  """How often a run's sampler becomes the policy anew, the start left out."""
  return (config.training.num_steps - 1) // config.alignment.sync_every


@pytest.mark.parametrize(
  ("module", "arg"), ALIGNED, ids=lambda x: getattr(x, "__name__", x)
)
def test_an_alignment_asks_for_what_its_start_and_judges_are(module, arg):
  config = module.get_config(arg)
  settings = config.alignment
  starts = {f"sft_{name}": sft.get_config(name) for name in sft.VARIANTS}
  start = starts[settings.start]
  assert config.model == start.model
  assert config.prepare == start.prepare
  assert config.tokenizer == start.tokenizer
  assert config.name not in starts
  assert set(rewards.runs_of(settings.rewards)) <= {"p_score", "session_reward"}
  assert bool(settings.objective) == bool(settings.rewards)
  assert settings.constrained or not config.model.constrained_softmax
  assert settings.format_samples <= settings.group
  assert not list(checks._about_numbers(settings))
  assert not list(checks._about_unread(settings))
  assert not list(checks._about_requests(config))
  assert not list(checks._about_rewards(settings))


@pytest.mark.parametrize(
  ("judge", "start", "objectives"),
  [
    (
      p_score.get_config("like,click"),
      lazy_decoder.get_config(),
      ("like", "click"),
    ),
    (kuairand_p_score.get_config(), kuairand.get_config("ecpo"), ("like",)),
    (movielens_p_score.get_config(), movielens.get_config("ecpo"), ("like",)),
  ],
  ids=["tables", "kuairand", "movielens"],
)
def test_a_judge_reads_what_is_judged(judge, start, objectives):
  assert judge.model.objectives == objectives
  for part in ("prepare", "tokenizer", "mesh"):
    assert getattr(judge, part) == getattr(start, part)
  for field in ("pathways", "max_history"):
    assert getattr(judge.pipeline, field) == getattr(start.pipeline, field)
  assert judge.pipeline.labels
  assert judge.pipeline.imitate == "all"


@pytest.mark.parametrize(
  ("module", "arg"),
  [(of, arg) for of in (kuairand, movielens) for arg in of._ALIGNED],
)
def test_learning_from_real_feedback_fits_its_start(module, arg):
  config, start = module.get_config(arg), module.get_config("sft")
  assert config.alignment.start == start.name
  for part in ("model", "prepare", "tokenizer", "pipeline"):
    assert getattr(config, part) == getattr(start, part)
  assert not list(checks._about_numbers(config.alignment))
  assert not list(checks._about_unread(config.alignment))
  assert not list(checks._about_requests(config))
  assert not list(checks._about_rewards(config.alignment))
  with pytest.raises(ValueError, match="argument 'nothing': want sft or one"):
    module.get_config("nothing")


def test_the_p_score_makes_ipas_pairs_but_where_said():
  found = {arg: ipa.get_config(arg) for arg in IPA}
  judges = {a: rewards.runs_of(c.alignment.rewards) for a, c in found.items()}
  assert judges.pop("session_reward") == ["session_reward"]
  assert {tuple(names) for names in judges.values()} == {("p_score",)}
  changes = {"name": "x", "alignment.rewards": ()}
  own, dpo = (
    sweep.changed(found[arg], changes) for arg in ("session_reward", "dpo")
  )
  assert own == dpo


def test_in_the_ratio_study_a_pair_counts_as_much_whatever_their_share():
  found = evidence.get_sweep("ratio")
  assert found.pop("ratio_0").alignment.weight == 0
  shares, each = set(), set()
  for name, config in found.items():
    a = config.alignment
    shares.add((*rewards.runs_of(a.rewards), a.requests))
    each.add(round(a.weight / a.requests, 9))
    assert ("_reward_" in name) == (a.rewards == ("session_reward=1",))
  judges = "p_score", "session_reward"
  assert shares == {(judge, n) for judge in judges for n in (1, 5, 20)}
  assert len(each) == 1


def test_in_the_long_study_ipa_alone_is_renewed():
  found = evidence.get_sweep("long")
  assert found["long_0"].alignment.weight == 0
  for name, config in found.items():
    assert config.training.num_steps == 900
    assert renewals(config) == (8 if name in ("long_0", "long_ipa") else 0)
  assert found["long_dpo"].alignment.objective == "dpo"


@pytest.mark.parametrize("arg", IPA)
def test_ipa_renews_its_sampler(arg):
  """Iterations are what its name is about; `once` is without them."""
  found = renewals(ipa.get_config(arg))
  assert found == 0 if arg == "once" else found >= 2


@pytest.mark.parametrize("module", [ecpo, gbpo, ipa, sft])
def test_an_unknown_argument_is_refused(module):
  with pytest.raises(ValueError, match="'nothing': want"):
    module.get_config("nothing")


@pytest.mark.parametrize("arg", sft.VARIANTS)
def test_starts_differ_in_what_they_are_named_after(arg):
  config = sft.get_config(arg)
  assert config.name == f"sft_{arg}"
  assert not config.alignment.start
  if arg == "rsft":
    item = sft.get_config("item")
    assert config.pipeline.imitate == "rsft"
    config.name, config.pipeline.imitate = item.name, item.pipeline.imitate
    assert config == item


def test_the_catalogue_study_is_of_one_world_and_one_model():
  """Its starts have the names of those of `items`, which are of another."""
  runs = evidence.get_sweep("catalogue")
  judge, start = runs.pop("p_score"), runs["sft_item"]
  assert start.prepare.simulation.num_items == 20_000
  for config in (judge, *runs.values()):
    assert config.prepare == start.prepare
    assert config.tokenizer == start.tokenizer
  for config in runs.values():
    assert config.model == start.model
    assert config.alignment.start in ("", "sft_item")


@pytest.mark.parametrize("study", evidence._STUDIES)
def test_studies_start_from_runs_of_their_own_seed(study):
  """And are judged by such: of the studies that come first, or before it."""
  known = {
    name
    for first in ("items", "sessions")
    for name in evidence.get_sweep(f"{first}:2")
  }
  for name, config in evidence.get_sweep(f"{study}:2").items():
    suffix = "_s1" if name.endswith("_s1") else ""
    assert config.training.seed == bool(suffix)
    known.add(name)
    if not config.alignment.start:
      continue
    needed = [
      config.alignment.start, *rewards.runs_of(config.alignment.rewards)
    ]  # fmt: skip
    assert set(needed) <= known - {name}
    assert all(run.endswith("_s1") == bool(suffix) for run in needed)
