"""Runs of random weights, and recommenders that serve them."""

import pytest

from onerec_jax.inference.recommender import Recommender
from tests.inference import random_runs


@pytest.fixture(scope="session")
def workdir(tmp_path_factory):
  folder = tmp_path_factory.mktemp("recommender")
  random_runs.write(folder)
  return folder


@pytest.fixture(scope="session")
def recommenders(workdir):
  return {
    name: Recommender.load(workdir, name, batch_size=8)
    for name in ("lazy_decoder", "sasrec")
  }
