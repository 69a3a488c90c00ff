"""Parts that every model shares: projections, norm, SwiGLU, dropout."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Float, Int

Initializer = Callable[..., jax.Array]


def boxed(initializer: Initializer, names: Sequence[str | None]) -> Initializer:
  """An initializer whose parameter remembers its logical axes."""
  return nn.with_logical_partitioning(initializer, tuple(names))


def fan_in(num_axes: int = 1) -> Initializer:
  """Normal with variance 1 / (product of the first `num_axes` axes)."""
  return nn.initializers.variance_scaling(
    1.0,
    "fan_in",
    "truncated_normal",
    in_axis=tuple(range(num_axes)),
    out_axis=-1,
  )


class RMSNorm(nn.Module):
  """x / rms(x) · scale over the last axis."""

  @nn.compact
  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Normalises in float32: squares of bfloat16 lose the small entries."""
    scale = self.param(
      "scale", boxed(nn.initializers.ones, ("norm",)), (x.shape[-1],)
    )
    wide = x.astype(jnp.float32)
    mean = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
    scale = scale.reshape((1,) * (x.ndim - 1) + (-1,))
    return (wide * jax.lax.rsqrt(mean + 1e-6) * scale).astype(x.dtype)


@jax.custom_vjp
def matmul(
  x: Float[Array, "*batch D"], weight: Float[Array, "D F"]
) -> Float[Array, "*batch F"]:
  """Product with a matrix, with a gradient of it that CPUs are quick at.

  JAX's own is (dyᵀ x)ᵀ over the leading axes as they are: XLA on CPU copies dy,
  then multiplies at half its rate. Of two matrices it is xᵀ dy at once. Others
  keep JAX's: to flatten the axes would move data on a TPU.
  """
  return x @ weight


def _matmul_forward(x, weight):
  return x @ weight, (x, weight)


def _matmul_backward(kept, out):
  x, weight = kept
  of_weight = jax.lax.platform_dependent(
    x, out, cpu=_outer_of_matrices, default=_outer
  )
  return out @ weight.T, of_weight


def _outer(x, out):
  leading = tuple(range(x.ndim - 1))
  return jnp.tensordot(out, x, (leading, leading)).T


def _outer_of_matrices(x, out):
  return x.reshape(-1, x.shape[-1]).T @ out.reshape(-1, out.shape[-1])


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nn.Module):
  """x @ W without a bias; weights in float32, product in x's dtype.

  Attributes:
    features: output width.
    names: logical axes of the weight.
    initializer: of the weight; default: variance 1 / input width.
  """

  features: int
  names: tuple[str, str] = ("embed", "mlp")
  initializer: Initializer = fan_in()

  @nn.compact
  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch F"]:
    """Projects the last axis."""
    weight = self.param(
      "kernel",
      boxed(self.initializer, self.names),
      (x.shape[-1], self.features),
    )
    return matmul(x, weight.astype(x.dtype))


def _gate(both):
  gate, value = jnp.split(both, 2, axis=-1)
  return nn.silu(gate) * value


@jax.custom_vjp
def gated(both: Float[Array, "*batch F2"]) -> Float[Array, "*batch F"]:
  """silu(gate) ⊙ value of a gate and a value side by side.

  Computed again in the backward pass: the sigmoid and its product with the
  gate, each as large as the value, cost more to keep than to make.
  """
  return _gate(both)


def _gated_forward(both):
  return _gate(both), both


def _gated_backward(both, out):
  # Else XLA on CPU finds what the forward pass has made, and keeps it. On TPUs
  # it makes it in the fusion that reads it, which a barrier would split.
  both = jax.lax.platform_dependent(
    both, cpu=jax.lax.optimization_barrier, default=lambda x: x
  )
  return jax.vjp(_gate, both)[1](out)


gated.defvjp(_gated_forward, _gated_backward)


class SwiGLU(nn.Module):
  """W_o(silu(W_g x) ⊙ W_i x); three matrices of D × F."""

  d_ff: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "*batch D"], real: Array | None = None
  ) -> Float[Array, "*batch D"]:
    """Applies the feed-forward block; `real` is for experts (moe.py) alone."""
    del real
    # Gate and input are one product of width 2F: one read of x.
    both = Linear(2 * self.d_ff, ("embed", "mlp"), name="wi")(x)
    return Linear(x.shape[-1], ("mlp", "embed"), name="wo")(gated(both))


