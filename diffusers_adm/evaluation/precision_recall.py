"""Precision and recall of samples by their nearest neighbours (Kynkaanniemi et al. 2019, arXiv 1904.06991)."""

import torch

from diffusers_adm.evaluation.options import NEIGHBOUR


# Upper bound of the rounding error of a squared distance, as a fraction of the squared norms that it is computed from.
ROUNDING = 64 * torch.finfo(torch.float32).eps


def check_features(name: str, features: torch.Tensor) -> None:
    """Raises a ValueError if the features of a set, `(images, features)`, are not finite or all the same."""
    if not features.sum(dim=0, dtype=torch.float64).isfinite().all():
        raise ValueError(f"The features of the {name} must be finite, but some are not.")
    if (features == features[0]).all():
        raise ValueError(f"The features of the {name} must differ, but all are the same.")


def precision_and_recall(
    reference: torch.Tensor, samples: torch.Tensor, neighbour: int = NEIGHBOUR, block_size: int = 5000
) -> tuple[float, float]:
    """
    Returns precision and recall (eq. 2). Precision is the fraction of samples within the manifold of the reference. Recall is the
    fraction of reference images within the manifold of the samples. A manifold is a union of balls, one around each image. A ball
    reaches to the n-th nearest other image.

    Distances are computed in float32. Where rounding could change the result, they are computed again in float64. Therefore the
    result does not depend on the block size or the order of the images. At most `block_size` x `block_size` distances are in memory at
    a time.

    Args:
        reference: Features of the reference, `(images, features)`.
        samples: Features of the samples by the same extractor, `(images, features)`.
        neighbour: Number n of the nearest other image to which a ball reaches.
        block_size: Number of rows per block.

    Raises:
        ValueError: If there are too few images, or features are not finite or all the same.
    """
    for name, features in (("reference", reference), ("samples", samples)):
        if len(features) <= neighbour:
            raise ValueError(
                f"Precision and recall require more than {neighbour} images, but got {len(features)} in the {name}."
            )
        check_features(name, features)
    if reference.shape[1] != samples.shape[1]:
        raise ValueError(
            f"The samples must have as many features as the reference, {reference.shape[1]}, but have {samples.shape[1]}."
        )
    # Features are centred, because a large mean costs float32 distances their digits.
    exact = [features if features.dtype == torch.float64 else features.float() for features in (reference, samples)]
    centre = exact[0].mean(dim=0)
    # One buffer for all blocks: allocating memory takes longer than the search for neighbours.
    largest = min(block_size, max(len(reference), len(samples)))
    space = torch.empty(largest**2, device=centre.device)
    sets = [Manifold(features, centre, neighbour, block_size, space) for features in exact]

    # Depth of an image: its squared distance from the edge of the ball that it is deepest in, negative inside. It is divided by the
    # norms with which rounding errors grow, so that the large errors of an outlier do not make other images doubtful.
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
    Manifold of a set of images: a ball around each image that reaches to its n-th nearest other image.

    Args:
        features: Features of the images, `(images, features)`.
        centre: Origin of the points, `(features,)`.
        neighbour: Number n of the nearest other image to which a ball reaches.
        block_size: Number of rows per block.
        space: Memory for the distances of a block.

    Raises:
        ValueError: If the distances are too large for float32.
    """

    def __init__(
        self, features: torch.Tensor, centre: torch.Tensor, neighbour: int, block_size: int, space: torch.Tensor
    ):
        self.features = features
        self.centred = (features - centre).float()
        self.norms = self.centred.square().sum(dim=1)  # (images,)
        if not self.norms.isfinite().all():
            raise ValueError(
                "The features must be small enough for finite distances in float32, but they are too large."
            )
        self.squared_radii = _squared_radii(self, neighbour, block_size, space)  # (images,), rounded
        # Rounding errors of distances to the edges of the balls grow with this scale.
        self.scale = self.norms + self.squared_radii


def _squared_radii(points: Manifold, neighbour: int, block_size: int, space: torch.Tensor) -> torch.Tensor:
    """Returns the squared distance of each image to its n-th nearest other image, `(images,)`, rounded."""
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
    """Returns the fraction of points inside a ball. Where rounding of a depth could decide, exact distances are computed."""
    tolerance = ROUNDING * growth  # (images,)
    inside = depth < -tolerance
    space = depth.new_empty(len(centres.norms))
    exact_radii: dict[int, torch.Tensor] = {}
    for index in (depth.abs() <= tolerance).nonzero().flatten().tolist():
        beyond, error = _beyond(points, index, centres, centres.squared_radii, space)
        if (beyond < -error).any():  # without doubt inside another ball
            inside[index] = True
            continue
        doubtful = (beyond <= error).nonzero().flatten()
        distances = _exact_distances(centres.features[doubtful], points.features[index])
        for centre, distance in zip(doubtful.tolist(), distances):
            if centre not in exact_radii:
                # The nearest point is the centre itself. The n-th other point is at most as far as the rounded radius.
                beyond, error = _beyond(centres, centre, centres, centres.squared_radii[centre], space)
                near = (beyond <= error).nonzero().flatten()
                to_others = _exact_distances(centres.features[near], centres.features[centre])
                exact_radii[centre] = to_others.kthvalue(neighbour + 1).values
            if distance <= exact_radii[centre]:
                inside[index] = True
                break
    return inside.double().mean().item()


def _beyond(
    points: Manifold, index: int, centres: Manifold, squared: torch.Tensor, space: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the squared distance of a point to each centre, minus `squared`, and its largest rounding error, `(centres,)`."""
    distances = _squared_distances(points, slice(index, index + 1), centres, slice(len(centres.norms)), space)[0]
    return distances - squared, 2 * ROUNDING * (points.scale[index] + centres.scale)


def _blocks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _squared_distances(
    first: Manifold, row: slice, second: Manifold, column: slice, space: torch.Tensor
) -> torch.Tensor:
    """Computes squared distances in `space`, `(rows, columns)`, float32. Rounding may make small ones negative."""
    rows, columns = first.centred[row], second.centred[column]
    block = space[: len(rows) * len(columns)].view(len(rows), len(columns))
    block.copy_(second.norms[column].expand_as(block)).addmm_(rows, columns.T, alpha=-2)
    return block.add_(first.norms[row][:, None])


def _exact_distances(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Returns the distance of each row of `first` to `second`, `(rows,)`, float64."""
    return torch.linalg.vector_norm(first.double() - second.double(), dim=1)
