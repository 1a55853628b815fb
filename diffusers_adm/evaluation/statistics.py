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
    1983: each block is centred by itself, so that a large mean costs no digits).
    """

    # A fold reads and writes the whole covariance: it pays for many rows at once.
    ROWS_OF_A_FOLD = 2048

    def __init__(self):
        self.count = 0
        self.mean: np.ndarray | None = None  # (features,)
        self.scatter: np.ndarray | None = None  # (features, features), sum of the centred outer products
        self.waiting: list[torch.Tensor] = []

    def update(self, features: torch.Tensor) -> None:
        """Adds `(batch, features)`."""
        self.waiting.append(features)
        if sum(map(len, self.waiting)) >= self.ROWS_OF_A_FOLD:
            self._fold()

    def _fold(self) -> None:
        # In NumPy, which knows that a matrix times its own transpose is symmetric, and does half the work.
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
        What came.

        Raises:
            ValueError: If there were fewer than two rows, or they are not finite.
        """
        if self.waiting:
            self._fold()
        if self.count < 2:
            raise ValueError(f"A covariance needs at least 2 images: there are {self.count}.")
        if not np.isfinite(self.scatter).all():
            raise ValueError("The features are not finite.")
        return GaussianStatistics(self.mean, self.scatter / (self.count - 1))


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
    if not features.sum(dim=0, dtype=torch.float64).isfinite().all():
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
    # Float32 distances lose digits to what all rows share.
    centre = reference.mean(dim=0)
    centred = [(features - centre).float() for features in (reference, samples)]
    norms = [features.square().sum(dim=1) for features in centred]
    # Of sums of products of this size and number, with room to spare.
    tolerance = 64 * torch.finfo(torch.float32).eps * max(norm.max().item() for norm in norms)
    # One space for all blocks: to be given new memory takes longer than to look for neighbours in it.
    space = centred[0].new_empty(min(block_size, max(len(reference), len(samples))) ** 2)
    radii = [_squared_radii(*one, neighbour, block_size, space) for one in zip(centred, norms)]

    # By how much each image is outside of the ball that it is deepest in: negative is inside.
    depth = [torch.full((len(features),), torch.inf, device=features.device) for features in centred]
    for row in _blocks(len(reference), block_size):
        for column in _blocks(len(samples), block_size):
            block = _squared_distances(centred[0][row], norms[0][row], centred[1][column], norms[1][column], space)
            depth[0][row] = depth[0][row].minimum((block - radii[1][column]).amin(dim=1))
            depth[1][column] = depth[1][column].minimum(block.sub_(radii[0][row][:, None]).amin(dim=0))
    recall, precision = (
        _share_inside(*one, tolerance, neighbour)
        for one in zip(depth, (reference, samples), (samples, reference), reversed(radii))
    )
    return precision, recall


def _squared_radii(
    features: torch.Tensor, norms: torch.Tensor, neighbour: int, block_size: int, space: torch.Tensor
) -> torch.Tensor:
    """Squared distance of each row to its n-th nearest other, `(rows,)`, rounded."""
    radii = []
    for row in _blocks(len(features), block_size):
        nearest = []
        for column in _blocks(len(features), block_size):
            block = _squared_distances(features[row], norms[row], features[column], norms[column], space)
            if row == column:
                block.fill_diagonal_(torch.inf)
            nearest.append(block.topk(min(neighbour, block.shape[1]), dim=1, largest=False).values)
        radii.append(torch.cat(nearest, dim=1).kthvalue(neighbour, dim=1).values)
    return torch.cat(radii)


def _share_inside(
    depth: torch.Tensor,
    points: torch.Tensor,
    centres: torch.Tensor,
    squared_radii: torch.Tensor,
    tolerance: float,
    neighbour: int,
) -> float:
    """Share of points in some ball: by their rounded depths, and where those may be wrong by exact distances."""
    inside = depth < -tolerance
    exact_radii: dict[int, torch.Tensor] = {}
    for index in (depth.abs() <= tolerance).nonzero().flatten().tolist():
        distances = _exact_distances(centres, points[index])
        near_edge = (distances.square() - squared_radii).abs() <= 2 * tolerance
        for centre in near_edge.nonzero().flatten().tolist():
            if centre not in exact_radii:
                to_all = _exact_distances(centres, centres[centre])
                exact_radii[centre] = to_all.kthvalue(neighbour + 1).values  # the nearest of all is itself
            if distances[centre] <= exact_radii[centre]:
                inside[index] = True
                break
    return inside.double().mean().item()


def _blocks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _squared_distances(
    first: torch.Tensor,
    first_norms: torch.Tensor,
    second: torch.Tensor,
    second_norms: torch.Tensor,
    space: torch.Tensor,
) -> torch.Tensor:
    """`(rows of first, rows of second)` in `space`, float32: rounding may make small ones negative."""
    block = space[: len(first) * len(second)].view(len(first), len(second))
    block.copy_(second_norms.expand_as(block)).addmm_(first, second.T, alpha=-2)
    return block.add_(first_norms[:, None])


def _exact_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of each row to one, `(rows,)`, float64."""
    return torch.linalg.vector_norm(first.double() - second.double(), dim=1)
