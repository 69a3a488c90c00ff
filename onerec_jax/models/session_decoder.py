"""OneRec's session-wise model (arXiv 2502.18965 §1.3; reference §1.3).

One answer is a session of m items. The encoder is that of encoder_decoder.py,
with full self-attention; the decoder runs over the whole session,

  BOS s_1^1 … s_1^L  BOS s_2^1 … s_2^L  …  BOS s_m^1 … s_m^L

causally, with cross-attention to the context and 24 experts, 2 of them a
token, whose softmax gates are kept as they are. Each BOS predicts level 1 of
its item, the code of level l predicts level l + 1, and the code of level L
predicts nothing: what follows is the fixed BOS. The last one is therefore left
out, so a session has m(L + 1) − 1 positions, and with m = 1 this is the model
of encoder_decoder.py, parameter by parameter.

INFERRED: a learned embedding of the item's place 1 … m is added to every
input. The level needs none, since every level's codes have a table of their
own.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from onerec_jax.data import batch as batch_lib
from onerec_jax.models import encoder_decoder, layers


class SessionDecoder(encoder_decoder.EncoderDecoder):
  """The model; fields beyond those of EncoderDecoder.

  `encode` takes a batch with one target a session: a session's items all see
  what came before its request.

  Attributes:
    session_items: m.
  """

  session_items: int

  def setup(self):
    super().setup()
    if self.session_items > 1:
      D = self.d_model
      self.places = layers.Embedding(
        self.session_items, D, ("vocab", "table"), 1.0, zero_padding=False
      )
      self.last_codes = layers.Embedding(
        self.codebook_sizes[-1], D, ("codes", "table"), 1.0, zero_padding=False
      )

  def __call__(
    self,
    batch: batch_lib.Batch,
    catalogue: batch_lib.Catalogue,
  ) -> tuple[Float[Array, "B T _"], ...]:
    """Teacher-forced logits [B, T, K_l] of every level, in float32.

    Args:
      batch: its targets are sessions of m, one after the other, whole or
        empty; fewer than m targets are the beginning of one session.
      catalogue: of the items.

    Raises:
      ValueError: the targets are not whole sessions.
    """
    B, T = batch.targets.shape
    m, L = min(self.session_items, T), len(self.codebook_sizes)
    if T % m:
      raise ValueError(
        f"{T} targets a row are no sessions of {m}; set pipeline.row_targets "
        "to a multiple of model.session_items"
      )
    sessions = one_target_a_session(batch, m)
    context = self.encode(sessions, catalogue)
    codes = jnp.take(catalogue.codes, batch.targets, axis=0)
    x = self._inputs(codes.reshape(B, T // m, m, L))
    real = (sessions.targets > 0).astype(jnp.float32)
    x, _ = self._decode(self.drop(x), context, real, None)
    # The position after the last is only there to make the shape whole.
    x = jnp.pad(x, ((0, 0), (0, 0), (0, 1), (0, 0)))
    x = x.reshape(B, T, L + 1, self.d_model)[:, :, :L]
    return self.codes.all_logits(x)

  def decode_step(
    self,
    step: int,
    previous: Int[Array, "B W"] | None,
    cache: tuple[Array, Array] | None,
    context: encoder_decoder.Context,
  ) -> tuple[Float[Array, "B W _"], tuple[Array, Array]]:
    """Logits of one level of one item, for W beams.

    Args:
      step: static; L · place + level, counted from 0.
      previous: the codes chosen at the step before; None at the first.
      cache: as returned by the step before, beams in the order of `previous`.
      context: by `encode`.

    Returns:
      Logits and the cache [layers, B, W, positions, H, Z] of keys and values.
    """
    L, rows = len(self.codebook_sizes), context.bias.shape[0]
    place, level = divmod(step, L)
    x = self.codes.step_input(level, previous if level else None, rows)
    x = self._at_place(x, place)
    if place and not level:
      # The item before ends with its last code; only then comes BOS.
      last = self.last_codes(previous)[:, :, None].astype(self.dtype)
      last = self._at_place(last, place - 1)
      x = jnp.concatenate([last, jnp.broadcast_to(x, last.shape)], axis=2)
    x, cache = self._decode(x, context, jnp.ones(x.shape[:2]), cache)
    return self.codes.logits(level, x[:, :, -1]), cache

  def _inputs(
    self, codes: Int[Array, "B T m L"]
  ) -> Float[Array, "B T positions D"]:
    """Inputs of whole sessions but for the last code of each."""
    B, T, m, L = codes.shape
    x = self.codes.inputs(codes.reshape(B, T * m, L))
    if self.session_items == 1:
      return x
    x = x.reshape(B, T, m, L, self.d_model)
    last = self.last_codes(codes[..., -1:]).astype(self.dtype)
    places = self.places(jnp.arange(m)).astype(self.dtype)
    x = jnp.concatenate([x, last], axis=3) + places[None, None, :, None]
    return x.reshape(B, T, m * (L + 1), self.d_model)[:, :, :-1]

  def _at_place(
    self, x: Float[Array, "B T N D"], place: int
  ) -> Float[Array, "B T N D"]:
    """Adds the embedding of an item's place in the session, from 0."""
    if self.session_items == 1:
      return x
    row = self.places(jnp.full((1, 1, 1), place, jnp.int32))
    return x + row.astype(x.dtype)


def one_target_a_session(batch: batch_lib.Batch, m: int) -> batch_lib.Batch:
  """Keeps the first of every m targets and what it sees."""
  return batch.replace(
    targets=batch.targets[:, ::m],
    visible_from=batch.visible_from[:, ::m],
    visible_until=batch.visible_until[:, ::m],
  )


block_parameters = encoder_decoder.block_parameters


def forward_flops(
  model: SessionDecoder, rows: int, positions: int, targets: int
) -> float:
  """As encoder_decoder.forward_flops, for targets / m sessions a row."""
  m = min(model.session_items, targets)
  length = m * (len(model.codebook_sizes) + 1) - 1
  return encoder_decoder.decoding_flops(
    model, rows, positions, targets // m, length
  ) + encoder_decoder.head_flops(model, rows * targets)
