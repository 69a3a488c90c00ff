"""The config tree: round trips, names of what is wrong, flags, experiments."""

import dataclasses
import pathlib
import sys

import pytest
from absl import flags
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import config_flags

from onerec_jax import config as config_lib
from onerec_jax import files, model_configs

ROOT = pathlib.Path(__file__).resolve().parents[1]
EXPERIMENTS = sorted(
  path.relative_to(ROOT).as_posix()
  for path in (ROOT / "experiments").glob("*/*.py")
  if "def get_config(" in path.read_text()
)
SYSTEMS = [
  model_configs.LazyDecoderConfig,
  model_configs.EncoderDecoderConfig,
  model_configs.SessionDecoderConfig,
  model_configs.DecoderOnlyConfig,
  model_configs.SASRecConfig,
]
_STRATEGIES = {
  bool: st.booleans(),
  int: st.integers(-(2**53), 2**53),
  float: st.floats(allow_nan=False, allow_infinity=False),
  str: st.text(max_size=8),
}
_NUMBERS, _NAMES = (
  st.lists(element, min_size=1, max_size=4).map(tuple)
  for element in (_STRATEGIES[int], _STRATEGIES[str])
)


def values_like(value):
  """Values of a field's type, as its default shows it."""
  if not isinstance(value, tuple):
    return _STRATEGIES[type(value)]
  return _NUMBERS if value and isinstance(value[0], int) else _NAMES


