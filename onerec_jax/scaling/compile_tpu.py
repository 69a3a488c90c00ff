"""Compiles the real programs for TPUs without one, and reports their bounds.

The TPU compiler (libtpu) runs on any host: given a slice's description it
compiles for it, and shapes stand for arrays. Before jax starts, the
environment must have JAX_PLATFORMS=cpu, TPU_SKIP_MDS_QUERY=1 and
ALLOW_MULTIPLE_LIBTPU_LOAD=1; launch/compile_tpu.py sees to it.
"""

import dataclasses
import functools
import importlib.util
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.experimental import topologies
from jax.sharding import Mesh

from onerec_jax import config as config_lib
from onerec_jax import partitioning
from onerec_jax.data.batch import Batch, Catalogue
from onerec_jax.inference import beam_search, prefix_index
from onerec_jax.models import registry
from onerec_jax.scaling import roofline, tally
from onerec_jax.training import losses, optimizer, state, step

NUM_STEPS = 100_000
"""Length of the learning-rate schedule; no matter to the program."""


@dataclasses.dataclass(frozen=True)
class Programs:
  """A model on a slice, ready to be compiled.

  Attributes:
    config: the experiment, its compute dtype settled.
    place: the slice.
    mesh: of its devices.
    model: the model.
    num_items: I.
  """

  config: config_lib.Config
  place: roofline.Place
  mesh: Mesh
  model: registry.Model
  num_items: int


def prepare(
  config: config_lib.Config, topology: str, num_items: int
) -> Programs:
  """Lays a config's mesh over a slice and makes its model, all abstract.

  Args:
    config: the experiment; its data are not looked at, and items and events
      have no features but their semantic IDs.
    topology: chip and shape of the slice, as `v5p:4x4x4`.
    num_items: size of the catalogue.

  Raises:
    ValueError: no libtpu, an unknown chip, or a mesh that does not fit.
  """
  if importlib.util.find_spec("libtpu") is None:
    raise ValueError(
      "compiling for TPUs needs the libtpu package: pip install -e '.[tpu]'"
    )
  chip, _, shape = topology.partition(":")
  if chip not in roofline.CHIPS or not shape:
    raise ValueError(
      f"topology {topology!r}: want a chip of {', '.join(roofline.CHIPS)} and "
      "a shape, as v5p:4x4x4"
    )
  try:
    devices = topologies.get_topology_desc(
      platform="tpu", topology_name=topology
    ).devices
  except jax.errors.JaxRuntimeError as error:
    raise ValueError(f"topology {topology!r}: {error}") from error
  mesh = partitioning.make_mesh(config.mesh, devices)
  dims = tuple(int(size) for size in shape.split("x"))
  coords = np.asarray([d.coords[: len(dims)] for d in mesh.devices.flat])
  cores = len(coords) // len(np.unique(coords, axis=0))
  place = roofline.Place(topology, roofline.CHIPS[chip], dims, coords, cores)
  config = dataclasses.replace(config, model=_for_accelerators(config.model))
  model = registry.create(
    config.model,
    num_items,
    (config.tokenizer.num_codes,) * config.tokenizer.num_levels,
    {},
    {},
    config.pipeline.pathways,
  )
  return Programs(config, place, mesh, model, num_items)


def _for_accelerators(model: Any) -> Any:
  """`auto` would look at this host, which is no TPU."""
  settled = {}
  if model.compute_dtype == "auto":
    settled["compute_dtype"] = "bfloat16"
  if getattr(model, "attention", "") == "auto":
    settled["attention"] = "fused"
  return dataclasses.replace(model, **settled)


def _int32(*shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(shape, jnp.int32)


def _positions(pipeline: config_lib.PipelineConfig, history: int) -> int:
  """S of a row: of the pathways where they are on, else the history's."""
  return pipeline.pathways.positions if pipeline.pathways.on else history


def _batch(rows: int, positions: int, targets: int) -> Batch:
  context, wanted = _int32(rows, positions), _int32(rows, targets)
  return Batch(context, context, {}, wanted, wanted, wanted)


def _tables(programs: Programs) -> tuple[Catalogue, Any]:
  """Shapes of catalogue and prefix index, from uniformly random codes.

  Balanced codes are nearly that. The index's shapes hang on its fan-outs.
  """
  sizes = programs.model.codebook_sizes
  rng = np.random.default_rng(0)
  codes = np.stack(
    [rng.integers(0, size, programs.num_items + 1) for size in sizes], axis=1
  ).astype(np.int32)
  index = prefix_index.build(codes, sizes)
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype),
    (Catalogue(jnp.asarray(codes), {}), index),
  )


