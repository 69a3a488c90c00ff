"""The encoder-decoder in plain numpy: loops over positions and heads.

Written from V1 §2.3; it shares no code with the library.
"""

import numpy as np

from tests.models import numpy_parts as parts


def _encode(model, p, batch, catalogue, row, token):
  """Position → its encoded state, of one segment."""
  H = model.num_heads
  segment = parts.segment_of(batch, row, token)
  z = {
    s: parts.embed(p, batch, catalogue, row, s) @ p["project"]["kernel"]
    for s in segment
  }
  for layer in range(model.encoder_layers):
    b = p[f"encoder_{layer}"]
    qkv = {
      s: np.split(parts.norm(z[s], b["norm"]) @ b["qkv"]["kernel"], 3)
      for s in segment
    }
    for s in segment:
      seen = [t for t in segment if t <= s or not model.causal_encoder]
      bias = np.stack(
        [
          parts.distance_bias(p["encoder_bias"], abs(s - t), t == token)
          for t in seen
        ],
        axis=1,
      )
      k, v = ([qkv[t][i] for t in seen] for i in (1, 2))
      h = parts.attend(qkv[s][0], k, v, H, H, bias)
      z[s] = z[s] + h @ b["out"]["kernel"]
    for s in segment:
      h = parts.norm(z[s], b["ffn_norm"])
      z[s] = z[s] + parts.feed_forward(
        b["ffn"], h, model.moe, model.feed_forward
      )
  return {s: parts.norm(h, p["encoder_norm"]) for s, h in z.items()}


def forward(model, params, batch, catalogue, row, target, token, events):
  """Logits of every level of one target.

  Args:
    model: an encoder-decoder on the data of tests/tiny.py.
    params: its parameters.
    batch: the batch.
    catalogue: the catalogue.
    row: of the target.
    target: its number in the row.
    token: position of the user token it sees.
    events: positions of the events it sees, oldest first.
  """
  p = parts.float64(params)
  x = parts.code_inputs(p, catalogue, int(batch.targets[row, target]))
  x = decode(model, p, batch, catalogue, row, token, events, x)
  return parts.heads_of(p, x)


def decode(model, p, batch, catalogue, row, token, events, x):
  """Runs the decoder over its inputs; arguments as in `forward`.

  Args:
    p: parameters in float64.
    x: a list of inputs [D], attending each to itself and those before it.
  """
  H, x = model.num_heads, list(x)
  # The whole segment is encoded; of that the target sees its own positions.
  z = _encode(model, p, batch, catalogue, row, token)
  positions = [token, *events]
  bias = np.stack(
    [
      parts.distance_bias(p["distance_bias"], positions[-1] - s, s == token)
      for s in positions
    ],
    axis=1,
  )
  for layer in range(model.decoder_layers):
    b = p[f"decoder_{layer}"]
    qkv = [
      np.split(parts.norm(h, b["self_norm"]) @ b["self_qkv"]["kernel"], 3)
      for h in x
    ]
    for n in range(len(x)):
      k, v = ([other[i] for other in qkv[: n + 1]] for i in (1, 2))
      h = parts.attend(qkv[n][0], k, v, H, H, np.zeros((H, n + 1)))
      x[n] = x[n] + h @ b["self_o"]["kernel"]
    kv = [np.split(z[s] @ b["cross_kv"]["kernel"], 2) for s in positions]
    k, v = zip(*kv)
    for n in range(len(x)):
      q = parts.norm(x[n], b["cross_norm"]) @ b["cross_q"]["kernel"]
      h = parts.attend(q, k, v, H, H, bias)
      x[n] = x[n] + h @ b["cross_o"]["kernel"]
    for n in range(len(x)):
      h = parts.norm(x[n], b["ffn_norm"])
      x[n] = x[n] + parts.feed_forward(
        b["ffn"], h, model.moe, model.feed_forward
      )
  return x
