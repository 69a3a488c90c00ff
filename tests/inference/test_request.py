"""What may be asked, before any model is."""

import numpy as np
import pyarrow as pa
import pytest

from onerec_jax.data import columns
from onerec_jax.inference import request
from onerec_jax.inference.request import Request


@pytest.mark.parametrize("name", ["history", "allowed"])
@pytest.mark.parametrize("text", ["12", b"12"])
def test_a_text_is_not_a_list_of_its_letters(name, text):
  with pytest.raises(ValueError, match=f"{name}=.*give a list"):
    Request(**{name: text})


@pytest.mark.parametrize(
  "value",
  [7, "7", 7.0, np.float32(7), -3.0, "7.0", 7.5, 2.0**62, 2.0**70, np.int64(7)],
)
def test_ids_are_spelt_as_a_column_of_them(value):
  """Data frames make floats of integers where one is missing."""
  column = columns.convert(pa.array([value]), columns.Column("id"), "item_id")
  assert request.raw_id(value) == column[0][0].as_py()


@pytest.mark.parametrize(
  ("asked", "near"),
  [("age_bnd", "age_band"), ("Age_Band", "age_band"), ("city", "City")],
)
def test_a_users_column_that_is_misspelt_is_refused(asked, near):
  one = Request(history=["i"], user_columns={near: "20", asked: "20"})
  told = f"request 1: unknown user column '{asked}'; call it '{near}'"
  with pytest.raises(ValueError, match=told):
    request.check([Request(), one], (), ("age_band", "City"))


def test_users_columns_of_ones_own_are_not_refused():
  own = {"age_band": 1, "Age_band": 2, "shoe": 3}
  known = ("age_band", "Age_band", "size")
  request.check([Request(user="u", user_columns=own)], (), known)
  # Of these and one that is misspelt, it alone is named.
  with pytest.raises(ValueError, match="unknown user column 'sizes'"):
    request.check([Request(user_columns=own | {"sizes": 4})], (), known)


def test_a_request_is_called_by_its_label():
  odd = Request([], user_columns={"citty": 1}, label="users.csv, row 3")
  with pytest.raises(ValueError, match="^users.csv, row 3: unknown user"):
    request.check([odd], (), ("city",))


def test_times_are_milliseconds_of_any_datetime():
  times = np.asarray(["2024-01-01", "2024-01-02"], "datetime64[D]")
  found = request.milliseconds(times, "request 0")
  assert found.tolist() == [1_704_067_200_000, 1_704_153_600_000]


def test_times_out_of_order_are_refused():
  with pytest.raises(
    ValueError, match="request 3.*earlier than the one before"
  ):
    request.milliseconds([1_700_000_000_000, 1_600_000_000_000], "request 3")


@pytest.mark.parametrize(
  ("unit", "scale"), [("seconds", 1), ("microseconds", 10**6)]
)
def test_other_units_are_told_and_read_as_they_are_given(unit, scale):
  times = [1_700_000_000 * scale, 1_700_003_600 * scale]
  with pytest.warns(UserWarning, match=f"request 3.*look like {unit}"):
    found = request.milliseconds(times, "request 3")
  assert found.tolist() == times
