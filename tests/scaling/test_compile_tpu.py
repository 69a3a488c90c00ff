"""The TPU compiler on real programs, cut small; without libtpu, skipped."""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from experiments.scaling import lazy_decoder
from onerec_jax import config as config_lib
from onerec_jax.models import registry
from onerec_jax.scaling import compile_tpu, sizes

needs_libtpu = pytest.mark.skipif(
  importlib.util.find_spec("libtpu") is None,
  reason="libtpu is not installed: pip install -e '.[tpu]'",
)

# Before jax starts, so in a process of their own; all compile there. One block
# of two levels: that a program does the model's work shows with the first, and
# more only takes longer to compile. Rows are few and full of targets: fused
# attention pads them, which the model's counter does not count.
SCRIPT = """
import dataclasses, json
from launch import compile_tpu as program  # sets the environment
from experiments.scaling import lazy_decoder
from onerec_jax.config import PathwaysConfig
from onerec_jax.scaling import compile_tpu, roofline

config = lazy_decoder.get_config("0.05B")
config.model.num_layers = 1
config.model.d_model, config.model.d_ff = 256, 1024
config.model.num_heads = config.model.num_kv_heads = 2
config.model.scan_layers = False
config.model.remat = "none"
config.mesh.data, config.mesh.fsdp = 1, -1
config.tokenizer.num_codes, config.tokenizer.num_levels = 256, 2
config.pipeline.row_positions, config.pipeline.row_targets = 128, 20
config.pipeline.max_history = 127
config.pipeline.batch_size = 4
config.evaluation.beam_width = 16
programs = compile_tpu.prepare(config, "v5p:2x2x1", 2000)
reports = [compile_tpu.train_step(programs), compile_tpu.search(programs, 2)]
for report in reports:
  roofline.table(report)
found = [dataclasses.asdict(report) for report in reports]

# With pathways, lowered alone: shapes and counts are those of the programs
# before compilation.
def lowered(name, place, lower, flops):
  batch = lower().args_info[0][1]
  return {"items": batch.items.shape, "model_flops": flops}

compile_tpu._compile = lowered
config = lazy_decoder.get_config("0.05B")
config.model.num_layers = 1
config.mesh.data, config.mesh.fsdp = 1, -1
config.tokenizer.num_codes = 256
config.pipeline.pathways = PathwaysConfig(short=4, positive=8, lifelong=16)
config.pipeline.batch_size = 8
config.evaluation.beam_width = 16
programs = compile_tpu.prepare(config, "v5p:2x2x1", 2000)
found += [compile_tpu.train_step(programs), compile_tpu.search(programs, 3)]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def reports():
  environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR="")
  done = subprocess.run(
    [sys.executable, "-c", SCRIPT],
    capture_output=True,
    text=True,
    env=environment,
  )
  assert done.returncode == 0, done.stderr[-3000:]
  return json.loads(done.stdout.splitlines()[-1])


@needs_libtpu
@pytest.mark.slow
def test_the_train_step_does_the_models_work(reports):
  step, *_ = reports
  assert step["program"] == "train step"
  assert step["chips"] == 4
  # Nothing is recomputed, so what runs is what the model's counter says.
  assert step["flops"] == pytest.approx(step["model_flops"], rel=0.03)
  sid_embed_dim = sizes.lazy_decoder("0.05B").sid_embed_dim
  tables = 256 * 256 + 2 * 256 * sid_embed_dim
  matrices = 18 * 256**2 + 2 * 256 * 256
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
  _, search, *_ = reports
  assert search["program"] == "beam search"
  assert search["flops"] == pytest.approx(search["model_flops"], rel=0.03)
  assert search["memory_seconds"] > 0


@needs_libtpu
def test_pathways_are_compiled_where_they_are_on(reports):
  *_, step, search = reports
  # The user token, then short, positive and lifelong.
  assert step["items"] == [8, 29]
  assert search["items"] == [3, 29]
  config = lazy_decoder.get_config("0.05B").model
  config.num_layers = 1
  pathways = config_lib.PathwaysConfig(short=4, positive=8, lifelong=16)
  model = registry.create(config, 2000, (256,) * 3, {}, {}, pathways)
  forward = registry.forward_flops(model, 8, 29, 5)
  assert step["model_flops"] == pytest.approx(3 * forward / 4)
  # A target's codes are 3; a search's are BOS and 2 × 16, eleven times that.
  context = registry.forward_flops(model, 3, 29, 0)
  target = registry.forward_flops(model, 3, 29, 1) - context
  assert search["model_flops"] == pytest.approx(context + 11 * target)


@pytest.fixture(scope="module")
def told(tmp_path_factory):
  """(printed label → value, the JSON file) of the command itself.

  One layer, few codes and items, short rows: quicker to compile.
  """
  output = tmp_path_factory.mktemp("compile_tpu") / "report.json"
  done = subprocess.run(
    [
      sys.executable, "-m", "launch.compile_tpu",
      "--config=experiments/scaling/lazy_decoder.py:0.05B",
      "--topology=v5p:2x2x1", "--config.pipeline.batch_size=8",
      "--config.pipeline.row_positions=128",
      "--config.model.num_layers=1", "--config.model.d_model=256",
      "--config.model.d_ff=1024", "--config.model.num_heads=2",
      "--config.model.num_kv_heads=2", "--config.tokenizer.num_codes=256",
      "--config.tokenizer.num_levels=2",
      "--num_items=2000", f"--output={output}",
    ],
    cwd=pathlib.Path(__file__).parents[2],
    capture_output=True,
    text=True,
    # A program from the cache would not be compiled.
    env=dict(
      os.environ, COLUMNS="100", JAX_COMPILATION_CACHE_DIR=str(output.parent)
    ),
  )  # fmt: skip
  assert done.returncode == 0, done.stderr[-3000:]
  lines = [re.split(r"\s{2,}", x.strip()) for x in done.stdout.splitlines()]
  printed = dict(line for line in lines if line[1:])
  return printed, json.loads(output.read_text())


@needs_libtpu
@pytest.mark.slow
def test_the_command_prints_and_writes_what_one_chip_needs(told):
  printed, report = told
  assert printed["train step, v5p:2x2x1"] == "one chip"
  assert (report["place"], report["chips"]) == ("v5p:2x2x1", 4)
  # The flags reach the program: forward and backward over 8 rows of 4 chips.
  config = lazy_decoder.get_config("0.05B").model
  config.num_layers, config.d_model, config.d_ff = 1, 256, 1024
  config.num_heads = config.num_kv_heads = 2
  model = registry.create(config, 2000, (256,) * 2, {}, {})
  flops = 3 * registry.forward_flops(model, 8, 128, 5) / 4
  assert report["model_flops"] == pytest.approx(flops)
  assert printed["model FLOPs"] == f"{flops / 1e12:.3f} T"
  # `dots` keeps what the products gave: little runs twice.
  assert flops < report["flops"] < 1.2 * flops
  memory = report["arguments"] + report["temporaries"]
  share = memory / 95e9
  assert printed["memory"] == f"{memory / 1e9:.2f} GB, {share:.0%}: fits"
  # Every chip holds all parameters and two moments, in float32.
  least = 12 * registry.block_parameters(model)
  assert least < report["arguments"] < memory
  times = [
    report["flops"] / 459e12,
    report["hbm_bytes"] / 2765e9,
    report["interconnect_seconds"],
  ]
  for label, bound in (("all", max(times)), ("none", sum(times))):
    mfu = flops / (459e12 * bound)
    expected = f"{1e3 * bound:.1f} ms, MFU {mfu:.1%}"
    assert printed[f"bound, {label} overlap"] == expected


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
