"""Training events → collaborative vectors, and guesses for the rest."""

import numpy as np
import scipy.sparse as sp
from jaxtyping import Float, Int

from onerec_jax.tokenizer import spectral

RIDGE = 1.0
"""INFERRED strength of the content → collaborative regression."""


def ppmi(
  user_offsets: Int[np.ndarray, "U1"],
  items: Int[np.ndarray, "events"],
  num_items: int,
  window: int,
) -> sp.csr_matrix:
  """Positive pointwise mutual information of items near each other.

  C_ij = Σ 1 / distance over pairs of events of one user at most `window`
  events apart, symmetric, without an item's pairs with itself (INFERRED);
  PPMI = max(0, ln(C_ij · ΣC / (C_i· · C_·j))).

  Args:
    user_offsets: events of user u are items[offsets[u] : offsets[u + 1]].
    items: dense ids from 1, oldest first within a user, training events only.
    num_items: I.
    window: events.

  Returns:
    float64 [I, I], row i = item i + 1.
  """
  users = np.repeat(np.arange(len(user_offsets) - 1), np.diff(user_offsets))
  total = sp.csr_matrix((num_items, num_items))
  for distance in range(1, window + 1):
    together = users[distance:] == users[:-distance]
    a = items[:-distance][together] - 1
    b = items[distance:][together] - 1
    a, b = a[a != b], b[a != b]
    weight = np.full(len(a), 1 / distance)
    # Duplicates are summed here, so memory is that of one distance at a time.
    total = total + sp.csr_matrix(
      (weight, (a, b)), shape=(num_items, num_items)
    )
  total = (total + total.T).tocoo()
  sums = np.bincount(total.row, total.data, minlength=num_items)
  information = np.log(
    total.data * sums.sum() / (sums[total.row] * sums[total.col])
  )
  positive = information > 0
  return sp.csr_matrix(
    (information[positive], (total.row[positive], total.col[positive])),
    shape=(num_items, num_items),
  )


def collaborative_vectors(
  user_offsets: Int[np.ndarray, "U1"],
  items: Int[np.ndarray, "events"],
  num_items: int,
  window: int,
  size: int,
) -> Float[np.ndarray, "I D"]:
  """`spectral.positive_eigen` of `ppmi`: vectors · √values, rows of length 1.

  INFERRED: the papers take collaborative signals from a trained model.

  Items without neighbours in the training events get zero rows.
  Arguments as in `ppmi`; `size` is the width, less where the rank is lower.
  """
  matrix = ppmi(user_offsets, items, num_items, window)
  if matrix.nnz == 0:
    return np.zeros((num_items, 1), np.float32)
  left, values = spectral.positive_eigen(matrix, size)
  vectors = left * np.sqrt(values)[None]
  # The solver leaves rounding noise where the matrix has nothing.
  vectors[np.diff(matrix.indptr) == 0] = 0
  return spectral.unit(vectors)


def ridge(
  collaborative: Float[np.ndarray, "I D"], content: Float[np.ndarray, "I D2"]
) -> Float[np.ndarray, "D2 D"]:
  """Weights that guess collaborative vectors from content (INFERRED).

  W = (XᵀX + λ)⁻¹ XᵀY over the items that have both; zeros where none has.
  """
  both = collaborative.any(axis=1) & content.any(axis=1)
  x = content[both].astype(np.float64)
  gram = x.T @ x + RIDGE * np.eye(x.shape[1])
  return np.linalg.solve(gram, x.T @ collaborative[both])


def guess(
  content: Float[np.ndarray, "I D2"], weights: Float[np.ndarray, "D2 D"]
) -> Float[np.ndarray, "I D"]:
  """X W, rows of length 1; zero where there is no content."""
  return spectral.unit(content @ weights)


def fill(
  collaborative: Float[np.ndarray, "I D"],
  content: Float[np.ndarray, "I D2"],
  weights: Float[np.ndarray, "D2 D"],
) -> Float[np.ndarray, "I D"]:
  """Guesses the zero rows; items without content stay zero."""
  missing = ~collaborative.any(axis=1) & content.any(axis=1)
  filled = collaborative.copy()
  filled[missing] = guess(content[missing], weights)
  return filled
