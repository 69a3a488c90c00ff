"""The TPU compiler on real programs, cut small; without libtpu, skipped."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from onerec_jax import config as config_lib
from onerec_jax.scaling import compile_tpu, sizes

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install -e '.[tpu]'",
)

# Before jax starts, so in a process of their own; both compile there.
SCRIPT = """
import dataclasses, json, sys
from launch import compile_tpu as program  # sets the environment
from experiments.scaling import lazy_decoder
from onerec_jax.scaling import compile_tpu, roofline

config = lazy_decoder.get_config("0.05B")
config.model.num_layers = 2
config.model.scan_layers = False
config.model.remat = "none"
config.mesh.data, config.mesh.fsdp = 1, -1
config.tokenizer.num_codes = 256
config.pipeline.row_positions = 128
config.pipeline.batch_size = 64
config.evaluation.beam_width = 16
programs = compile_tpu.prepare(config, "v5p:2x2x1", 2000)
reports = [compile_tpu.train_step(programs), compile_tpu.search(programs, 2)]
for report in reports:
  roofline.table(report)
print(json.dumps([dataclasses.asdict(report) for report in reports]))
"""


@pytest.fixture(scope="module")
def reports():
  environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR="")
  run = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    capture_output=True,
    text=True,
    env=environment,
  )
  assert run.returncode == 0, run.stderr[-3000:]
  return json.loads(run.stdout.splitlines()[-1])


@needs_libtpu
@pytest.mark.slow
def test_the_train_step_does_the_models_work(reports):
  step, _ = reports
  assert step["program"] == "train step"
  assert step["chips"] == 4
  # Nothing is recomputed, so what runs is what the model's counter says.
  assert step["flops"] == pytest.approx(step["model_flops"], rel=0.03)
  config = sizes.lazy_decoder("0.05B")
  tables = 2 * 256 * config.d_model + 3 * 256 * config.sid_embed_dim
  matrices = 2 * 18 * config.d_model**2 + 3 * 256 * config.d_model
  # Float32 parameters and two moments: matrices over 4 chips, tables whole.
  least = 12 * (matrices / 4 + tables)
  assert least < step["arguments"] < 1.3 * least
  assert step["temporaries"] > 0
  assert step["hbm_bytes"] > 2 * least
  # The matrices are gathered in bfloat16 and their gradients brought together.
  assert step["collective_bytes"]["all-gather"] > 0.75 * 2 * matrices
  for bound in ("compute", "memory", "interconnect", "compiler"):
    assert step[f"{bound}_seconds"] > 0


@needs_libtpu
@pytest.mark.slow
def test_the_search_does_the_models_work(reports):
  _, search = reports
  assert search["program"] == "beam search"
  assert search["flops"] == pytest.approx(search["model_flops"], rel=0.03)
  assert search["memory_seconds"] > 0


@needs_libtpu
@pytest.mark.parametrize(
  ("topology", "message"),
  [
    ("v9:4x4", "topology 'v9:4x4': want a chip of v4, v5e"),
    ("v5p", "and a shape, as v5p:4x4x4"),
  ],
)
def test_a_wrong_topology_is_refused(topology, message):
  with pytest.raises(ValueError, match=message):
    compile_tpu.prepare(config_lib.Config(), topology, 10)


def test_without_libtpu_the_package_is_named(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"pip install -e '\.\[tpu\]'"):
    compile_tpu.prepare(config_lib.Config(), "v5p:2x2x1", 10)