def train_step(programs: Programs) -> roofline.Report:
  """Compiles one update of training, sharded and donated as the loop's is.

  Raises:
    ValueError: a batch that does not divide over mesh and microbatches, or a
      program that does not fit the chip.
  """
  config, model, mesh = programs.config, programs.model, programs.mesh
  pipeline, settings = config.pipeline, config.training
  rows = pipeline.batch_size
  pieces = _row_shards(mesh) * settings.microbatches
  if rows % pieces:
    raise ValueError(
      f"pipeline.batch_size={rows} is no multiple of {pieces}: devices along "
      "the batch's mesh axes × training.microbatches"
    )
  positions = _positions(pipeline, pipeline.row_positions)
  batch = _batch(rows, positions, pipeline.row_targets)
  catalogue, index = _tables(programs)
  length = registry.block_parameters(model), NUM_STEPS
  tx = optimizer.make_optimizer(
    config.optimizer,
    optimizer.make_schedule(config.optimizer, *length),
    optimizer.make_table_schedule(config.optimizer, *length),
  )
  params = state.abstract_params(model, batch, catalogue)
  count = _int32()
  boxed = state.TrainState(
    count, params, jax.eval_shape(tx.init, params), count
  )
  shardings = partitioning.tree_shardings(boxed, mesh)
  shapes = nn.unbox(boxed)
  update = functools.partial(
    step.train_step,
    loss_fn=losses.make_loss(model),
    tx=tx,
    seed=settings.seed,
    microbatches=settings.microbatches,
    balance_rate=registry.balance_rate(config.model),
  )
  # Forward plus backward: three times the forward matrix products.
  step_flops = 3.0 * registry.forward_flops(
    model, rows, positions, pipeline.row_targets
  )
  with jax.set_mesh(mesh):
    jitted = step.compile_step(update, shardings, mesh, catalogue, index)
    return _compile(
      "train step",
      programs.place,
      lambda: jitted.lower(shapes, batch, catalogue, index),
      step_flops / mesh.devices.size,
    )


def search(programs: Programs, requests: int) -> roofline.Report:
  """Compiles beam search over the whole catalogue, for one chip of the slice.

  A chip answers alone, with all parameters: `Recommender` spreads rows over
  chips, and rows do not interact. The config's mesh has no part in it.

  Args:
    programs: a generator of semantic IDs; `evaluation.beam_width` is W.
    requests: answered at once.

  Raises:
    ValueError: a program that does not fit the chip.
  """
  config, model = programs.config, programs.model
  mesh = partitioning.make_mesh(
    config_lib.MeshConfig(), list(programs.mesh.devices.flat[:1])
  )
  width, pipeline = config.evaluation.beam_width, config.pipeline
  # Requests do not share rows, so theirs are as long as a history.
  positions = _positions(pipeline, pipeline.max_history + 1)
  batch = _batch(requests, positions, 1)
  catalogue, index = _tables(programs)
  params = nn.unbox(state.abstract_params(model, batch, catalogue))

  def run(params, batch, catalogue, index):
    return beam_search.beam_search(
      model, params, batch, catalogue, index, width
    )

  whole = partitioning.replicated(mesh)
  levels = len(model.codebook_sizes)
  # A target has one code position a level; a search has one for BOS and
  # `width` for each level after it.
  context = registry.forward_flops(model, requests, positions, 0)
  targets = registry.forward_flops(model, requests, positions, 1) - context
  with jax.set_mesh(mesh):
    jitted = jax.jit(run, in_shardings=whole, out_shardings=whole)
    return _compile(
      "beam search",
      programs.place,
      lambda: jitted.lower(params, batch, catalogue, index),
      context + targets * (1 + (levels - 1) * width) / levels,
    )


def _row_shards(mesh: Mesh) -> int:
  """Pieces the rows of a batch lie in."""
  with jax.set_mesh(mesh):
    return partitioning.shards("batch")


def _compile(name, place, lower, model_flops) -> roofline.Report:
  """Compiles what `lower` gives; `model_flops` are those of one device."""
  start = time.perf_counter()
  try:
    compiled = lower().compile()
  except jax.errors.JaxRuntimeError as error:
    if "RESOURCE_EXHAUSTED" not in str(error):
      raise
    found = str(error).split("\n")[0]
    raise ValueError(
      f"the {name} does not fit {place.name}: {found} Try fewer rows "
      "(pipeline.batch_size), more training.microbatches, model.remat=full, or "
      "a mesh with more fsdp or tensor"
    ) from error
  seconds = time.perf_counter() - start
  memory = compiled.memory_analysis()
  return roofline.report(
    name,
    tally.tally(compiled.as_text()),
    model_flops,
    memory.argument_size_in_bytes,
    # Outputs that take an argument's place are no memory of their own.
    memory.output_size_in_bytes
    - memory.alias_size_in_bytes
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes,
    place,
    seconds,
  )
