"""Truncated decompositions, the same on every run."""

import numpy as np
import scipy.sparse as sp
import scipy.sparse.linalg
from jaxtyping import Float

DENSE_SIDE = 256
"""Matrices with a shorter side get an exact dense SVD."""


def unit(x: Float[np.ndarray, "I D"]) -> Float[np.ndarray, "I D"]:
  """Rows of length 1; zero rows stay zero."""
  norms = np.linalg.norm(x, axis=1, keepdims=True)
  return (x / np.where(norms > 0, norms, 1)).astype(np.float32)


def truncated_svd(
  matrix: sp.csr_matrix, size: int
) -> tuple[Float[np.ndarray, "I D"], Float[np.ndarray, "D"]]:
  """The largest singular values and left vectors, the same on every run.

  Args:
    matrix: sparse [I, C].
    size: at most so many; fewer where the rank is lower.

  Returns:
    Left vectors [I, D], signed so that the entry of largest size is
    positive, and singular values [D], descending.
  """
  side = min(matrix.shape)
  if side <= max(DENSE_SIDE, size + 1):
    left, values, _ = np.linalg.svd(matrix.toarray(), full_matrices=False)
  else:
    left, values, _ = scipy.sparse.linalg.svds(
      matrix.astype(np.float32), k=size, v0=_start_vector(side)
    )
  return _leading(left, values, size)


def positive_eigen(
  matrix: sp.csr_matrix, size: int
) -> tuple[Float[np.ndarray, "I D"], Float[np.ndarray, "D"]]:
  """The largest positive eigenvalues and vectors of a symmetric matrix.

  Where the leading eigenvalues are positive this is the truncated SVD. A
  negative one stands for items that meet often and yet lie apart, and the
  left singular vectors of a pair ±v are arbitrary; small catalogues have many.

  Args:
    matrix: sparse [I, I], symmetric.
    size: at most so many.

  Returns:
    As `truncated_svd`.
  """
  side = matrix.shape[0]
  if side <= max(DENSE_SIDE, size + 1):
    values, vectors = np.linalg.eigh(matrix.toarray())
  else:
    values, vectors = scipy.sparse.linalg.eigsh(
      matrix.astype(np.float32), k=size, which="LA", v0=_start_vector(side)
    )
  return _leading(vectors, values, size)


def _start_vector(side: int) -> Float[np.ndarray, "side"]:
  # By default ARPACK draws one at random. Float32 halves its memory traffic,
  # which is its cost; on real catalogues neighbours were the same.
  return np.random.default_rng(0).standard_normal(side, np.float32)


def _leading(
  vectors: Float[np.ndarray, "I D"], values: Float[np.ndarray, "D"], size: int
) -> tuple[Float[np.ndarray, "I D2"], Float[np.ndarray, "D2"]]:
  """The largest values above rounding, descending, with fixed signs."""
  order = np.argsort(-values)[:size]
  order = order[values[order] > values.max(initial=0) * 1e-6]
  vectors, values = vectors[:, order], values[order]
  peak = np.abs(vectors).argmax(axis=0)
  signs = np.sign(vectors[peak, np.arange(vectors.shape[1])])
  return vectors * signs[None], values
