"""The papers' tables against matrices written down one by one."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

from onerec_jax.models import registry
from onerec_jax.scaling import conventions, paper_tables, sizes

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXCEPTIONS = {
  ("V1 Table 1: sizes", "0.015B", "all parameters, B"),
  ("V1 Table 1: sizes", "0.121B", "all parameters, B"),
  ("V2 Table 4: grouped-query attention at 1B", "G_kv 2", "keys, M"),
  ("V2 Table 4: grouped-query attention at 1B", "G_kv 1", "keys, M"),
  ("V2 Table 5: sizes", "0.1B", "parameters, B"),
  ("V2 Table 5: sizes", "0.2B", "parameters, B"),
  ("V2 Table 5: sizes", "1B", "parameters, B"),
  ("V2 Table 5: sizes", "2B", "parameters, B"),
}


@pytest.fixture(scope="module")
def rows():
  return {
    (table.title, row.label, row.quantity): row
    for table in paper_tables.all_tables()
    for row in table.rows
  }


def find(rows, table, label, quantity):
  (row,) = [
    row
    for (title, *_), row in rows.items()
    if table in title and (row.label, row.quantity) == (label, quantity)
  ]
  return row


def test_rows_are_within_tolerance_or_named_exceptions(rows):
  assert len(rows) == 8 + 22 + 26 + 14 + 15 + 30  # no two share a name
  found = set()
  for key, row in rows.items():
    far = row.error is not None and abs(row.error) > paper_tables.TOLERANCE
    # A note that is no longer needed must go, too.
    assert far == bool(row.note), (key, row)
    if far:
      found.add(key)
  assert found == EXCEPTIONS


def test_what_the_notes_say(rows):
  for heads, printed in (("2", 13), ("1", 7)):
    keys = find(rows, "V2 Table 4", f"G_kv {heads}", "keys, M")
    assert round(keys.ours) == printed == keys.paper
  for name in ("0.1B", "0.2B", "1B", "2B"):
    row = find(rows, "V2 Table 5", name, "parameters, B")
    step = 0.1 if row.paper < 1 else 1.0
    assert round(row.ours / step) * step == pytest.approx(row.paper)


def test_headlines(rows):
  share = find(
    rows, "V2 Table 1", "encoder-decoder 0.5:0.5, 512", "encoding, %"
  )
  assert round(share.ours, 2) == 97.66
  saved = find(
    rows, "V2 Table 2", "lazy for encoder-decoder 1:1, 1B", "FLOPs saved, %"
  )
  assert round(saved.ours) == 94 == round(saved.counted)


def test_true_costs_of_the_architectures(rows):
  """What the paper's Table 2 leaves out, at 1B (see docs/scaling.md)."""
  flops = {
    name: find(rows, "V2 Table 2", f"{name}, 1B", "GFLOPs")
    for name in ("encoder-decoder 1:1", "encoder-decoder 1:2", "lazy")
  }
  above = {name: row.counted / row.paper for name, row in flops.items()}
  assert above["encoder-decoder 1:1"] == pytest.approx(1.15, abs=0.01)
  assert above["encoder-decoder 1:2"] == pytest.approx(1.26, abs=0.01)
  assert above["lazy"] == pytest.approx(1.053, abs=0.002)
  ratio = flops["encoder-decoder 1:1"].counted / flops["lazy"].counted
  assert ratio == pytest.approx(17.1, abs=0.1)


def test_table_1_is_the_papers_closed_form():
  for positions in (512, 3000):
    encoding, decoding = conventions.round_encoder_decoder(1e9, positions)
    assert encoding == pytest.approx(0.66e9 * positions)
    assert decoding == pytest.approx(8.1e9)
    encoding, decoding = conventions.round_decoder_only(1e9, positions)
    assert encoding == pytest.approx(1.2e9 * positions)
    assert decoding == pytest.approx(18e9)


def multiply_adds(matrices, tokens):
  """Two operations a multiply-add, three passes, matrix by matrix."""
  return 3 * 2 * tokens * sum(rows * columns for rows, columns in matrices)


def test_encoder_decoder_flops_matrix_by_matrix():
  d, f = 640, 2560
  attention = [(d, d)] * 4
  swiglu = [(d, f), (d, f), (f, d)]
  want = 0.0
  for _ in range(4):
    want += multiply_adds(attention + swiglu, 512 / 5)
  for _ in range(8):
    queries_and_output = [(d, d)] * 2
    want += multiply_adds(attention + queries_and_output + swiglu, 3)
  want += sum(multiply_adds([(d, 8192)], 1) for _ in range(3))
  found = conventions.encoder_decoder_flops("0.1B", encoder_layers=4)
  assert found == pytest.approx(want)


def test_lazy_flops_matrix_by_matrix():
  heads, width = 14, 128
  for kv_chunks, kv_heads in ((1, 14), (6, 14), (1, 2), (2, 7)):
    context = [(3 * 90, kv_heads * width)] * kv_chunks
    want = 3 * 2 * 1e9 * 3
    want += multiply_adds(context, 512 / 5)
    want += multiply_adds([(heads * width, 8192)], 3)
    found = conventions.lazy_flops("1B", kv_chunks, kv_heads)
    assert found == pytest.approx(want)


