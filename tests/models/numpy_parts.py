"""What the oracles of the generators share, in plain numpy, one vector at a
time; none of it is the library's."""

import functools

import jax
import numpy as np

from tests import tiny

TOKEN_BUCKET = 48
"""The distance bias of a user token."""


@functools.cache
def _apply(model):
  return jax.jit(
    lambda p, b, c, rngs: model.apply({"params": p}, b, c, rngs=rngs)
  )


def logits_of(model, params, batch, catalogue, rngs=None):
  """The library's own logits, as numpy."""
  found = _apply(model)(params, batch, catalogue, rngs)
  return [np.asarray(x) for x in found]


def assert_equals_library(model, forward, batch, catalogue, rngs=None):
  """Every target's logits against `forward(…, row, target, token, events)`."""
  params = tiny.params(model)
  found = logits_of(model, params, batch, catalogue, rngs)
  for (row, target), (token, events) in tiny.SEES.items():
    expected = forward(
      model, params, batch, catalogue, row, target, token, events
    )
    for level, logits in enumerate(expected):
      np.testing.assert_allclose(
        found[level][row, target], logits, atol=2e-4, rtol=2e-4
      )


def float64(params):
  return jax.tree.map(lambda x: np.asarray(x, np.float64), params)


def norm(x, p):
  return x / np.sqrt((x * x).mean() + 1e-6) * p["scale"]


def softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def bucket(distance):
  """Exact below 32, then sixteen over eleven octaves."""
  if distance < 32:
    return distance
  return min(47, 32 + int(16 * np.log(distance / 32) / np.log(2048)))


def distance_bias(p, distance, is_token):
  """Of every head."""
  return p["table"][TOKEN_BUCKET if is_token else bucket(distance)]


def embed(p, batch, catalogue, row, position):
  """The concatenated embedding of one context position."""
  shared, p = p["codes"], p["embedding"]
  codes = np.asarray(catalogue.codes)
  category = np.asarray(catalogue.features["category"])
  item = int(batch.items[row, position])
  parts = []
  for level in range(len(tiny.CODEBOOK_SIZES)):
    if "codes_0" in p:
      table = p[f"codes_{level}"]["table"]
    elif "tables_2" in shared:
      table = shared[f"tables_{level}"]["table"]
    else:
      break
    parts.append(table[codes[item, level]] if item else 0 * table[0])
  if "item" in p:
    table = p["item"]["table"]
    parts.append(table[item] if item else 0 * table[0])
  values = [("item_category", category[item])]
  values += [(n, int(v[row, position])) for n, v in batch.features.items()]
  values += [("user_token", int(item == 0))]
  for name, value in values:
    table = p[f"feature_{name}"]["table"]
    parts.append(table[value] if value else 0 * table[0])
  return np.concatenate(parts)


def segment_of(batch, row, token):
  """Every position of a user token's segment, in order."""
  segment = np.asarray(batch.segment[row])
  return np.flatnonzero(segment == segment[token]).tolist()


def code_inputs(p, catalogue, item):
  """BOS and all codes of an item but the last."""
  codes = np.asarray(catalogue.codes)[item]
  tables = [p["codes"][f"tables_{level}"]["table"] for level in (0, 1)]
  return [p["codes"]["bos"], *(t[c] for t, c in zip(tables, codes))]


def heads_of(p, x):
  """Logits of every level from its position."""
  p = p["codes"]
  return [
    norm(h, p[f"norms_{level}"]) @ p[f"heads_{level}"]["kernel"]
    for level, h in enumerate(x)
  ]


def attend(q, keys, values, heads, groups, bias):
  """One query [D] over rows of keys; `heads` share `groups` of keys.

  Args:
    q: the query.
    keys: a list of [groups · Z].
    values: likewise.
    heads: query heads.
    groups: key heads.
    bias: [heads, len(keys)].
  """
  width = len(q) // heads
  out = []
  for head in range(heads):
    group = head // (heads // groups)
    part = slice(group * width, (group + 1) * width)
    query = q[head * width : (head + 1) * width]
    scores = [query @ k[part] / np.sqrt(width) for k in keys]
    weights = softmax(np.asarray(scores) + bias[head])
    out.append(sum(w * v[part] for w, v in zip(weights, values)))
  return np.concatenate(out)


def swiglu(wi, wo, x):
  gate, value = np.split(x @ wi, 2)
  return (gate / (1 + np.exp(-gate)) * value) @ wo


def gelu(x):
  """By its tanh form, as JAX has it."""
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def experts(p, config, x):
  """Gated sum over the chosen experts, and the shared ones."""
  logits = x @ p["router"]["kernel"]
  if config.router == "softmax":
    affinity = softmax(logits)
  else:
    affinity = 1 / (1 + np.exp(-logits))
  ranked = np.argsort(-(affinity + p["balance_bias"]))
  chosen = ranked[: config.experts_per_token]
  gates = affinity[chosen]
  if config.router == "sigmoid":
    gates = gates / gates.sum()
  wi, wo = p["wi"]["kernel"], p["wo"]["kernel"]
  out = sum(g * swiglu(wi[i], wo[i], x) for g, i in zip(gates, chosen))
  if config.shared_experts:
    own = p["shared"]
    out = out + swiglu(own["wi"]["kernel"], own["wo"]["kernel"], x)
  return out


def feed_forward(p, x, moe, kind="swiglu"):
  """A block's feed-forward: experts where it has a router.

  Args:
    p: of the feed-forward.
    x: one token.
    moe: MoEConfig of the model.
    kind: of a dense one, `swiglu` or `mlp`.
  """
  if "router" in p:
    return experts(p, moe, x)
  wi, wo = p["wi"]["kernel"], p["wo"]["kernel"]
  if kind == "mlp":
    return gelu(x @ wi) @ wo
  return swiglu(wi, wo, x)
