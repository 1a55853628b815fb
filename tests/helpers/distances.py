"""Precision and recall by their definition, from all distances."""

import numpy as np


def direct_precision_and_recall(reference: np.ndarray, samples: np.ndarray, neighbour: int = 3) -> tuple[float, float]:
    """Computes all distances in float64, one after the other."""

    def covered(points: np.ndarray, centres: np.ndarray) -> float:
        radii = np.sort(np.linalg.norm(centres[:, None] - centres[None], axis=2), axis=1)[:, neighbour]
        return (np.linalg.norm(points[:, None] - centres[None], axis=2) <= radii).any(axis=1).mean()

    return covered(samples, reference), covered(reference, samples)
