"""Random experts, and what they give: a loop over tokens and experts."""

import jax
import jax.numpy as jnp
import numpy as np

D, F, E = 8, 6, 5
SHAPE = (3, 7)
PADDING = [(0, 6), (2, 3), (2, 4), (2, 5), (2, 6)]


def draw(*shape, seed=0):
  x = np.random.default_rng(seed).normal(size=shape)
  return jnp.asarray(x, jnp.float32)


def inputs():
  weights = np.ones(SHAPE, np.float32)
  weights[tuple(zip(*PADDING))] = 0
  return draw(*SHAPE, D), jnp.asarray(weights)


def parameters(module, experts=E):
  """Random ones, the bias large enough to change choices."""
  params = {
    "router": {"kernel": draw(D, experts, seed=1) / 2},
    "balance_bias": draw(experts, seed=2) / 3,
    "wi": {"kernel": draw(experts, D, 2 * F, seed=3) / 2},
    "wo": {"kernel": draw(experts, F, D, seed=4) / 2},
  }
  if module.shared_experts:
    width = module.shared_experts * F
    params["shared"] = {
      "wi": {"kernel": draw(D, 2 * width, seed=5) / 2},
      "wo": {"kernel": draw(width, D, seed=6) / 2},
    }
  return params


def apply(module, params, x, weights):
  """(output, loads)."""
  out, sown = module.apply({"params": params}, x, weights, mutable=["loads"])
  return out, sown["loads"]["load"]


run = jax.jit(apply, static_argnums=0)


def routing(module, params, x, weights):
  """Gates [N, E], 0 where not chosen, by sorting one token at a time."""
  wide = lambda a: np.asarray(a, np.float64)
  gates = np.zeros((x.shape[0], module.num_experts))
  for n, (token, real) in enumerate(zip(wide(x), np.asarray(weights))):
    logits = token @ wide(params["router"]["kernel"])
    affinity = 1 / (1 + np.exp(-logits))
    if module.router == "softmax":
      affinity = np.exp(logits) / np.sum(np.exp(logits))
    score = affinity + wide(params["balance_bias"])
    chosen = sorted(range(module.num_experts), key=lambda e: -score[e])
    chosen = chosen[: module.experts_per_token] if real else []
    total = sum(affinity[e] for e in chosen)
    for e in chosen:
      gates[n, e] = affinity[e] / (total if module.router == "sigmoid" else 1)
  return gates


def swiglu(x, wi, wo, backend=np):
  half = wi.shape[-1] // 2
  gate, value = x @ wi[:, :half], x @ wi[:, half:]
  return (gate / (1 + backend.exp(-gate)) * value) @ wo


def by_loop(module, params, x, weights):
  """(output, loads) by a loop over tokens and experts in float64."""
  rows = np.asarray(x, np.float64).reshape(-1, D)
  params = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  gates = routing(module, params, rows, weights.reshape(-1))
  out = np.zeros_like(rows)
  for n, e in zip(*np.nonzero(gates)):
    kernels = params["wi"]["kernel"][e], params["wo"]["kernel"][e]
    out[n] += gates[n, e] * swiglu(rows[n], *kernels)
  if module.shared_experts:
    shared = params["shared"]
    out += swiglu(rows, shared["wi"]["kernel"], shared["wo"]["kernel"])
  return out.reshape(x.shape), np.sum(gates > 0, axis=0)
