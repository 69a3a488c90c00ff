"""Points from files, and what of them is refused."""

import json

import numpy as np
import pytest

from onerec_jax.scaling import points

CSV = """architecture,parameters,loss,targets,flops,seed
lazy,1e8,3.5,2e9,1e18,0
naive,1e8,3.4,2e9,3e19,0
lazy,2e8,3.4,4e9,4e18,1
"""


def test_reads_csv_by_architecture(tmp_path):
  path = tmp_path / "runs.csv"
  path.write_text(CSV)
  found = points.read(path)
  assert list(found) == ["lazy", "naive"]
  np.testing.assert_array_equal(found["lazy"].parameters, [1e8, 2e8])
  np.testing.assert_array_equal(found["lazy"].loss, [3.5, 3.4])
  np.testing.assert_array_equal(found["lazy"].tokens, [2e9, 4e9])
  np.testing.assert_array_equal(found["naive"].flops, [3e19])


def test_reads_json_with_the_least_there_can_be(tmp_path):
  path = tmp_path / "runs.json"
  path.write_text(json.dumps([{"parameters": 10, "loss": 2}] * 2))
  found = points.read(path)[points.NO_ARCHITECTURE]
  np.testing.assert_array_equal(found.parameters, [10.0, 10.0])
  assert found.tokens is None
  assert found.flops is None


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ("3.4,4e9", "-3.4,4e9", "row 3, column 'loss'"),
    ("3.4,4e9", "nan,4e9", "row 3, column 'loss'"),
    ("2e8", "many", "row 3, column 'parameters'.*'many'"),
    ("3e19", "", "row 2, column 'flops'"),
    ("parameters", "params", "row 1, column 'parameters'"),
    ("seed", "tokens", "both tokens and targets"),
  ],
)
def test_names_what_it_refuses(tmp_path, old, new, message):
  path = tmp_path / "runs.csv"
  path.write_text(CSV.replace(old, new))
  with pytest.raises(ValueError, match=f"runs.csv.*{message}"):
    points.read(path)


@pytest.mark.parametrize("content", ["[]", '{"loss": 1}', "[1, 2]"])
def test_refuses_a_file_without_points(tmp_path, content):
  path = tmp_path / "runs.json"
  path.write_text(content)
  with pytest.raises(ValueError, match="holds no points"):
    points.read(path)


def test_points_must_have_logarithms():
  with pytest.raises(ValueError, match="point 2: parameters=0"):
    points.Points(np.array([1.0, 0.0]), np.array([1.0, 1.0]))
  with pytest.raises(ValueError, match="point 1: flops=inf"):
    points.Points(np.array([1.0]), np.array([1.0]), flops=np.array([np.inf]))
