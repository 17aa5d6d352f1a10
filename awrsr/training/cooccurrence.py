"""Initial item embeddings from a factorisation of which items share training histories.

Positive pointwise mutual information of items in the same history, of which the leading singular vectors are taken, each scaled by
the square root of its singular value (Levy and Goldberg, Neural Word Embedding as Implicit Matrix Factorization, 2014).
N items, T training events, F features.
"""

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from ..data.histories import spans
from ..data.splits import Split

EXTRA, ROUNDS = 10, 8  # more vectors than asked for, and products with the matrix: enough for what follows, which is training
REACH = 20  # events between two items that still go together: bounds the work for long histories


def association(split: Split) -> sparse.csr_matrix:
    """(N, N) max(log(n_ij n / (n_i n_j)), 0) from n training events: n_i are of item i, n_ij pairs of i and j in one history,
    at most REACH events apart; each event is a pair with itself."""
    h = split.histories
    counts = np.asarray(split.train_end)
    events, _ = spans(h.offsets[:-1], counts)
    user, items = h.owners[events], h.items[events]
    number = np.bincount(items, minlength=h.num_items).astype(np.float64)
    pairs = sparse.csr_matrix(sparse.diags(number))
    for apart in range(1, min(REACH, int(counts.max(initial=1)) - 1) + 1):
        in_one_history = user[apart:] == user[:-apart]
        earlier, later = items[:-apart][in_one_history], items[apart:][in_one_history]
        ordered = sparse.csr_matrix((np.ones(len(earlier)), (earlier, later)), shape=pairs.shape)
        pairs = pairs + ordered + ordered.T
    pairs = sparse.coo_matrix(pairs)
    information = np.log(pairs.data * len(items) / (number[pairs.row] * number[pairs.col]))
    kept = information > 0
    return sparse.csr_matrix((information[kept], (pairs.row[kept], pairs.col[kept])), shape=pairs.shape)


def leading(matrix: sparse.csr_matrix, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Left singular vectors (N, count) and values (count,) of a symmetric matrix, the largest ones first, by subspace iteration
    (Halko, Martinsson and Tropp 2011): they are the same for the same draws, unlike those of ARPACK."""
    basis = rng.standard_normal((matrix.shape[0], min(count + EXTRA, matrix.shape[0])))
    for _ in range(ROUNDS):
        basis, _ = np.linalg.qr(matrix @ basis)
    small, values, _ = np.linalg.svd((matrix @ basis).T, full_matrices=False)
    return basis @ small[:, :count], values[:count]


def begin_with_cooccurrence(embeddings: Tensor, split: Split, seed: int) -> None:
    """Overwrite the rows (N, F) of items that have training events, in place; their root mean square does not change.

    The factors are turned at random, by `seed`, so that no attention head has all the important ones.
    """
    matrix = association(split)
    features = min(embeddings.shape[1], matrix.shape[0] - 1)
    if features < 1:
        return
    left, values = leading(matrix, features, np.random.default_rng(seed))
    factors = torch.zeros(embeddings.shape, dtype=torch.float64)
    factors[:, :features] = torch.from_numpy(left * np.sqrt(values))
    generator = torch.Generator().manual_seed(seed)
    turn, _ = torch.linalg.qr(torch.randn(embeddings.shape[1], embeddings.shape[1], generator=generator, dtype=torch.float64))
    factors = (factors @ turn).to(embeddings)
    trained = torch.from_numpy(np.diff(matrix.indptr) > 0).to(embeddings.device)
    scale = embeddings[trained].square().mean().sqrt() / factors[trained].square().mean().sqrt()
    with torch.no_grad():
        embeddings[trained] = factors[trained] * scale
