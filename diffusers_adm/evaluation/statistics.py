"""Distances between sets of features: of their Gaussians, and by their nearest neighbours."""

from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric


@dataclass(frozen=True)
class GaussianStatistics:
    """
    Args:
        mean: `(features,)`, float64.
        covariance: `(features, features)`, float64.
    """

    mean: np.ndarray
    covariance: np.ndarray

    def __post_init__(self):
        size = len(self.mean)
        if self.mean.shape != (size,) or self.covariance.shape != (size, size):
            raise ValueError(
                f"A mean of shape {self.mean.shape} does not belong to a covariance of shape {self.covariance.shape}."
            )


class RunningStatistics:
    """
    Mean and covariance of features that come in batches, in float64 and in memory that does not grow (Chan, Golub & LeVeque
    1983: each batch is centred by itself, so that a large mean costs no digits).
    """

    def __init__(self):
        self.count = 0
        self.mean: torch.Tensor | None = None  # (features,)
        self.scatter: torch.Tensor | None = None  # (features, features), sum of the centred outer products

    def update(self, features: torch.Tensor) -> None:
        """Adds `(batch, features)`."""
        features = features.double()
        mean = features.mean(dim=0)
        centred = features - mean
        scatter = centred.T @ centred
        if self.mean is None:
            self.mean, self.scatter = torch.zeros_like(mean), torch.zeros_like(scatter)
        total = self.count + len(features)
        shift = mean - self.mean
        self.scatter += scatter + torch.outer(shift, shift) * (self.count * len(features) / total)
        self.mean += shift * (len(features) / total)
        self.count = total

    def finish(self) -> GaussianStatistics:
        """
        What came.

        Raises:
            ValueError: If there were fewer than two rows, or they are not finite.
        """
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images: there are {self.count}.")
        if not (self.mean.isfinite().all() and self.scatter.isfinite().all()):
            raise ValueError("The features are not finite.")
        return GaussianStatistics(self.mean.cpu().numpy(), (self.scatter / (self.count - 1)).cpu().numpy())


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """
    Squared 2-Wasserstein distance between two Gaussians (Heusel et al. 2017, arXiv 1706.08500, eq. 6).

    Raises:
        ValueError: If they are of different numbers of features.
    """
    if len(first.mean) != len(second.mean):
        raise ValueError(f"Statistics of {len(first.mean)} and of {len(second.mean)} features have no distance.")
    statistics = [
        {"mu": one.mean.astype(np.float64), "sigma": one.covariance.astype(np.float64)} for one in (first, second)
    ]
    return fid_statistics_to_metric(*statistics, verbose=False)[KEY_METRIC_FID]


def check_features(name: str, features: torch.Tensor) -> None:
    """Raises a ValueError if the features of a set, `(images, features)`, are not finite or all the same."""
    if not features.isfinite().all():
        raise ValueError(f"Features of the {name} are not finite.")
    if (features == features[0]).all():
        raise ValueError(f"Features of the {name} are all the same.")


def precision_and_recall(
    reference: torch.Tensor, samples: torch.Tensor, neighbour: int = 3, block_size: int = 5000
) -> tuple[float, float]:
    """
    Share of samples within the reference's manifold, and of reference images within the samples' (Kynkaanniemi et al. 2019,
    arXiv 1904.06991, eq. 2). A manifold is the union of the balls around its images that reach to the n-th nearest other.

    Distances are screened in float32 and decided in float64 wherever rounding could decide, so neither the size of blocks
    nor the order of images changes a figure. No more than `block_size` x `block_size` distances are held at once.

    Args:
        reference: `(images, features)`.
        samples: Other features of the same kind, `(images, features)`.
        neighbour: n.
        block_size: Rows of a block.

    Raises:
        ValueError: If there are too few images, or features are not finite or all the same.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= neighbour:
            raise ValueError(
                f"Precision and recall need more than {neighbour} images on each side: the {name} has {len(features)}."
            )
        check_features(name, features)
    exact = [reference, samples]
    # Float32 distances lose digits to what all rows share.
    centre = reference.mean(dim=0)
    rounded = [(features - centre).float() for features in exact]
    norms = [features.square().sum(dim=1) for features in rounded]
    # Of sums of products of this size and number, with room to spare.
    tolerance = 64 * torch.finfo(torch.float32).eps * max(norm.max().item() for norm in norms)
    radii = [
        _radii(features, screened, norm, neighbour, block_size)
        for features, screened, norm in zip(exact, rounded, norms)
    ]
    screening = [radius.square().float() for radius in radii]

    # By how much each image is outside of the ball that it is deepest in: negative is inside.
    depth = [torch.full((len(features),), torch.inf, device=features.device) for features in rounded]
    for rows in torch.arange(len(reference)).split(block_size):
        for columns in torch.arange(len(samples)).split(block_size):
            row, column = slice(rows[0], rows[-1] + 1), slice(columns[0], columns[-1] + 1)
            block = _squared_distances(rounded[0][row], norms[0][row], rounded[1][column], norms[1][column])
            depth[0][row] = depth[0][row].minimum((block - screening[1][column]).amin(dim=1))
            depth[1][column] = depth[1][column].minimum(block.sub_(screening[0][row][:, None]).amin(dim=0))
    shares = []
    for points, balls, radius, below in zip(exact, reversed(exact), reversed(radii), depth):
        inside = below < -tolerance
        for index in (below.abs() <= tolerance).nonzero().flatten():
            inside[index] = (_exact_distances(balls, points[index]) <= radius).any()
        shares.append(inside.double().mean().item())
    recall, precision = shares
    return precision, recall


def _radii(
    exact: torch.Tensor, rounded: torch.Tensor, norms: torch.Tensor, neighbour: int, block_size: int
) -> torch.Tensor:
    """Distance of each row to its n-th nearest other, `(rows,)`, float64."""
    # One more than is needed: rounding may have changed their order.
    candidates = min(neighbour + 1, len(rounded) - 1)
    radii = []
    for rows in torch.arange(len(rounded)).split(block_size):
        row = slice(rows[0], rows[-1] + 1)
        nearest, index = [], []
        for columns in torch.arange(len(rounded)).split(block_size):
            column = slice(columns[0], columns[-1] + 1)
            block = _squared_distances(rounded[row], norms[row], rounded[column], norms[column])
            if rows[0] == columns[0]:
                block.fill_diagonal_(torch.inf)
            values, where = block.topk(min(candidates, block.shape[1]), dim=1, largest=False)
            nearest.append(values)
            index.append(where + columns[0])
        order = torch.cat(nearest, dim=1).topk(candidates, dim=1, largest=False).indices
        index = torch.cat(index, dim=1).gather(1, order)  # (rows, candidates)
        distances = [_exact_distances(exact[index[:, i]], exact[row]) for i in range(candidates)]
        radii.append(torch.stack(distances).kthvalue(neighbour, dim=0).values)
    return torch.cat(radii)


def _squared_distances(
    first: torch.Tensor, first_norms: torch.Tensor, second: torch.Tensor, second_norms: torch.Tensor
) -> torch.Tensor:
    """`(rows of first, rows of second)`, in float32: rounding may make small ones negative."""
    return torch.addmm(second_norms, first, second.T, alpha=-2).add_(first_norms[:, None])


def _exact_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Row by row, summed in float64: `(rows,)`."""
    return torch.linalg.vector_norm(first - second, dim=1, dtype=torch.float64)