def test_activations_token_by_token():
  d, layers, contexts = 1408, 14, 512 / 5
  positions, codes = contexts * 512, 512 * 3
  assert conventions.lazy_activations("0.5B", 3, 11) == pytest.approx(
    23 * d * layers * codes + 3 * d * positions
  )
  assert conventions.decoder_only_activations("0.5B") == pytest.approx(
    18 * d * layers * (positions + codes)
  )
  assert conventions.encoder_decoder_activations("0.5B", 5) == pytest.approx(
    20 * d * 5 * positions + 23 * d * 9 * codes
  )


@pytest.mark.parametrize("name", ["0.1B", "8B"])
def test_parameters_agree_with_the_model(name):
  config = conventions.lazy_config(name)
  assert conventions.dense_parameters(name) == registry.block_parameters(
    registry.create(config, 1, (8192,) * 3, {}, {})
  )


def test_experts_expert_by_expert():
  d, f = sizes.SIZES["0.5B"].d_model, 1408
  swiglu = lambda width: 3 * d * width
  counts = []
  for experts in (53 + 1, 3 + 1):
    total = 0
    for layer in range(14):
      total += 6 * d * d
      total += swiglu(4 * d) if layer < 2 else experts * swiglu(f)
    counts.append(total)
  assert conventions.expert_parameters("0.5B") == tuple(counts)
  routers = 12 * 53 * d
  config = sizes.lazy_decoder(sizes.EXPERTS)
  for every, want in zip((True, False), counts):
    found = conventions.counted_parameters(config, all_experts=every)
    assert 0 <= found - want <= routers


def test_blocks_of_the_technical_report():
  """The report lists layers and widths; ours are built and counted."""
  counts = {}
  for name, size in sizes.REPORT_SIZES.items():
    config = sizes.encoder_decoder(name)
    found = conventions.counted_parameters(config, all_experts=True)
    want = conventions.report_block_parameters(size)
    routers = size.layers * size.d_model * size.moe.num_experts
    assert 0 <= found - want <= routers
    counts[name] = want
  assert counts["0.015B"] == pytest.approx(0.66e6, rel=0.01)
  assert counts["0.121B"] == pytest.approx(84e6, rel=0.01)
  # The same model with the experts that a token passes.
  active = conventions.counted_parameters(sizes.encoder_decoder("0.935B"))
  assert active < counts["0.935B"] / 6


def test_all_parameters_of_the_technical_reports_models(rows):
  """Matrix by matrix: what the model has, and what the report's list lacks."""
  for name, width in (("0.015B", 128), ("0.935B", 1024)):
    size = sizes.REPORT_SIZES[name]
    matrices = [(8192, width)] * (3 + 2 + 3)  # context's, decoder's, heads
    for _ in ("static", "short", "positive", "lifelong"):
      matrices += [(3 * width + 16, width), (width, width)]
    for _ in range(2):  # the Q-Former: queries, keys, values, output, SwiGLU
      matrices += [(width, width)] * 4 + [(width, 2 * width)] * 3
    matrices += [(1 + 20 + 256 + 128, width), (128, width)]
    matrices += [(width, size.moe.num_experts)] * (size.layers // 2)
    want = conventions.report_block_parameters(size)
    want += sum(a * b for a, b in matrices)
    row = find(rows, "V1 Table 1", name, "all parameters, B")
    # The rest are norms, biases by distance, and the like.
    assert 0 < 1e9 * row.counted - want < 50 * width
  large = find(rows, "V1 Table 1", "0.935B", "all parameters, B")
  assert 1e9 * (large.counted - large.ours) == pytest.approx(29e6, rel=0.02)
  assert large.counted / large.paper == pytest.approx(1.033, abs=5e-4)


def run(program, *arguments):
  done = subprocess.run(
    [sys.executable, "-m", f"launch.{program}", *arguments],
    cwd=ROOT, capture_output=True, text=True,
    env={**os.environ, "JAX_PLATFORMS": "cpu", "COLUMNS": "100"},
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  return done.stdout


def test_command_prints_every_table(tmp_path):
  path = tmp_path / "tables.json"
  shown = run("paper_tables", f"--output={path}")
  for table in json.loads(path.read_text()):
    assert table["title"] in shown
    for row in table["rows"]:
      assert row["note"][:20] in shown
  assert "97.66" in shown


def test_command_fits_the_papers_points(tmp_path):
  shown = run("fit_scaling", "--paper", f"--output={tmp_path / 'law'}")
  assert "3.13 + 3656 / N^0.489" in shown
  record = json.loads((tmp_path / "law.json").read_text())["nominal N"]
  assert record["constants"]["A"] == pytest.approx(3656, rel=1e-3)
  low, high = record["rounding_intervals"]["A"]
  assert low < 3656 < high
  assert (tmp_path / "law.png").read_bytes().startswith(b"\x89PNG")
