"""What is refused of answers, by the models that are asked."""

from unittest import mock

import numpy as np
import pytest

from onerec_jax import config as config_lib
from onerec_jax.alignment import checks
from onerec_jax.alignment_config import AlignmentConfig
from onerec_jax.inference import assemble, prefix_index
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
