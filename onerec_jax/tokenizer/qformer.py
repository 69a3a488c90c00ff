"""A Q-Former: an item's words → one vector (OneRec-V1 §2.1).

Learned queries read an item's words through layers of cross-attention. The
vector depends on text alone, so items that come later get one too. Training
is in aligned.py.

INFERRED where the paper has 1,280 tokens of a vision-language model: a token
is a word, where content.py places it, times its TF-IDF weight.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import traverse_util
from jaxtyping import Array, Bool, Float, Int

from onerec_jax import config as config_lib
from onerec_jax.models import attention, layers
from onerec_jax.tokenizer import content as content_lib
from onerec_jax.tokenizer import pairs, spectral

NUM_TOKENS = 16
"""Words of an item that count: those of the largest TF-IDF weight."""
_ROWS = 512
"""Items that a frozen network sees at once."""
_PREFIX = "qformer/"
_HEADS = _PREFIX + "num_heads"


class QFormerLayer(nn.Module):
  """Queries read the tokens, then pass a feed-forward block.

  INFERRED: residuals, which the paper's formula leaves out, and a norm before
  the attention as before the feed-forward block.
  """

  num_heads: int
  d_ff: int

  @nn.compact
  def __call__(
    self,
    queries: Float[Array, "B N D"],
    tokens: Float[Array, "B M D"],
    bias: Float[Array, "B H 1 M"],
  ) -> Float[Array, "B N D"]:
    """Q + CrossAttn(RMSNorm(Q), M, M), then Q + FFN(RMSNorm(Q))."""
    B, N, D = queries.shape
    heads = (self.num_heads, D // self.num_heads)
    q = layers.Linear(D, name="query")(layers.RMSNorm(name="norm")(queries))
    k, v = jnp.split(layers.Linear(2 * D, name="key_value")(tokens), 2, axis=-1)
    read = attention.cross_attention(
      q.reshape(B, 1, N, *heads),
      k.reshape(B, -1, *heads),
      v.reshape(B, -1, *heads),
      bias,
    )
    queries = queries + layers.Linear(D, name="out")(read.reshape(B, N, D))
    normed = layers.RMSNorm(name="ffn_norm")(queries)
    return queries + layers.SwiGLU(self.d_ff, name="ffn")(normed)


class QFormer(nn.Module):
  """Tokens of an item → its vector, the N queries side by side.

  Attributes:
    num_queries: N.
    num_layers: N_c of the paper.
    d_model: D, width of a query.
    num_heads: H.
    d_ff: F of the feed-forward block.
  """

  num_queries: int
  num_layers: int
  d_model: int
  num_heads: int
  d_ff: int

  @nn.compact
  def __call__(
    self, tokens: Float[Array, "B M C"], present: Bool[Array, "B M"]
  ) -> Float[Array, "B ND"]:
    """Rows of length 1; zeros where no token is present.

    Args:
      tokens: [B, M, width of a token].
      present: False at padding.
    """
    B, M = present.shape
    tokens = layers.Linear(self.d_model, name="tokens")(tokens)
    bias = jnp.where(present, 0.0, attention.MASKED)[:, None, None]
    bias = jnp.broadcast_to(bias, (B, self.num_heads, 1, M))
    start = self.param(
      "queries",
      nn.initializers.normal(0.02),
      (self.num_queries, self.d_model),
    )
    queries = jnp.broadcast_to(start[None], (B, *start.shape))
    for layer in range(self.num_layers):
      queries = QFormerLayer(self.num_heads, self.d_ff, name=f"layer_{layer}")(
        queries, tokens, bias
      )
    flat = queries.reshape(B, -1)
    # The floor guards the gradient of a row that is all zero.
    length = jnp.sqrt(jnp.sum(jnp.square(flat), axis=1, keepdims=True) + 1e-12)
    return jnp.where(present.any(axis=1)[:, None], flat / length, 0.0)


def create(config: config_lib.QFormerConfig) -> QFormer:
  """The network of a config.

  Raises:
    ValueError: sizes that cannot be, named.
  """
  sizes = {
    name: getattr(config, name)
    for name in ("num_queries", "num_layers", "d_model", "num_heads", "d_ff")
  }
  for name, size in sizes.items():
    if size < 1:
      raise ValueError(f"tokenizer.qformer.{name} is {size}; want at least 1")
  if config.d_model % config.num_heads:
    raise ValueError(
      f"tokenizer.qformer.d_model is {config.d_model}; want a multiple of "
      f"tokenizer.qformer.num_heads, {config.num_heads}"
    )
  return QFormer(**sizes)


def init(module: QFormer, token_width: int, key: jax.Array) -> Any:
  """Fresh parameters."""

  # One program: run op by op, each would be compiled by itself.
  @jax.jit
  def fresh(key):
    tokens = jnp.zeros((1, 1, token_width))
    return nn.unbox(module.init(key, tokens, jnp.ones((1, 1), bool))["params"])

  return fresh(key)


@dataclasses.dataclass(frozen=True)
class Words:
  """The words of items.

  Attributes:
    terms: int32 [I, M], place in `Content.terms` + 1, largest weight first; 0
      where an item has fewer.
    weights: float32 [I, M], TF-IDF; 0 likewise.
  """

  terms: Int[np.ndarray, "I M"]
  weights: Float[np.ndarray, "I M"]


def words(texts: list[str], content: content_lib.Content) -> Words:
  """The words of each text that the known items share."""
  found = content_lib.tf_idf(texts, content.terms, content.idf).tocoo()
  rank = pairs.rank_in_rows(found.row, found.col, found.data)
  kept = rank < NUM_TOKENS
  place = found.row[kept], rank[kept]
  terms = np.zeros((len(texts), NUM_TOKENS), np.int32)
  weights = np.zeros((len(texts), NUM_TOKENS), np.float32)
  terms[place] = found.col[kept] + 1
  weights[place] = found.data[kept]
  return Words(terms, weights)


def term_table(content: content_lib.Content) -> Float[np.ndarray, "C1 D"]:
  """What each term is to the network; row 0 is padding.

  Rows of mean square 1: the length of a term's place says how frequent it is,
  which its weight says already.
  """
  width = content.projection.shape[1]
  rows = spectral.unit(content.projection) * np.sqrt(width, dtype=np.float32)
  return np.pad(rows, ((1, 0), (0, 0)))


def apply(
  module: QFormer,
  params: Any,
  table: Float[Array, "C1 D"],
  terms: Int[Array, "B M"],
  weights: Float[Array, "B M"],
) -> Float[Array, "B ND"]:
  """Vectors of items from their `Words` and the `term_table`."""
  tokens = jnp.take(table, terms, axis=0) * weights[..., None]
  return module.apply({"params": params}, tokens, terms > 0)


@dataclasses.dataclass(frozen=True)
class Aligner:
  """A trained Q-Former, frozen.

  Attributes:
    params: float32 arrays by their path, as `layer_0/out/kernel`.
    num_heads: what the arrays' shapes do not say.
  """

  params: Mapping[str, np.ndarray]
  num_heads: int

  @property
  def token_width(self) -> int:
    """Width of the content vectors it was trained on."""
    return self.params["tokens/kernel"].shape[0]

  @property
  def width(self) -> int:
    """N · D, width of its vectors."""
    return self.params["queries"].size

  def module(self) -> QFormer:
    """The network that these parameters are of."""
    num_queries, d_model = self.params["queries"].shape
    names = {name.split("/")[0] for name in self.params}
    return QFormer(
      num_queries=num_queries,
      num_layers=sum(name.startswith("layer_") for name in names),
      d_model=d_model,
      num_heads=self.num_heads,
      d_ff=self.params["layer_0/ffn/wo/kernel"].shape[0],
    )

  def vectors(
    self, texts: list[str], content: content_lib.Content
  ) -> Float[np.ndarray, "I D"]:
    """Rows of length 1; zero where no word is known.

    Args:
      texts: one an item.
      content: as in training.
    """
    module, found = self.module(), words(texts, content)
    params = traverse_util.unflatten_dict(dict(self.params), sep="/")
    run = jax.jit(lambda *args: apply(module, *args))
    fixed = jax.device_put((params, term_table(content)))
    # Filled up to whole blocks: one shape, compiled once.
    blocks = max(1, -(-len(texts) // _ROWS))
    space = ((0, blocks * _ROWS - len(texts)), (0, 0))
    pieces = zip(
      *(
        np.pad(array, space).reshape(blocks, _ROWS, NUM_TOKENS)
        for array in (found.terms, found.weights)
      )
    )
    out = [np.asarray(run(*fixed, *piece)) for piece in pieces]
    return np.concatenate(out)[: len(texts)]

  def arrays(self) -> dict[str, np.ndarray]:
    """What `from_arrays` reads, by names that start with `qformer/`."""
    named = {_PREFIX + name: value for name, value in self.params.items()}
    return named | {_HEADS: np.array(self.num_heads, np.int32)}

  @classmethod
  def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "Aligner":
    """The inverse of `arrays`; other names are left alone.

    Raises:
      KeyError: one is missing.
      ValueError: one has another shape than the others ask for.
    """
    params = {
      name.removeprefix(_PREFIX): value
      for name, value in arrays.items()
      if name.startswith(_PREFIX) and name != _HEADS
    }
    found = cls(params, int(arrays[_HEADS]))
    expected = jax.eval_shape(
      lambda: init(found.module(), found.token_width, jax.random.key(0))
    )
    for name, leaf in traverse_util.flatten_dict(expected, sep="/").items():
      if params[name].shape != leaf.shape:
        raise ValueError(
          f"{_PREFIX}{name} has shape {params[name].shape}, not {leaf.shape}"
        )
    return found
