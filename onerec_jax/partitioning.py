"""Meshes, the rules from logical to mesh axes, and shardings of states.

Models name the axes of their parameters and activations logically; this file
alone knows the mesh. A logical name without a rule is an error, never a
silent replication.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax import linen as nn
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from onerec_jax import config as config_lib

MESH_AXES = ("data", "fsdp", "expert", "tensor")

RULES: dict[str, str | tuple[str, ...] | None] = {
  # Along `expert` too: there the dense parts see devices like any other.
  "batch": ("data", "fsdp", "expert"),
  "layers": None,
  "embed": "fsdp",
  "heads": "tensor",
  # The width of a context's embeddings is whatever the data have and may not
  # divide; what it is projected to takes both axes.
  "context": None,
  "projected": ("fsdp", "tensor"),
  "mlp": "tensor",
  "expert": "expert",
  "codes": "tensor",
  # Rows of lookup tables lie over fsdp and their width is whole, so that a
  # lookup is a masked gather and not a rematerialised table.
  "items": "fsdp",
  "vocab": None,
  "table": None,
  "norm": None,
  "bucket": None,
}
"""Logical axis → mesh axes. `embed` is D of weight matrices, `table` the width
of lookup tables."""


def make_mesh(
  config: config_lib.MeshConfig,
  devices: Sequence[jax.Device] | None = None,
) -> Mesh:
  """A mesh over MESH_AXES; one −1 takes the devices that remain.

  Raises:
    ValueError: the axes do not multiply to the number of devices.
  """
  devices = jax.devices() if devices is None else devices
  sizes = [getattr(config, axis) for axis in MESH_AXES]
  known = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) == 1 and known > 0 and len(devices) % known == 0:
    sizes[sizes.index(-1)] = len(devices) // known
  if min(sizes) < 1 or math.prod(sizes) != len(devices):
    raise ValueError(
      f"mesh {dict(zip(MESH_AXES, sizes))} does not fit {len(devices)} "
      "device(s); set config.mesh so that the axes multiply to that number "
      "(one may be -1)"
    )
  # Auto axes: logical constraints fail under Explicit ones, the default of
  # jax.make_mesh.
  return Mesh(
    np.asarray(devices).reshape(sizes),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )


def spec(names: Sequence[str | None]) -> PartitionSpec:
  """Mesh axes of an array whose axes carry these logical names.

  Raises:
    ValueError: a name without a rule, or two names on one mesh axis.
  """
  unknown = [name for name in names if name is not None and name not in RULES]
  if unknown:
    raise ValueError(
      f"logical axis {unknown[0]!r} has no rule in partitioning.RULES"
    )
  axes = [None if name is None else RULES[name] for name in names]
  flat = [
    axis
    for entry in axes
    for axis in ((entry,) if isinstance(entry, str) else entry or ())
  ]
  if len(set(flat)) != len(flat):
    raise ValueError(f"logical axes {tuple(names)} share a mesh axis: {axes}")
  return PartitionSpec(*axes)


def tree_shardings(boxed: Any, mesh: Mesh) -> Any:
  """Shardings of a tree of logically partitioned (abstract) arrays.

  Args:
    boxed: arrays or shapes, boxed by `nn.with_logical_partitioning`; a leaf
      without a box is replicated.
    mesh: the mesh.

  Raises:
    ValueError: as `spec`, or a named axis that its mesh axes do not divide.
  """

  def shard(path: Any, leaf: Any) -> NamedSharding:
    names = getattr(leaf, "names", ())
    value = getattr(leaf, "value", leaf)
    resolved = spec(names)
    for size, axes in zip(value.shape, resolved):
      axes = (axes,) if isinstance(axes, str) else axes or ()
      shards = math.prod(mesh.shape[axis] for axis in axes)
      if size % shards:
        raise ValueError(
          f"{jax.tree_util.keystr(path)}: axis of size {size} does not divide "
          f"over {shards} devices of mesh axes {axes}; change the size or "
          "config.mesh"
        )
    return NamedSharding(mesh, resolved)

  return jax.tree_util.tree_map_with_path(
    shard, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )


def constrain(x: jax.Array, names: Sequence[str | None]) -> jax.Array:
  """Lays an activation over the mesh in force; without a mesh, as it is."""
  resolved = spec(names)
  if jax.sharding.get_abstract_mesh().empty:
    return x
  return jax.lax.with_sharding_constraint(x, resolved)


def shards(name: str) -> int:
  """Pieces of an axis of this logical name on the mesh in force; without, 1.

  Raises:
    ValueError: as `spec`.
  """
  (axes,) = spec((name,))
  axes = (axes,) if isinstance(axes, str) else axes or ()
  mesh = jax.sharding.get_abstract_mesh()
  return 1 if mesh.empty else math.prod(mesh.shape[axis] for axis in axes)


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over every data-parallel axis, the rest whole."""
  return NamedSharding(mesh, spec(("batch",)))


def local_rows(mesh: Mesh, batch_size: int) -> np.ndarray:
  """The rows of a batch that this process's devices hold, ascending."""
  held = batch_sharding(mesh).addressable_devices_indices_map((batch_size,))
  rows = np.arange(batch_size)
  return np.unique(np.concatenate([rows[index] for index in held.values()]))


def replicated(mesh: Mesh) -> NamedSharding:
  """The whole array on every device."""
  return NamedSharding(mesh, PartitionSpec())
