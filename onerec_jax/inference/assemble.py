"""From config and artefacts to a system: model, item tables, prefix index."""

import dataclasses
import pathlib
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from onerec_jax import (
  checkpoint,
  files,
  model_configs,
  partitioning,
  semantic_ids,
)
from onerec_jax import config as config_lib
from onerec_jax.data import rows as rows_lib
from onerec_jax.data import shards, snapshots
from onerec_jax.data.batch import Catalogue
from onerec_jax.inference import prefix_index
from onerec_jax.models import registry, two_tower

PREFERRED = "lazy_decoder"
"""The run that is asked where several are there and none is named."""


@dataclasses.dataclass(frozen=True)
class System:
  """A model and what it needs beside parameters.

  Attributes:
    config: the experiment.
    prepared: the data.
    semantic_ids: None where the model scores items.
    model: the module.
    catalogue: item tables, numpy.
    index: what steps and search read beside the catalogue: the prefix index;
      log frequencies of two towers' items; None where SASRec scores items.
  """

  config: config_lib.Config
  prepared: shards.PreparedData
  semantic_ids: semantic_ids.SemanticIds | None
  model: registry.Model
  catalogue: Catalogue
  index: Any


def assemble(
  config: config_lib.Config,
  prepared: shards.PreparedData,
  sids: semantic_ids.SemanticIds | None,
) -> System:
  """Builds the system of a config.

  Args:
    config: the experiment.
    prepared: the data.
    sids: semantic IDs of the data's items; None for item-scoring models.
  """
  index, sizes = None, ()
  codes = np.zeros((prepared.num_items + 1, 1), np.int32)
  if sids is not None:
    codes, sizes = sids.codes, sids.codebook_sizes
    index = prefix_index.build(codes, sizes, prepared.item_counts)
  elif isinstance(config.model, model_configs.TwoTowerConfig):
    index = two_tower.log_frequency(prepared.item_counts)
  model = registry.create(
    config.model,
    prepared.num_items,
    sizes,
    rows_lib.feature_sizes(prepared),
    prepared.manifest["item_features"],
    config.pipeline.pathways,
  )
  catalogue = Catalogue(codes, prepared.item_features())
  return System(config, prepared, sids, model, catalogue, index)


def snapshots_name(
  config: config_lib.Config,
  prepared: shards.PreparedData,
  sids: semantic_ids.SemanticIds,
) -> str:
  """The fingerprint of the compressed histories that a config reads."""
  return snapshots.fingerprint(
    config.lifelong,
    config.pipeline.pathways.lifelong,
    prepared.manifest["fingerprint"],
    sids.fingerprint,
  )


def run_directory(workdir: files.PathLike, name: str) -> pathlib.Path:
  """<workdir>/models/<name>."""
  return pathlib.Path(workdir) / "models" / name


def read_record(workdir: files.PathLike, name: str) -> dict[str, Any]:
  """What a run wrote of itself (runs.record).

  Raises:
    FileNotFoundError: there is no such run.
  """
  run = run_directory(workdir, name)
  if not (run / "config.json").exists():
    have = sorted(p.parent.name for p in run.parent.glob("*/config.json"))
    raise FileNotFoundError(
      f"no run {name!r} in {run.parent}; there is {have or 'none'}: train it "
      "with python -m launch.train"
    )
  return files.read_json(run / "config.json")


def same_data(workdir: files.PathLike, name: str) -> bool:
  """Whether a run was trained on what is prepared now."""
  prepared = shards.PreparedData.open(workdir, verify=False)
  record = read_record(workdir, name)
  return record["prepared"] == prepared.manifest["fingerprint"]


def recommends(workdir: files.PathLike, name: str) -> bool:
  """Whether a run answers requests; reward models value others' answers."""
  config = config_lib.from_dict(read_record(workdir, name)["config"])
  return not isinstance(config.model, model_configs.RewardConfig)


def choose(workdir: files.PathLike, model: str = "", ranker: str = "") -> str:
  """The name of the run to load; see `recommender.Recommender.load`.

  Args:
    workdir: the work directory.
    model: the run's name; empty: the only one of these data that recommends,
      else the preferred.
    ranker: a run that is not to be chosen.

  Raises:
    ValueError: no such directory or run, or several and none preferred.
  """
  if not pathlib.Path(workdir).is_dir():
    raise ValueError(
      f"there is no directory {workdir}; --workdir is to be that of "
      "launch.train"
    )
  runs = pathlib.Path(workdir) / "models"
  names = sorted(path.parent.name for path in runs.glob("*/best.json"))
  if model in names:
    return model
  names = [name for name in names if name != ranker]
  if not model:
    # What the data were before they were prepared anew, nobody asks for.
    current = [name for name in names if same_data(workdir, name)]
    names = current or names
  names = [name for name in names if recommends(workdir, name)]
  if not model and len(names) == 1:
    return names[0]
  if not model and PREFERRED in names:
    return PREFERRED
  if not names:
    beside = f" beside {ranker!r}" if ranker else ""
    raise ValueError(
      f"{runs} has no trained run that recommends{beside}; train one with "
      "python -m launch.train"
    )
  asked = f"there is no run {model!r}" if model else "several runs"
  raise ValueError(f"{asked} in {runs}; name one of {names}")


def load(workdir: files.PathLike, name: str, mesh: Mesh) -> tuple[System, Any]:
  """A trained system and its best parameters.

  Args:
    workdir: the work directory.
    name: of the run.
    mesh: where the parameters are to lie.

  Raises:
    FileNotFoundError: there is no such run, or it has no parameters yet.
    ValueError: an artefact is broken or belongs to other data.
  """
  run, record = run_directory(workdir, name), read_record(workdir, name)
  config = config_lib.from_dict(record["config"])
  prepared = shards.PreparedData.open(workdir)
  if prepared.manifest["fingerprint"] != record["prepared"]:
    raise ValueError(
      f"{run} was trained on other data than {workdir}/prepared now holds; "
      "train it again, prepare the old data again, or name runs of these data "
      "(--model, --models)"
    )
  sids = None
  if record["semantic_ids"]:
    folder = semantic_ids.find(workdir, record["semantic_ids"])
    sids = semantic_ids.SemanticIds.load(folder)
  if config.pipeline.pathways.lifelong:
    prepared.snapshots = snapshots.Snapshots.open(
      workdir, snapshots_name(config, prepared, sids), config.lifelong
    )
  system = assemble(config, prepared, sids)
  return system, load_params(system, run, mesh)


def load_params(system: System, run: files.PathLike, mesh: Mesh) -> Any:
  """The best parameters of a run, laid out over a mesh."""
  batch = rows_lib.request_batch(
    [], sorted(rows_lib.feature_sizes(system.prepared)),
    system.config.pipeline, 1,
  )  # fmt: skip
  boxed = jax.eval_shape(
    system.model.init, jax.random.key(0), batch, system.catalogue
  )["params"]
  shardings = partitioning.tree_shardings(boxed, mesh)
  # Unboxing shapes outside eval_shape raises under a mesh.
  shapes = jax.eval_shape(
    lambda key, *args: nn.unbox(system.model.init(key, *args))["params"],
    jax.random.key(0), batch, system.catalogue,
  )  # fmt: skip
  return checkpoint.load_best(run, checkpoint.abstract(shapes, shardings))
