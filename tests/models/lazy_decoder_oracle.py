"""The lazy decoder in plain numpy: loops over positions, heads and levels.

Written from V2 §3.2-3.3; `forward` shares no code with the library.
"""

import jax
import numpy as np

from tests import tiny


def logits_of(model, params, batch, catalogue, **kwargs):
  """The library's own logits, as numpy."""
  apply = tiny.jit(lambda p, b, c: model.apply({"params": p}, b, c, **kwargs))
  return [np.asarray(x) for x in apply(params, batch, catalogue)]


def _norm(x, scale):
  return x / np.sqrt((x * x).mean() + 1e-6) * scale


def _softmax(x):
  e = np.exp(x - x.max())
  return e / e.sum()


def _bucket(distance):
  if distance < 32:
    return distance
  return min(47, 32 + int(16 * np.log(distance / 32) / np.log(2048)))


def _embed(p, batch, codes, category, row, position):
  """The concatenated embedding of one context position."""
  p = p["embedding"]
  item = int(batch.items[row, position])
  width = p["codes_0"]["table"].shape[1]
  parts = []
  for level in range(len(tiny.CODEBOOK_SIZES)):
    table = p[f"codes_{level}"]["table"]
    parts.append(table[codes[item, level]] if item else np.zeros(width))
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


def _attend(q, keys, values, heads, groups, bias):
  """One query [D] over rows of keys; `heads` share `groups` of keys."""
  width = len(q) // heads
  out = []
  for head in range(heads):
    group = head // (heads // groups)
    part = slice(group * width, (group + 1) * width)
    query = q[head * width : (head + 1) * width]
    scores = [query @ k[part] / np.sqrt(width) for k in keys]
    weights = _softmax(np.asarray(scores) + bias[head])
    out.append(sum(w * v[part] for w, v in zip(weights, values)))
  return np.concatenate(out)


def forward(model, params, batch, catalogue, row, target, token, events):
  """Logits of every level of one target.

  Args:
    model: a lazy decoder on the data of tests/tiny.py, unrolled.
    params: its parameters.
    batch: the batch.
    catalogue: the catalogue.
    row: of the target.
    target: its number in the row.
    token: position of the user token it sees.
    events: positions of the events it sees, oldest first.
  """
  p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  codes = np.asarray(catalogue.codes)
  category = np.asarray(catalogue.features["category"])
  D, H, G = model.d_model, model.num_heads, model.num_kv_heads
  width = G * D // H
  positions = [token, *events]
  keys, values = {}, {}
  for kv in range(model.kv_layers):
    keys[kv], values[kv] = [], []
    for s in positions:
      c = _embed(p, batch, codes, category, row, s) @ p["project"]["kernel"]
      chunk = c[kv * model.kv_split * width :][:width]
      keys[kv].append(_norm(chunk, p[f"key_norms_{kv}"]["scale"]))
      if model.kv_split == 1:
        values[kv].append(keys[kv][-1])
      else:
        chunk = c[(kv * 2 + 1) * width :][:width]
        values[kv].append(_norm(chunk, p[f"value_norms_{kv}"]["scale"]))
  last = positions[-1]
  table = p["distance_bias"]["table"]
  bias = np.stack(
    [table[48]] + [table[_bucket(last - s)] for s in events], axis=1
  )
  item = int(batch.targets[row, target])
  x = [p["codes"]["bos"]]
  for level in range(len(tiny.CODEBOOK_SIZES) - 1):
    x.append(p["codes"][f"tables_{level}"]["table"][codes[item, level]])
  for layer in range(model.num_layers):
    b = p[f"layers_{layer}"]
    kv = int(np.floor(layer * model.kv_layers / model.num_layers))
    for n in range(len(x)):
      q = _norm(x[n], b["cross_norm"]["scale"]) @ b["cross_q"]["kernel"]
      h = _attend(q, keys[kv], values[kv], H, G, bias)
      x[n] = x[n] + h @ b["cross_o"]["kernel"]
    qkv = [
      np.split(_norm(h, b["self_norm"]["scale"]) @ b["self_qkv"]["kernel"], 3)
      for h in x
    ]
    for n in range(len(x)):
      k, v = ([other[i] for other in qkv[: n + 1]] for i in (1, 2))
      h = _attend(qkv[n][0], k, v, H, H, np.zeros((H, n + 1)))
      x[n] = x[n] + h @ b["self_o"]["kernel"]
    for n in range(len(x)):
      h = _norm(x[n], b["ffn_norm"]["scale"]) @ b["ffn"]["wi"]["kernel"]
      gate, value = np.split(h, 2)
      h = gate / (1 + np.exp(-gate)) * value
      x[n] = x[n] + h @ b["ffn"]["wo"]["kernel"]
  return [
    _norm(h, p["codes"][f"norms_{n}"]["scale"])
    @ p["codes"][f"heads_{n}"]["kernel"]
    for n, h in enumerate(x)
  ]
