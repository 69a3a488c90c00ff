"""One tiny prepared and tokenized data set for the whole folder."""

import pytest

from onerec_jax import workflow
from tests import worlds


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
  """(config, work directory, system)."""
  folder = tmp_path_factory.mktemp("tiny")
  config = worlds.config(worlds.write_csv(folder / "raw"))
  return config, folder, workflow.assembled(config, folder)
