"""The session-wise decoder in plain numpy, written from OneRec §1.3."""

from tests.models import encoder_decoder_oracle
from tests.models import numpy_parts as parts


def forward(model, params, batch, catalogue, row, session, token, events):
  """Logits of every item and level of one session, by loops.

  Args:
    model: a session decoder on the data of tests/tiny.py.
    params: its parameters.
    batch: the batch, its targets sessions of model.session_items.
    catalogue: the catalogue.
    row: of the session.
    session: its number in the row.
    token: position of the user token it sees.
    events: positions of the events it sees, oldest first.
  """
  p, m = parts.float64(params), model.session_items
  L = len(model.codebook_sizes)
  x = []
  for place in range(m):
    item = int(batch.targets[row, session * m + place])
    last = p["last_codes"]["table"][int(catalogue.codes[item, -1])]
    inputs = [*parts.code_inputs(p, catalogue, item), last]
    x += [h + p["places"]["table"][place] for h in inputs]
  x = encoder_decoder_oracle.decode(
    model, p, batch, catalogue, row, token, events, x
  )
  return [parts.heads_of(p, x[place * (L + 1) :][:L]) for place in range(m)]
