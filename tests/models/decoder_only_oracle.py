"""The decoder-only model in plain numpy, one whole sequence for each target.

Unlike the library it runs the context again for every target: the positions
of the segment, then the codes, through every block with one causal mask.
`forward` shares no code with the library.
"""

import numpy as np

from tests.models import numpy_parts as parts


def forward(model, params, batch, catalogue, row, target, token, events):
  """Logits of every level of one target.

  Args:
    model: a decoder-only model on the data of tests/tiny.py.
    params: its parameters.
    batch: the batch.
    catalogue: the catalogue.
    row: of the target.
    target: its number in the row.
    token: position of the user token it sees.
    events: positions of the events it sees, oldest first.
  """
  p = parts.float64(params)
  H = model.num_heads
  last = [token, *events][-1]
  positions = [s for s in parts.segment_of(batch, row, token) if s <= last]
  C = len(positions)
  x = [
    parts.embed(p, batch, catalogue, row, s) @ p["project"]["kernel"]
    for s in positions
  ]
  x += parts.code_inputs(p, catalogue, int(batch.targets[row, target]))

  def sees(i, j):
    # A code's window may start later than the segment; a position's does not.
    return j <= i and (i < C or j >= C or positions[j] in (token, *events))

  def bias(i, j):
    if j >= C:
      return np.zeros(H)
    here = positions[i] if i < C else last
    distance = here - positions[j]
    return parts.distance_bias(
      p["distance_bias"], distance, positions[j] == token
    )

  for layer in range(model.num_layers):
    b = p[f"blocks_{layer}"]
    qkv = [
      np.split(parts.norm(h, b["norm"]) @ b["qkv"]["kernel"], 3) for h in x
    ]
    for i in range(len(x)):
      seen = [j for j in range(len(x)) if sees(i, j)]
      k, v = ([qkv[j][part] for j in seen] for part in (1, 2))
      own = np.stack([bias(i, j) for j in seen], axis=1)
      h = parts.attend(qkv[i][0], k, v, H, H, own)
      x[i] = x[i] + h @ b["out"]["kernel"]
    for i in range(len(x)):
      h = parts.norm(x[i], b["ffn_norm"])
      x[i] = x[i] + parts.feed_forward(b["ffn"], h, model.moe)
  return parts.heads_of(p, x[C:])
