"""The lazy decoder in plain numpy: loops over positions, heads and levels.

Written from V2 §3.2-3.3; `forward` shares no code with the library.
"""

import numpy as np

from tests.models import numpy_parts as parts


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
  p = parts.float64(params)
  D, H, G = model.d_model, model.num_heads, model.num_kv_heads
  width = G * D // H
  positions = [token, *events]
  keys, values = {}, {}
  for kv in range(model.kv_layers):
    keys[kv], values[kv] = [], []
    for s in positions:
      embedded = parts.embed(p, batch, catalogue, row, s)
      c = embedded @ p["project"]["kernel"]
      chunk = c[kv * model.kv_split * width :][:width]
      keys[kv].append(parts.norm(chunk, p[f"key_norms_{kv}"]))
      if model.kv_split == 1:
        values[kv].append(keys[kv][-1])
      else:
        chunk = c[(kv * 2 + 1) * width :][:width]
        values[kv].append(parts.norm(chunk, p[f"value_norms_{kv}"]))
  bias = np.stack(
    [
      parts.distance_bias(p["distance_bias"], positions[-1] - s, s == token)
      for s in positions
    ],
    axis=1,
  )
  x = parts.code_inputs(p, catalogue, int(batch.targets[row, target]))
  for layer in range(model.num_layers):
    b = p[f"layers_{layer}"]
    kv = int(np.floor(layer * model.kv_layers / model.num_layers))
    for n in range(len(x)):
      q = parts.norm(x[n], b["cross_norm"]) @ b["cross_q"]["kernel"]
      h = parts.attend(q, keys[kv], values[kv], H, G, bias)
      x[n] = x[n] + h @ b["cross_o"]["kernel"]
    qkv = [
      np.split(parts.norm(h, b["self_norm"]) @ b["self_qkv"]["kernel"], 3)
      for h in x
    ]
    for n in range(len(x)):
      k, v = ([other[i] for other in qkv[: n + 1]] for i in (1, 2))
      h = parts.attend(qkv[n][0], k, v, H, H, np.zeros((H, n + 1)))
      x[n] = x[n] + h @ b["self_o"]["kernel"]
    for n in range(len(x)):
      h = parts.norm(x[n], b["ffn_norm"])
      x[n] = x[n] + parts.feed_forward(b["ffn"], h, model.moe)
  return parts.heads_of(p, x)
