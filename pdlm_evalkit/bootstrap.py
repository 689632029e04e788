"""The one bootstrap of this package: how far a score would move if other questions had been drawn."""

from collections.abc import Sequence
from typing import Any

import numpy as np

SAMPLES, SEED = 2000, 0
LIMITS = (2.5, 97.5)  # percentiles: a 95 % interval


def resample(units: np.ndarray, strata: Sequence[Any] | None = None) -> np.ndarray:
    """Draw units with replacement, as many as there are, 2,000 times with seed 0.

    Units that add the same are drawn together, as one multinomial number: the distribution is that of single draws,
    the order of the units does not matter, and 14,000 questions cost no more than a hundred.

    Args:
        units (`np.ndarray` of shape `(units, columns)`): what each unit adds to every sum of the score.
        strata (*optional*): the stratum of each unit; units are drawn within their stratum.

    Returns:
        `np.ndarray` of shape `(samples, strata, columns)`: the sums over the drawn units, strata in sorted order.
    """
    generator = np.random.default_rng(SEED)
    of = np.zeros(len(units), dtype=int) if strata is None else np.unique(np.asarray(strata), return_inverse=True)[1]
    sums = []
    for stratum in range(of.max() + 1):
        kinds, counts = np.unique(units[of == stratum], axis=0, return_counts=True)
        sums.append(generator.multinomial(counts.sum(), counts / counts.sum(), size=SAMPLES) @ kinds)
    return np.stack(sums, axis=1)


def limits(values: np.ndarray) -> tuple[float, float]:
    """Lower and upper limit of the 95 % interval of a score, from its values in the samples."""
    low, high = np.percentile(values, LIMITS).tolist()
    return low, high
