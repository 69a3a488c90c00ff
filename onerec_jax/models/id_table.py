"""Item-id tables: rows over devices, and fewer rows than there are items.

V1 embeds the item id beside, or instead of, its semantic ID (§2.2, Table 5);
the papers do not say how a billion ids fit. INFERRED: the hashing trick with
two functions, as in Bloom embeddings (Serrà & Karatzoglou 2017). An item is
the sum of two rows of one table,

  e(i) = E[h_1(i)] + E[h_2(i)]

so two items look the same only where both their rows collide: with R rows
about I² / R² pairs of items, against I² / 2R for a single function.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Int

from onerec_jax import partitioning
from onerec_jax.models import layers

NUM_FUNCTIONS = 2
"""Rows summed for an item."""


def hash_rows(
  ids: Int[Array, "*batch"], num_rows: int, function: int
) -> Int[Array, "*batch"]:
  """Rows of a table, evenly and at random as far as ids are concerned.

  Murmur3's finaliser of the id and the function's number; the same on every
  device and in every run, since checkpoints hang on it.

  Args:
    ids: non-negative.
    num_rows: of the table.
    function: which hash function, from 0.

  Returns:
    In [0, num_rows).
  """
  # Mixed twice: after one round h_2(i) would be h_1(i + a constant).
  salt = jnp.uint32((function + 1) * 0x9E3779B9 & 0xFFFFFFFF)
  bits = layers.mix(ids.astype(jnp.uint32) + salt)
  bits = layers.mix(bits ^ salt)
  return (bits % jnp.uint32(num_rows)).astype(jnp.int32)


def sum_of_rows(
  table: Float[Array, "rows D"], rows: Int[Array, "B S n"]
) -> Float[Array, "B S D"]:
  """Σ_n table[rows[…, n]]; row −1 counts as zeros.

  Where the table's rows lie over devices, each device reads for all of them
  what it holds, and the sum over devices is scattered to whoever asked. Left
  to the compiler, every device gets every embedding of the batch, and in the
  backward pass those of every n (docs/id_tables.md).

  Args:
    table: its rows lie on the mesh as `items` do.
    rows: B lies on the mesh as `batch` does.
  """
  (over,), batch = partitioning.spec(("items",)), partitioning.spec(("batch",))
  # A batch that does not divide (few requests) is left to the compiler.
  if partitioning.shards("items") == 1 or (
    rows.shape[0] % partitioning.shards("batch")
  ):
    return _sum_of_rows(table, rows)

  def of_device(own: Array, rows: Array) -> Array:
    rows = jax.lax.all_gather(rows, over, axis=0, tiled=True)
    here = rows - jax.lax.axis_index(over) * own.shape[0]
    found = _sum_of_rows(own, jnp.where(here < own.shape[0], here, -1))
    return jax.lax.psum_scatter(found, over, scatter_dimension=0, tiled=True)

  return jax.shard_map(
    of_device, in_specs=(PartitionSpec(over), batch), out_specs=batch
  )(table, rows)


def _sum_of_rows(table: Array, rows: Array) -> Array:
  return sum(
    jnp.where(
      (rows[..., n] >= 0)[..., None],
      jnp.take(table, rows[..., n], axis=0, mode="clip"),
      0.0,
    )
    for n in range(rows.shape[-1])
  )


class ItemTable(nn.Module):
  """An embedding of item ids; id 0 (padding) reads as zeros.

  So do ids beyond I, items that came after training: for them a row of the
  table, or a row hashed into, would be another item's (INFERRED).

  Attributes:
    num_items: I.
    features: width.
    num_rows: rows that ids are hashed into; 0: a row an item, row 0 padding.
  """

  num_items: int
  features: int
  num_rows: int

  @nn.compact
  def __call__(self, ids: Int[Array, "B S"]) -> Float[Array, "B S D"]:
    """Embeddings in float32."""
    table = self.param(
      "table",
      layers.boxed(nn.initializers.normal(0.02), ("items", "table")),
      (self.num_rows or layers.table_rows(self.num_items), self.features),
    )
    rows = [ids]
    if self.num_rows:
      rows = [hash_rows(ids, self.num_rows, k) for k in range(NUM_FUNCTIONS)]
    trained = (ids > 0) & (ids <= self.num_items)
    rows = jnp.where(trained[..., None], jnp.stack(rows, axis=-1), -1)
    return sum_of_rows(table, rows)