class MLP(nn.Module):
  """W_o gelu(W_i x); two matrices of D × F.

  INFERRED: V1 names no activation. Two matrices are what its block parameters
  add up to (0.66M at 0.015B, 84M at 0.121B).
  """

  d_ff: int

  @nn.compact
  def __call__(
    self, x: Float[Array, "*batch D"], real: Array | None = None
  ) -> Float[Array, "*batch D"]:
    """Applies the feed-forward block; `real` is for experts (moe.py) alone."""
    del real
    h = nn.gelu(Linear(self.d_ff, ("embed", "mlp"), name="wi")(x))
    return Linear(x.shape[-1], ("mlp", "embed"), name="wo")(h)


_REMAT_POLICIES = {
  "full": jax.checkpoint_policies.nothing_saveable,
  "dots": jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    jax.checkpoint_policies.save_only_these_names("attended", "grouped"),
  ),
}
REMAT = ("none", *_REMAT_POLICIES)
"""What `remat` may be."""


def remat(
  block: type[nn.Module],
  policy: str,
  methods: Sequence[str] = ("__call__",),
) -> type[nn.Module]:
  """A block that is computed again in the backward pass.

  Args:
    block: the class.
    policy: `none`: kept whole; `full`: nothing is kept; `dots`: matrix
      products are.
    methods: which of its methods.
  """
  if policy == "none":
    return block
  return nn.remat(
    block,
    policy=_REMAT_POLICIES[policy],
    prevent_cse=False,
    methods=tuple(methods),
  )


TABLE_MULTIPLE = 128
"""Rows of an item table are so many times a number, so that they divide over
any mesh axis and fill a TPU's lanes."""


def table_rows(num_items: int) -> int:
  """Rows of an item table: padding and the items, up to `TABLE_MULTIPLE`."""
  return -(-(num_items + 1) // TABLE_MULTIPLE) * TABLE_MULTIPLE


class Embedding(nn.Module):
  """A lookup table; row 0 (padding) reads as zeros.

  Attributes:
    num_rows: rows, row 0 included.
    features: width.
    names: logical axes of the table.
    stddev: of the initial entries.
    zero_padding: whether id 0 gives zeros; code 0 of a semantic ID does not.
  """

  num_rows: int
  features: int
  names: tuple[str, str] = ("vocab", "table")
  stddev: float = 0.02
  zero_padding: bool = True

  def setup(self):
    self.table = self.param(
      "table",
      boxed(nn.initializers.normal(self.stddev), self.names),
      (self.num_rows, self.features),
    )

  def __call__(self, ids: Int[Array, "*batch"]) -> Float[Array, "*batch D"]:
    """Rows of the table."""
    rows = jnp.take(self.table, ids, axis=0, mode="clip")
    if self.zero_padding:
      rows = jnp.where((ids > 0)[..., None], rows, 0.0)
    return rows


def mix(bits: Array) -> Array:
  """Murmur3's finaliser, a bijection of 32-bit words."""
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
  bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35)
  return bits ^ (bits >> 16)


def dropout_mask(key: jax.Array, shape: Sequence[int], rate: float) -> Array:
  """A boolean keep-mask from a counter hashed with the key.

  An integer finaliser (Murmur3's) of the element's index: several times
  cheaper on CPU than threefry bits, and the same on every mesh since it
  depends on the global index alone.
  """
  words = jax.random.key_data(key).astype(jnp.uint32).reshape(-1)
  # Two scalars in which every bit of the key counts: words that differ in a
  # few low bits, as those of key(0) and key(1), would give correlated masks.
  early = mix(words[0] ^ mix(words[-1] ^ jnp.uint32(0x9E3779B9)))
  late = mix(words[-1] ^ early)
  bits = jnp.zeros(shape, jnp.uint32)
  stride = 1
  for axis in reversed(range(len(shape))):
    index = jax.lax.broadcasted_iota(jnp.uint32, tuple(shape), axis)
    bits = bits + index * jnp.uint32(stride & 0xFFFFFFFF)
    stride *= shape[axis]
  bits = (bits * jnp.uint32(0x9E3779B1)) ^ early
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
  bits = (bits ^ (bits >> 13)) * jnp.uint32(0xC2B2AE35) ^ late
  bits = (bits ^ (bits >> 16)) * jnp.uint32(0x85EBCA6B)
  bits = bits ^ (bits >> 13)
  return bits >= jnp.uint32(min(rate, 1.0) * 0xFFFFFFFF)


class Dropout(nn.Module):
  """Inverted dropout by `dropout_mask`; active iff a `dropout` key is given."""

  rate: float

  @nn.compact
  def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """Zeroes a share `rate` of the entries and scales the rest."""
    if self.rate == 0.0 or not self.has_rng("dropout"):
      return x
    keep = dropout_mask(self.make_rng("dropout"), x.shape, self.rate)
    return jnp.where(keep, x / (1.0 - self.rate), 0.0)
