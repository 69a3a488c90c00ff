"""Serves items that came after a run was trained."""

import dataclasses

from onerec_jax import config as config_lib
from onerec_jax import files, partitioning
from onerec_jax.data import entities
from onerec_jax.data.batch import Catalogue
from onerec_jax.inference import assemble, prefix_index
from onerec_jax.inference.recommender import Recommender
from onerec_jax.tokenizer import extension


def recommender(
  workdir: files.PathLike, model: str, fingerprint: str
) -> Recommender:
  """`Recommender.load`, with the items of an extension (see `extend`)."""
  mesh = partitioning.make_mesh(config_lib.MeshConfig())
  name = assemble.choose(workdir, model)
  system, params = assemble.load(workdir, name, mesh)
  return Recommender(extend(system, workdir, fingerprint), params, mesh)


def extend(
  system: assemble.System, workdir: files.PathLike, fingerprint: str
) -> assemble.System:
  """A system whose catalogue goes on with the items of an extension.

  The model and its parameters stay as they are: a new item is a semantic ID
  that nothing led to before, of codes that were trained on other items. In a
  history it is read by its codes and features, without an embedding of its id
  (models/id_table.py).

  Args:
    system: generative, as its run was trained.
    workdir: of the run and the extension.
    fingerprint: of the extension (`tokenize.extend`), of the run's own
      semantic IDs or of an extension of them.

  Raises:
    FileNotFoundError: there is no such extension.
    ValueError: the model generates no semantic IDs, or others than were
      extended, or reads compressed histories.
  """
  own = system.semantic_ids
  if own is None:
    raise ValueError(
      f"{system.config.name} ({system.config.model.system}) generates no "
      "semantic IDs; only generative runs can recommend new items"
    )
  if system.config.pipeline.pathways.lifelong:
    raise ValueError(
      f"{system.config.name} reads compressed histories, in which new items "
      "have no place; prepare the log with them and train again"
    )
  known = extension.Known.load(workdir, fingerprint)
  places = [e.parent for e in known.extensions]
  if own.fingerprint not in places:
    raise ValueError(
      f"{fingerprint} adds no items to {own.fingerprint}, the semantic IDs of "
      f"{system.config.name}; add them with python -m launch.tokenize "
      f"--new_items=… --known={own.fingerprint}"
    )
  items, specs = system.prepared.items, system.prepared.manifest["bucketing"]
  for added in known.extensions[places.index(own.fingerprint) :]:
    items = entities.with_new_items(items, added.items, specs["item"])
  prepared = system.prepared.with_items(items)
  codes, sizes = known.ids.codes, known.ids.codebook_sizes
  return dataclasses.replace(
    system,
    prepared=prepared,
    semantic_ids=known.ids,
    catalogue=Catalogue(codes, prepared.item_features()),
    index=prefix_index.build(codes, sizes, prepared.item_counts),
  )
