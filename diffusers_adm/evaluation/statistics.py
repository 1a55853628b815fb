"""Gaussian statistics of features, and the Frechet distance between them."""

from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric


# Tolerance for rounding of a covariance, as a fraction of its largest entry, because some evaluators save it in float32.
ROUNDING = 1e-4


@dataclass(frozen=True)
class GaussianStatistics:
    """
    Mean and covariance of features.

    Args:
        mean: Mean, `(features,)`, float64.
        covariance: Covariance, `(features, features)`, float64. It is symmetric and has no negative eigenvalue, up to rounding to
            float32.

    Raises:
        ValueError: If the arrays are not a mean and a covariance.
    """

    mean: np.ndarray
    covariance: np.ndarray

    def __post_init__(self):
        size = self.mean.size
        if not size or self.mean.shape != (size,) or self.covariance.shape != (size, size):
            raise ValueError(
                "The mean must be (features,) and the covariance must be (features, features), but got"
                f" {self.mean.shape} and {self.covariance.shape}."
            )
        for name, values in (("mean", self.mean), ("covariance", self.covariance)):
            if values.dtype.kind not in "fiu":
                raise ValueError(f"The {name} must be real numbers, but its data type is {values.dtype}.")
            if not np.isfinite(values).all():
                raise ValueError(
                    f"The {name} must be finite, but {np.sum(~np.isfinite(values))} of {values.size} values are not."
                )
        covariance = self.covariance.astype(np.float64)
        covariance /= np.abs(covariance).max() or 1.0
        if np.abs(covariance - covariance.T).max() > ROUNDING:
            raise ValueError("The covariance must be symmetric, but it is not.")
        try:
            np.linalg.cholesky(covariance + ROUNDING * np.eye(size))
        except np.linalg.LinAlgError as error:
            raise ValueError("The covariance must have no negative eigenvalue, but it has one.") from error


class RunningStatistics:
    """
    Mean and covariance of features that are added in batches, in float64. The memory does not grow with the number of images.

    Each block of rows is centred on its own mean, so that a large mean costs no precision (Chan, Golub & LeVeque 1983).
    """

    # Rows are collected first, because a fold reads and writes the whole covariance.
    ROWS_OF_A_FOLD = 2048

    def __init__(self):
        self.count = 0
        self.mean: np.ndarray | None = None  # (features,)
        self.scatter: np.ndarray | None = None  # (features, features), sum of the centred outer products
        self.waiting: list[torch.Tensor] = []

    def update(self, features: torch.Tensor) -> None:
        """Adds a batch of features, `(batch, features)`."""
        self.waiting.append(features)
        if sum(map(len, self.waiting)) >= self.ROWS_OF_A_FOLD:
            self._fold()

    def _fold(self) -> None:
        # NumPy does half the work of torch here, because it detects that a matrix times its own transpose is symmetric.
        features = torch.cat(self.waiting).cpu().double().numpy()
        self.waiting = []
        mean = features.mean(axis=0)
        features -= mean
        if self.mean is None:
            self.mean, self.scatter = np.zeros_like(mean), np.zeros((len(mean), len(mean)))
        total = self.count + len(features)
        shift = mean - self.mean
        self.scatter += features.T @ features
        self.scatter += np.outer(shift, shift * (self.count * len(features) / total))
        self.mean += shift * (len(features) / total)
        self.count = total

    def finish(self) -> GaussianStatistics:
        """
        Returns the statistics of all features that were added.

        Raises:
            ValueError: If there are fewer than two rows, or features are not finite.
        """
        if self.waiting:
            self._fold()
        if self.count < 2:
            raise ValueError(f"A covariance requires at least 2 images, but got {self.count}.")
        if not np.isfinite(self.scatter).all():
            raise ValueError("The features must be finite, but some are not.")
        return GaussianStatistics(self.mean, self.scatter / (self.count - 1))


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """
    Returns the squared 2-Wasserstein distance between two Gaussians (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    Raises:
        ValueError: If the numbers of features differ.
    """
    if len(first.mean) != len(second.mean):
        raise ValueError(
            f"Both statistics must have the same number of features, but got {len(first.mean)} and {len(second.mean)}."
        )
    statistics = [
        {"mu": gaussian.mean.astype(np.float64), "sigma": gaussian.covariance.astype(np.float64)}
        for gaussian in (first, second)
    ]
    with np.errstate(over="ignore", invalid="ignore"):  # the result is then not finite, which callers check
        return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]
