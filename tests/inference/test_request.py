"""What may be asked, before any model is."""

import numpy as np
import pytest

from onerec_jax.inference import request
from onerec_jax.inference.request import Request


@pytest.mark.parametrize("name", ["history", "allowed"])
@pytest.mark.parametrize("text", ["12", b"12"])
def test_a_text_is_not_a_list_of_its_letters(name, text):
  with pytest.raises(ValueError, match=f"{name}=.*give a list"):
    Request(**{name: text})


@pytest.mark.parametrize(
  ("value", "spelt"),
  [
    (7, "7"), ("7", "7"), (7.0, "7"), (np.float32(7), "7"), (-3.0, "-3"),
    ("7.0", "7.0"), (7.5, "7.5"), (2.0**70, str(2**70)), (np.int64(7), "7"),
  ],
)  # fmt: skip
def test_whole_floats_are_the_ids_they_were(value, spelt):
  """Data frames make floats of integers where one is missing."""
  assert request.raw_id(value) == spelt


def test_times_are_milliseconds_of_any_datetime():
  times = np.asarray(["2024-01-01", "2024-01-02"], "datetime64[D]")
  found = request.milliseconds(times, "request 0")
  assert found.tolist() == [1_704_067_200_000, 1_704_153_600_000]


def test_times_out_of_order_are_refused():
  with pytest.raises(
    ValueError, match="request 3.*earlier than the one before"
  ):
    request.milliseconds([1_700_000_000_000, 1_600_000_000_000], "request 3")


def test_seconds_are_told_and_read_as_they_are_given():
  with pytest.warns(UserWarning, match="request 3.*look like seconds"):
    found = request.milliseconds([1_700_000_000, 1_700_003_600], "request 3")
  assert found.tolist() == [1_700_000_000, 1_700_003_600]
