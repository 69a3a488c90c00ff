"""The reward models in plain numpy, one candidate at a time.

Written from OneRec §3.4 and OneRec-V1 §2.5; none of it is the library's.
"""

import numpy as np

from tests import tiny
from tests.models import numpy_parts as parts


def rows(model, params, batch, catalogue, row, token, events, items):
  """(aware, plain) vectors of some items for one target's context."""
  p = parts.float64(params)
  readable = {**p, "codes": {}}
  context = []
  for position in [token, *events]:
    x = parts.embed(readable, batch, catalogue, row, position)
    context.append(parts.norm(x @ p["project"]["kernel"], p["context_norm"]))
  bias = [parts.distance_bias(p["distance_bias"], 0, True)]
  last = events[-1] if events else token
  for event in events:
    bias.append(parts.distance_bias(p["distance_bias"], last - event, False))
  bias = np.stack(bias, axis=1)
  plain = [
    parts.norm(
      _candidate(p, catalogue, item) @ p["item_project"]["kernel"],
      p["item_norm"],
    )
    for item in items
  ]
  aware = []
  for v in plain:
    x = v
    for layer in range(model.num_layers):
      b = p[f"layers_{layer}"]
      q = parts.norm(x, b["norm"]) @ b["look"]["kernel"]
      keys = [z @ b["look"]["kernel"] for z in context]
      values = [z @ b["values"]["kernel"] for z in context]
      heads = model.num_heads
      h = parts.attend(q, keys, values, heads, heads, bias)
      x = x + h @ b["out"]["kernel"]
      h = parts.norm(x, b["ffn_norm"])
      x = x + parts.swiglu(
        b["ffn"]["wi"]["kernel"], b["ffn"]["wo"]["kernel"], h
      )
    aware.append(parts.norm(x, p["norm"]))
  return aware, plain


def _candidate(p, catalogue, item):
  """An item by the context's tables, without an event's own features."""
  p = p["embedding"]
  found = [
    p[f"codes_{level}"]["table"][int(catalogue.codes[item, level])]
    for level in range(len(tiny.CODEBOOK_SIZES))
  ]
  category = int(catalogue.features["category"][item])
  table = p["feature_item_category"]["table"]
  found += [p["item"]["table"][item], table[category] * (category > 0)]
  return np.concatenate([*found, np.zeros(3 * table.shape[1])])


def towers(p, x):
  """Logits and hidden states of each tower."""
  number, width = p["out"].shape
  hidden = parts.gelu(x @ p["in"]["kernel"]).reshape(number, width)
  logits = [h @ w + b for h, w, b in zip(hidden, p["out"], p["bias"])]
  return np.stack(logits), hidden


def p_score(model, params, batch, catalogue, row, token, events, item):
  """Logits of every objective, and the P-Score's last."""
  p = parts.float64(params)
  (e,), (v,) = rows(model, params, batch, catalogue, row, token, events, [item])
  logits, hidden = towers(p["towers"], e)
  fused, _ = towers(p["fused"], np.concatenate([hidden.ravel(), e, v]))
  return np.append(logits, fused)


def session(model, params, batch, catalogue, row, token, events, items):
  """Logits of every objective for a session."""
  p = parts.float64(params)
  aware, _ = rows(model, params, batch, catalogue, row, token, events, items)
  b, heads = p["among"], model.num_heads
  projected = [
    np.split(parts.norm(x, b["norm"]) @ b["qkv"]["kernel"], 3) for x in aware
  ]
  total = 0.0
  for x, (q, _, _) in zip(aware, projected):
    keys, values = zip(*((k, v) for _, k, v in projected))
    h = parts.attend(
      q, keys, values, heads, heads, np.zeros((heads, len(keys)))
    )
    x = x + h @ b["out"]["kernel"]
    h = parts.norm(x, b["ffn_norm"])
    x = x + parts.swiglu(b["ffn"]["wi"]["kernel"], b["ffn"]["wo"]["kernel"], h)
    total = total + parts.norm(x, p["among_norm"])
  return towers(p["towers"], total)[0]
