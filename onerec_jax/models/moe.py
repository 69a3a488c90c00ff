"""Mixture of experts in place of a feed-forward block, balanced without a loss.

  MoE(x) = Σ_{i ∈ TopK} g_i(x) · SwiGLU_i(x)  [+ SwiGLU_shared(x)]

OneRec (arXiv 2502.18965 §3.2): s = softmax(x · e), g_i = s_i as it is, 24
experts, 2 of them a token. OneRec-V2 (arXiv 2508.20900 §3.3): 53 routed, 3 of
them a token, and one shared expert; its gates are INFERRED from DeepSeek-V3,
whose balancing it names: s = sigmoid(x · e), g renormalised over the chosen.

Balancing without a loss (arXiv 2408.15664; named by V1 and V2): the choice is
the top k of s + b, the gates are of s alone, and after every step
b_i += rate · sign(mean load − load_i); see `balance`.

No expert has a capacity and no token is dropped: copies of the tokens are
sorted by expert and multiplied group by group (grouped.py).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import traverse_util
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float, Int

from onerec_jax import model_configs, partitioning
from onerec_jax.models import grouped, layers

ROUTERS = ("sigmoid", "softmax")
"""What `router` may be."""

_NOWHERE = -1
"""The expert of padding: none."""


class MoE(nn.Module):
  """Routed and shared experts; see the module docstring.

  Attributes:
    num_experts: E, routed.
    experts_per_token: k.
    d_ff: F, the width of one expert.
    shared_experts: so many experts' width is always on, as one SwiGLU.
    router: `sigmoid`: affinities of the chosen, renormalised; `softmax`:
      affinities over all experts, as they are.
  """

  num_experts: int
  experts_per_token: int
  d_ff: int
  shared_experts: int = 0
  router: str = "sigmoid"

  @nn.compact
  def __call__(
    self, x: Float[Array, "*batch D"], weights: Float[Array, "*batch"]
  ) -> Float[Array, "*batch D"]:
    """Sends every token through its experts.

    Sows ("loads", "load"): [E] float32, real tokens routed to each expert.

    Args:
      x: tokens.
      weights: 1 at real tokens; 0 at padding, which goes to no routed expert.

    Raises:
      ValueError: an unknown router, or more experts a token than there are.
    """
    self._check()
    E, D = self.num_experts, x.shape[-1]
    tokens = x.reshape(-1, D)
    wi = _Kernel((E, D, 2 * self.d_ff), ("expert", "embed", "mlp"), name="wi")
    wo = _Kernel((E, self.d_ff, D), ("expert", "mlp", "embed"), name="wo")
    chosen, gates = self._route(tokens)
    real = weights.reshape(-1, 1) > 0
    chosen = jnp.where(real, chosen, _NOWHERE)
    self.sow(
      "loads",
      "load",
      jnp.sum(jax.nn.one_hot(chosen, E, dtype=jnp.float32), axis=(0, 1)),
      # A block may run twice, over the context and over the codes.
      init_fn=lambda: jnp.zeros(E),
      reduce_fn=jnp.add,
    )
    kernels = wi().astype(x.dtype), wo().astype(x.dtype)
    out = _run(tokens, chosen, gates, *kernels).reshape(x.shape)
    if self.shared_experts:
      width = self.shared_experts * self.d_ff
      out = out + layers.SwiGLU(width, name="shared")(x)
    return out

  def _check(self) -> None:
    if self.router not in ROUTERS:
      raise ValueError(
        f"router={self.router!r} of the experts: want one of {list(ROUTERS)}"
      )
    if not 1 <= self.experts_per_token <= self.num_experts:
      raise ValueError(
        f"experts_per_token={self.experts_per_token} must lie between 1 and "
        f"num_experts={self.num_experts}"
      )

  def _route(
    self, tokens: Float[Array, "N D"]
  ) -> tuple[Int[Array, "N k"], Float[Array, "N k"]]:
    """Experts of each token and their gates, in float32."""
    shape = (tokens.shape[-1], self.num_experts)
    kernel = _Kernel(shape, ("embed", None), name="router")()
    # In float32 and with whole products: which expert is chosen, and so the
    # whole output, turns on near ties.
    logits = jnp.matmul(
      tokens.astype(jnp.float32), kernel, precision=jax.lax.Precision.HIGHEST
    )
    bias = self.param(
      "balance_bias",
      layers.boxed(nn.initializers.zeros, ("norm",)),
      (self.num_experts,),
      jnp.float32,
    )
    if self.router == "softmax":
      affinity = jax.nn.softmax(logits)
    else:
      affinity = jax.nn.sigmoid(logits)
    # The bias decides who is chosen, never how much the chosen count.
    score = jax.lax.stop_gradient(affinity + bias[None])
    chosen = _top(score, self.experts_per_token)
    gates = jnp.take_along_axis(affinity, chosen, axis=-1)
    if self.router == "sigmoid":
      gates = gates / (jnp.sum(gates, axis=-1, keepdims=True) + 1e-20)
    return chosen, gates


def _top(score: Float[Array, "N E"], k: int) -> Int[Array, "N k"]:
  """The k best of each row, the lowest index among equals.

  By k maxima: the compiler would bring all rows to all devices of a mesh for
  `jax.lax.top_k`.
  """
  chosen = []
  for _ in range(k):
    best = jnp.argmax(score, axis=-1)
    chosen.append(best)
    taken = jax.nn.one_hot(best, score.shape[-1], dtype=jnp.bool_)
    score = jnp.where(taken, -jnp.inf, score)
  return jnp.stack(chosen, axis=-1)


class _Kernel(nn.Module):
  """The weights of a linear layer, or of one for every expert, by themselves.

  Attributes:
    shape: (…, input width, output width).
    names: logical axes.
  """

  shape: tuple[int, ...]
  names: tuple[str | None, ...]

  @nn.compact
  def __call__(self) -> Float[Array, "*experts D F"]:
    """The weights; variance 1 / input width at the start."""
    initializer = nn.initializers.variance_scaling(
      1.0,
      "fan_in",
      "truncated_normal",
      in_axis=-2,
      out_axis=-1,
      batch_axis=tuple(range(len(self.shape) - 2)),
    )
    return self.param(
      "kernel", layers.boxed(initializer, self.names), self.shape
    )


def _run(
  x: Float[Array, "N D"],
  chosen: Int[Array, "N k"],
  gates: Float[Array, "N k"],
  wi: Float[Array, "E D _"],
  wo: Float[Array, "E F D"],
) -> Float[Array, "N D"]:
  """The gated sum over each token's experts, on the mesh in force.

  On a mesh every device sorts tokens of its own: a global sort would bring
  all tokens to all devices. Tokens lie over every batch axis. The experts of a
  device get the tokens of the devices along `expert` by an all-gather and
  their sums return by a reduce-scatter: shapes are then static whatever the
  loads, where an all-to-all needs room for the worst of them. `tensor` splits
  the width of an expert.
  """
  if jax.sharding.get_abstract_mesh().size <= 1:
    return _experts(x, chosen, gates, wi, wo)
  expert, tensor = partitioning.RULES["expert"], partitioning.RULES["mlp"]

  def on_device(x, chosen, gates, wi, wo):
    wi = wi.reshape(*wi.shape[:2], -1)
    x, chosen, gates = (
      jax.lax.all_gather(a, expert, tiled=True) for a in (x, chosen, gates)
    )
    # Experts count from this device's first; others' fall outside.
    first = jax.lax.axis_index(expert) * wi.shape[0]
    out = _experts(x, chosen - first, gates, wi, wo)
    out = jax.lax.psum_scatter(out, expert, scatter_dimension=0, tiled=True)
    return jax.lax.psum(out, tensor)

  tokens = partitioning.spec(("batch", None))
  # Batches of any size: padding rows, which go to no expert.
  pad = ((0, -x.shape[0] % partitioning.shards("batch")), (0, 0))
  out = jax.shard_map(
    on_device,
    in_specs=(
      tokens,
      tokens,
      tokens,
      # Gate and input apart, so that a device gets the same part of both.
      partitioning.spec(("expert", None, None, "mlp")),
      partitioning.spec(("expert", "mlp", None)),
    ),
    out_specs=tokens,
    # What a kernel gives is not known to vary over the mesh. The price is one
    # more sum over `tensor` in the backward pass, the transpose of the last.
    check_vma=False,
  )(
    jnp.pad(x, pad),
    jnp.pad(chosen, pad, constant_values=_NOWHERE),
    jnp.pad(gates, pad),
    wi.reshape(*wi.shape[:2], 2, -1),
    wo,
  )
  return out[: x.shape[0]]


def _experts(
  x: Float[Array, "N D"],
  chosen: Int[Array, "N k"],
  gates: Float[Array, "N k"],
  wi: Float[Array, "E D _"],
  wo: Float[Array, "E F D"],
) -> Float[Array, "N D"]:
  """The gated sum over those of a token's experts that are among these E.

  Args:
    x: tokens.
    chosen: their experts; outside 0 … E − 1: not here, adds nothing.
    gates: weights of the sum, float32.
    wi: gate and input of the SwiGLUs, side by side.
    wo: output of the SwiGLUs.
  """
  (N, k), E = chosen.shape, wi.shape[0]
  expert = chosen.reshape(-1)
  expert = jnp.where((expert >= 0) & (expert < E), expert, E)
  sizes = jnp.sum(
    expert[:, None] == jnp.arange(E)[None], axis=0, dtype=jnp.int32
  )
  order = jnp.argsort(expert)
  # Copies for others come after the last group, where a ragged product may
  # hold anything: they are masked on both sides, so no gradient passes.
  here = (jnp.arange(N * k) < jnp.sum(sizes))[:, None]
  rows = jnp.where(here, x[order // k], 0)
  # Worth keeping where products are, whose policy knows dense ones alone.
  keep = functools.partial(checkpoint_name, name="grouped")
  hidden = layers.gated(keep(grouped.dot(rows, wi, sizes)))
  out = keep(grouped.dot(hidden, wo, sizes))
  out = jnp.where(here, out, 0)
  copies = jnp.zeros_like(out).at[order].set(out, unique_indices=True)
  # Gates are float32, so the sum over copies is too.
  total = jnp.einsum("nkd,nk->nd", copies.reshape(N, k, -1), gates)
  return total.astype(x.dtype)


def balance(params: Any, loads: Any, rate: float | Float[Array, ""]) -> Any:
  """Moves the balancing biases: b_i += rate · sign(mean load − load_i).

  Args:
    params: of a model.
    loads: its "loads" collection of the step; empty without experts. Arrays
      [E], or [num_layers, E] of scanned layers.
    rate: of one step; 1e-3 in DeepSeek-V3, INFERRED for OneRec.

  Returns:
    The parameters, changed in `balance_bias` alone.

  Raises:
    ValueError: loads of a module that has no bias in `params`.
  """
  flat = traverse_util.flatten_dict(params, keep_empty_nodes=True)
  for path, load in traverse_util.flatten_dict(loads).items():
    bias = (*path[:-1], "balance_bias")
    if bias not in flat:
      raise ValueError(
        f"loads of {'/'.join(path[:-1])}, but the parameters have no "
        f"{'/'.join(bias)}; pass loads and parameters of the same model"
      )
    mean = jnp.mean(load, axis=-1, keepdims=True)
    flat[bias] = flat[bias] + rate * jnp.sign(mean - load)
  return traverse_util.unflatten_dict(flat)


def max_load(loads: Any) -> Float[Array, ""]:
  """The largest over layers of (largest load / mean load); 1 is balance.

  Args:
    loads: as in `balance`; a layer that saw no token counts 0.

  Raises:
    ValueError: no loads.
  """
  ratios = [
    jnp.max(
      jnp.max(load, axis=-1)
      # Loads are counts: a mean below 1 / E is 0.
      / jnp.maximum(jnp.mean(load, axis=-1), 1 / load.shape[-1])
    )
    for load in jax.tree.leaves(loads)
  ]
  if not ratios:
    raise ValueError(
      "no loads: the model has no experts, or apply was not given mutable="
      '["loads"]'
    )
  return jnp.max(jnp.stack(ratios))


def forward_flops(
  tokens: int | float, D: int, F: int, k: int, shared: int, E: int
) -> float:
  """Multiply-adds ×2 of one layer's forward pass: router, active experts.

  Args:
    tokens: real ones.
    D: model width.
    F: width of one expert.
    k: routed experts of a token.
    shared: shared experts.
    E: routed experts.
  """
  return 2.0 * tokens * (D * E + (k + shared) * 3 * D * F)


def has_experts(config: model_configs.MoEConfig, layer: int) -> bool:
  """Whether block `layer` (from 0) has experts."""
  after = layer - config.dense_layers
  return bool(config.num_experts) and after >= 0 and after % config.every == 0


def feed_forwards(
  config: model_configs.MoEConfig,
  dense: Callable[..., nn.Module],
  num_layers: int,
) -> list[Callable[..., nn.Module]]:
  """What makes the feed-forward of each block: `dense`, or experts.

  Both kinds of module take (x, real); see `MoE`.
  """
  experts = functools.partial(
    MoE,
    config.num_experts,
    config.experts_per_token,
    config.d_ff,
    config.shared_experts,
    config.router,
  )
  return [
    experts if has_experts(config, layer) else dense
    for layer in range(num_layers)
  ]


def active_parameters(
  config: model_configs.MoEConfig, D: int, dense: int, num_layers: int
) -> int:
  """Parameters that one token meets in the feed-forwards of all blocks.

  Args:
    config: of the experts.
    D: model width.
    dense: parameters of a dense feed-forward.
    num_layers: blocks.
  """
  active = config.experts_per_token + config.shared_experts
  experts = config.num_experts * D + active * 3 * D * config.d_ff
  return sum(
    experts if has_experts(config, layer) else dense
    for layer in range(num_layers)
  )