def leaves(config, path=()):
  """(path, value) of every field that is no section."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      yield from leaves(value, (*path, field.name))
    else:
      yield (*path, field.name), value


def put(config, path, value):
  for name in path[:-1]:
    config = getattr(config, name)
  setattr(config, path[-1], value)


@st.composite
def overridden(draw):
  """A config with any fields changed to values of their types."""
  config = config_lib.Config(model=draw(st.sampled_from(SYSTEMS))())
  fields = [x for x in leaves(config) if x[0] != ("model", "system")]
  for path, value in draw(
    st.lists(st.sampled_from(fields), max_size=6, unique_by=lambda x: x[0])
  ):
    put(config, path, draw(values_like(value)))
  return config


@settings(deadline=None)
@given(overridden())
def test_a_config_survives_its_dict(config):
  values = config_lib.to_dict(config)
  assert config_lib.from_dict(values) == config
  assert config_lib.to_dict(config_lib.from_dict(values)) == values


@settings(deadline=None)
@given(overridden(), overridden())
def test_fingerprints_differ_exactly_where_values_do(one, other):
  same = list(leaves(one)) == list(leaves(other))
  prints = config_lib.fingerprint(one), config_lib.fingerprint(other)
  assert (prints[0] == prints[1]) == same


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_field_counts_in_the_fingerprint(system):
  plain = config_lib.Config(model=system())
  for path, value in leaves(plain):
    config = config_lib.Config(model=system())
    more = {bool: lambda x: not x, tuple: lambda x: (*x, 1)}
    change = more.get(type(value), lambda x: x + type(x)("1"))
    put(config, path, change(value))
    assert config_lib.fingerprint(config) != config_lib.fingerprint(plain), path


@pytest.mark.parametrize(
  ("values", "match"),
  [
    ({"nmae": "x"}, r"\['nmae'\] in config$"),
    ({"training": {"sed": 1}}, r"\['sed'\] in config\.training"),
    (
      {"prepare": {"simulation": {"nope": 1}}},
      r"\['nope'\] in config\.prepare\.simulation",
    ),
    (
      {"model": {"system": "sasrec", "kv_layers": 1}},
      r"\['kv_layers'\] in config\.model",
    ),
    (
      {"model": {"system": "bert"}},
      "'bert'.*decoder_only.*encoder_decoder.*lazy_decoder.*sasrec",
    ),
    ({"model": {"num_layers": 2}}, "unknown system None"),
  ],
)
def test_unknown_fields_and_systems_are_named(values, match):
  with pytest.raises(ValueError, match=match):
    config_lib.from_dict(values)


def test_whole_numbers_in_float_fields_are_floats():
  one, other = config_lib.Config(), config_lib.Config()
  one.training.num_epochs, other.training.num_epochs = 8, 8.0
  assert config_lib.fingerprint(one) == config_lib.fingerprint(other)
  found = config_lib.from_dict({"training": {"num_epochs": 8}})
  assert isinstance(found.training.num_epochs, float)


def test_fields_left_out_keep_their_defaults():
  config = config_lib.from_dict({"training": {"seed": 7}})
  expected = config_lib.Config()
  expected.training.seed = 7
  assert config == expected


@pytest.mark.parametrize("system", SYSTEMS[:-1])
def test_experts_survive_a_dict(system):
  moe = model_configs.MoEConfig(
    num_experts=53, experts_per_token=3, shared_experts=1, d_ff=96,
    dense_layers=2, every=2, router="softmax", balance_rate=0.5,
  )  # fmt: skip
  config = config_lib.Config(model=system(moe=moe))
  values = config_lib.to_dict(config)
  assert values["model"]["moe"] == dataclasses.asdict(moe)
  found = config_lib.from_dict(values)
  assert type(found.model) is system
  assert found.model.moe == moe
  with pytest.raises(ValueError, match=r"'expert'.*config\.model\.moe"):
    config_lib.from_dict(
      {"model": {"system": system.system, "moe": {"expert": 1}}}
    )


def test_a_config_survives_a_file(tmp_path):
  config = config_lib.Config(model=model_configs.SASRecConfig(loss="bce"))
  config.evaluation.cutoffs = (1, 5, 20)
  files.write_json(tmp_path / "c.json", config_lib.to_dict(config))
  found = config_lib.from_dict(files.read_json(tmp_path / "c.json"))
  assert found == config
  assert isinstance(found.evaluation.cutoffs, tuple)


def parse(monkeypatch, *arguments):
  """What a program with --config sees of its command line."""
  # config_flags reads sys.argv to find which fields are overridden.
  monkeypatch.setattr(sys, "argv", ["program", *arguments])
  values = flags.FlagValues()
  holder = config_flags.DEFINE_config_file("config", flag_values=values)
  values(sys.argv)
  return holder.value


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds_and_takes_overrides(monkeypatch, experiment):
  monkeypatch.chdir(ROOT)
  plain = parse(monkeypatch, f"--config={experiment}")
  assert config_lib.from_dict(config_lib.to_dict(plain)) == plain
  # One run a name: an experiment file names its runs after itself.
  assert plain.name.startswith(pathlib.Path(experiment).stem)
  changed = parse(
    monkeypatch,
    f"--config={experiment}",
    "--config.model.d_model=96",
    "--config.training.num_epochs=0.5",
    "--config.evaluation.cutoffs=(1,20)",
    "--config.prepare.where=click = 1",
    "--config.prepare.simulation.num_users=10",
  )
  expected = dict(leaves(plain)) | {
    ("model", "d_model"): 96,
    ("training", "num_epochs"): 0.5,
    ("evaluation", "cutoffs"): (1, 20),
    ("prepare", "where"): "click = 1",
    ("prepare", "simulation", "num_users"): 10,
  }
  assert dict(leaves(changed)) == expected


def test_an_argument_chooses_the_loss(monkeypatch):
  monkeypatch.chdir(ROOT)
  config = parse(monkeypatch, "--config=experiments/movielens/sasrec.py:bce")
  assert (config.name, config.model.loss) == ("sasrec_bce", "bce")


@pytest.mark.parametrize(
  ("override", "match"),
  [
    ("--config.model.num_layer=4", "num_layer"),
    ("--config.modle.num_layers=4", "modle"),
    ("--config.model.num_layers=four", "num_layers.*four|four.*num_layers"),
    ("--config.training.seed=1.5", "seed"),
  ],
)
def test_a_wrong_override_is_refused_by_name(monkeypatch, override, match):
  experiment = f"--config={ROOT}/experiments/tables/lazy_decoder.py"
  with pytest.raises((flags.Error, KeyError), match=match):
    parse(monkeypatch, experiment, override)
