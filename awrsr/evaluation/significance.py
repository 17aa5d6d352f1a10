"""Statistics of paired results: intervals over users and seeds, tests over users, and their correction for multiple testing.

U users, R runs (seeds of variants), C columns (metrics, or rows of a table), K resamples.
"""

import warnings
from collections.abc import Iterator, Sequence

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
_AT_A_TIME = 1 << 22  # most numbers held at a time, resamples times users


def resampled_means(values: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Means over users of (U, C) values, in K samples of U users drawn with replacement: (K, C). All columns use the same users."""
    users = len(values)
    means = np.empty((resamples, values.shape[1]))
    for part in _parts(resamples, users):
        drawn = [np.bincount(rng.integers(users, size=users), minlength=users) for _ in range(part.start, part.stop)]
        means[part] = np.stack(drawn).astype(float) @ values / users
    return means


def seed_deviations(means: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """(K, C) deviations of the mean over seeds, drawn by resampling the seeds, from (S, C) means of S seeds.

    Resampling few seeds gives too little variation: the variance is too small by (S - 1) / S, and treated as known although it is
    estimated. Both are corrected, the latter by the ratio of Student's quantile to the normal one (Hesterberg 2015). A single seed
    says nothing about this and gives zeros.
    """
    seeds = len(means)
    if seeds == 1:
        return np.zeros((resamples, means.shape[1]))
    drawn = means[rng.integers(seeds, size=(resamples, seeds))].mean(1) - means.mean(0)
    tail = (1 + CONFIDENCE) / 2
    return drawn * np.sqrt(seeds / (seeds - 1)) * stats.t.ppf(tail, seeds - 1) / stats.norm.ppf(tail)


def interval(draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper end, (C,) each, of the percentile interval of (K, C) draws."""
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2], axis=0)
    return low, high


def t_test(differences: np.ndarray) -> np.ndarray:
    """Two-sided p-values (C,) of the paired t-test, from (U, C) differences of the pairs; 1 where all of them are zero."""
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore", RuntimeWarning)  # scipy's, on columns that do not vary
        p = stats.ttest_1samp(differences, 0).pvalue
    return np.where((differences == 0).all(0), 1.0, p)


def sign_flip_test(differences: np.ndarray, resamples: int, rng: np.random.Generator) -> np.ndarray:
    """Two-sided p-values (C,) of the permutation test, from (U, C) differences of the pairs: if the two of a pair were
    interchangeable, each difference could equally have the other sign. The smallest possible p-value is 1 / (K + 1)."""
    total = differences.sum(0)
    threshold = np.abs(total) * (1 - 1e-9)  # equal sums may be rounded differently
    beyond = np.zeros(len(total), dtype=np.int64)
    for part in _parts(resamples, len(differences)):
        flipped = rng.integers(0, 2, size=(part.stop - part.start, len(differences)), dtype=np.int8).astype(float)
        beyond += (np.abs(total - 2 * flipped @ differences) >= threshold).sum(0)
    return (1 + beyond) / (1 + resamples)


def holm(p: Sequence[float] | np.ndarray) -> np.ndarray:
    """p-values corrected for multiple testing (Holm 1979), in their original order: if those below alpha are
    rejected, the probability of any error is at most alpha."""
    p = np.asarray(p, dtype=float)
    order = np.argsort(p, kind="stable")
    corrected = np.empty(len(p))
    corrected[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)))
    return corrected


def _parts(resamples: int, users: int) -> Iterator[slice]:
    step = max(1, _AT_A_TIME // users)
    return (slice(lo, min(lo + step, resamples)) for lo in range(0, resamples, step))
