"""Distances between sets of features: of their Gaussians, and by their nearest neighbours."""

from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_statistics_to_metric


# The paper's manifolds reach to the third nearest other image.
NEIGHBOUR = 3

# Of a squared distance, by the squared norms that it is made of: of sums of products of this size, with room to spare.
ROUNDING = 64 * torch.finfo(torch.float32).eps


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
        size = self.mean.size
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
    reference: torch.Tensor, samples: torch.Tensor, neighbour: int = NEIGHBOUR, block_size: int = 5000
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
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(f"The reference has {reference.shape[1]} features, and the samples {samples.shape[1]}.")
    # Float32 distances lose digits to what all rows share.
    exact = [features if features.dtype == torch.float64 else features.float() for features in (reference, samples)]
    centre = exact[0].mean(dim=0)
    # One space for all blocks: to be given new memory takes longer than to look for neighbours in it.
    largest = min(block_size, max(len(reference), len(samples)))
    space = torch.empty(largest**2, device=centre.device)
    sets = [Manifold(features, centre, neighbour, block_size, space) for features in exact]

    # By how much each image is outside of the ball that it is deepest in, as a share of what rounding errors grow with:
    # negative is inside. An outlier's errors are large, and must not make those of others doubtful.
    norms = torch.cat([points.norms for points in sets])
    usual = norms.median().clamp(min=1e-6 * norms.max())
    weights = [1 / (points.scale + usual) for points in sets]
    depth = [torch.full_like(points.norms, torch.inf) for points in sets]
    for row in _blocks(len(reference), block_size):
        for column in _blocks(len(samples), block_size):
            block = _squared_distances(sets[0], row, sets[1], column, space)
            inside = (block - sets[1].squared_radii[column]).mul_(weights[1][column]).amin(dim=1)
            depth[0][row] = depth[0][row].minimum(inside)
            inside = block.sub_(sets[0].squared_radii[row][:, None]).mul_(weights[0][row][:, None]).amin(dim=0)
            depth[1][column] = depth[1][column].minimum(inside)
    recall, precision = (
        _share_inside(below, points, centres, 1 + points.norms / usual, neighbour)
        for below, points, centres in zip(depth, sets, reversed(sets))
    )
    return precision, recall


class Manifold:
    """
    Images as points, with a ball round each that reaches to its n-th nearest other.

    Args:
        features: `(images, features)`.
        centre: What they are taken about, `(features,)`.
        neighbour: n.
        block_size: Rows of a block.
        space: For the distances of a block.

    Raises:
        ValueError: If the distances are too large for numbers.
    """

    def __init__(
        self, features: torch.Tensor, centre: torch.Tensor, neighbour: int, block_size: int, space: torch.Tensor
    ):
        self.features = features
        self.centred = (features - centre).float()
        self.norms = self.centred.square().sum(dim=1)  # (images,)
        if not self.norms.isfinite().all():
            raise ValueError("The features are too large for distances between them.")
        self.squared_radii = _squared_radii(self, neighbour, block_size, space)  # (images,), rounded
        # What the rounding errors of distances to the edges of the balls grow with.
        self.scale = self.norms + self.squared_radii


def _squared_radii(points: Manifold, neighbour: int, block_size: int, space: torch.Tensor) -> torch.Tensor:
    """Squared distance of each image to its n-th nearest other, `(images,)`, rounded."""
    radii = []
    for row in _blocks(len(points.centred), block_size):
        nearest = []
        for column in _blocks(len(points.centred), block_size):
            block = _squared_distances(points, row, points, column, space)
            if row == column:
                block.fill_diagonal_(torch.inf)
            nearest.append(block.topk(min(neighbour, block.shape[1]), dim=1, largest=False).values)
        radii.append(torch.cat(nearest, dim=1).kthvalue(neighbour, dim=1).values)
    return torch.cat(radii)


def _share_inside(
    depth: torch.Tensor, points: Manifold, centres: Manifold, growth: torch.Tensor, neighbour: int
) -> float:
    """Share of points in some ball: by their rounded depths, and where those may be wrong by exact distances."""
    tolerance = ROUNDING * growth  # (images,)
    inside = depth < -tolerance
    space = depth.new_empty(len(centres.norms))
    exact_radii: dict[int, torch.Tensor] = {}
    for index in (depth.abs() <= tolerance).nonzero().flatten().tolist():
        doubtful = _near(points, index, centres, centres.squared_radii, space)
        distances = _exact_distances(centres.features[doubtful], points.features[index])
        for centre, distance in zip(doubtful.tolist(), distances):
            if centre not in exact_radii:
                # The nearest of all is itself; of the others those may be the n-th that are no farther than it seems.
                near = _near(centres, centre, centres, centres.squared_radii[centre], space, or_nearer=True)
                to_others = _exact_distances(centres.features[near], centres.features[centre])
                exact_radii[centre] = to_others.kthvalue(neighbour + 1).values
            if distance <= exact_radii[centre]:
                inside[index] = True
                break
    return inside.double().mean().item()


def _near(
    points: Manifold,
    index: int,
    centres: Manifold,
    squared: torch.Tensor,
    space: torch.Tensor,
    or_nearer: bool = False,
) -> torch.Tensor:
    """The centres whose squared distance from a point is as given, as far as rounding can tell; or is smaller."""
    found = _squared_distances(points, slice(index, index + 1), centres, slice(len(centres.norms)), space)[0]
    error = 2 * ROUNDING * (points.scale[index] + centres.scale)
    beyond = found - squared
    return ((beyond <= error) & ((beyond >= -error) | or_nearer)).nonzero().flatten()


def _blocks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _squared_distances(
    first: Manifold, row: slice, second: Manifold, column: slice, space: torch.Tensor
) -> torch.Tensor:
    """`(rows, columns)` in `space`, float32: rounding may make small ones negative."""
    rows, columns = first.centred[row], second.centred[column]
    block = space[: len(rows) * len(columns)].view(len(rows), len(columns))
    block.copy_(second.norms[column].expand_as(block)).addmm_(rows, columns.T, alpha=-2)
    return block.add_(first.norms[row][:, None])


def _exact_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Of each row to one, `(rows,)`, float64."""
    return torch.linalg.vector_norm(first.double() - second.double(), dim=1)
