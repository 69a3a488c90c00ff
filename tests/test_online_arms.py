"""Arms of a test whose runs are of one world."""

import copy

import pytest

from onerec_jax import config as config_lib
from onerec_jax import files, online_arms
from onerec_jax.inference import assemble
from tests.test_online import CONFIGS


def test_the_world_is_the_runs_own(tmp_path):
  """Not that of the run that was trained last."""

  def write(name, **changes):
    c = copy.deepcopy(CONFIGS[0])
    for field, value in changes.items():
      setattr(c.prepare.simulation, field, value)
    run_directory = assemble.run_directory(tmp_path, name)
    run_directory.mkdir(parents=True)
    record = {"config": config_lib.to_dict(c)}
    files.write_json(run_directory / "config.json", record)
    files.write_json(run_directory / "best.json", {})

  write("one", seed=1)
  write("like_one", seed=1)
  write("other", seed=2)
  world_of = lambda *arms: online_arms.world_of(tmp_path, arms).seed
  assert world_of("one", "like_one") == world_of("logging", "one/like_one") == 1
  assert world_of("other", "oracle") == world_of("uniform", "oracle") == 2
  with pytest.raises(ValueError, match="one and other .* different worlds"):
    world_of("one", "other")
  with pytest.raises(ValueError, match="one and other .* different worlds"):
    world_of("logging", "one/other")
  with pytest.raises(FileNotFoundError, match="no run 'none'"):
    world_of("none", "one")
