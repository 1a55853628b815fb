"""Time of the parts of an evaluation, against straightforward implementations: `python -m diffusers_adm.benchmarks.metrics`.

Each part is of 10,000 images' features, as many numbers as Inception gives; both ways of a part take turns, and the median
counts. The straightforward ones are NumPy's covariance, a matrix square root by general eigenvectors, and torch-fidelity's
precision and recall. The floor of the last is the time of its three matrix products alone.
"""

import argparse

import numpy as np
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_part

from diffusers_adm.benchmarks.timing import seconds
from diffusers_adm.evaluation.statistics import (
    GaussianStatistics,
    RunningStatistics,
    frechet_distance,
    precision_and_recall,
)


def running_statistics(features: torch.Tensor, batch_size: int = 64) -> GaussianStatistics:
    """As `summarise` takes them."""
    running = RunningStatistics()
    for batch in features.split(batch_size):
        running.update(batch)
    return running.finish()


def plain_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """By the square root of the product of the covariances, from its eigenvectors."""
    values, vectors = np.linalg.eig(first.covariance @ second.covariance)
    root = (vectors * np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)
    difference = first.mean - second.mean
    return difference @ difference + np.trace(first.covariance + second.covariance - 2 * root.real)


def main() -> None:
    """Measures all, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--features", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()

    generator = torch.Generator().manual_seed(0)
    # Of the size and the spread of Inception's features: not negative, and few of them large.
    spread = torch.rand(args.features, generator=generator) + 0.1
    real, drawn = ((torch.randn(args.images, args.features, generator=generator) * spread).relu() for _ in range(2))
    gaussians = [running_statistics(features) for features in (real, drawn)]
    print(
        f"{args.images} x {args.features} features, {torch.get_num_threads()} threads, median of {args.rounds} rounds"
    )
    print(f"{'':<24}{'ours, s':>10}{'plain, s':>10}{'plain / ours':>14}")

    def report(name: str, ours: float, plain: float) -> None:
        print(f"{name:<24}{ours:>10.2f}{plain:>10.2f}{plain / ours:>14.2f}", flush=True)

    report(
        "mean and covariance",
        *seconds(
            [
                lambda: running_statistics(real),
                lambda: (real.numpy().mean(axis=0), np.cov(real.numpy(), rowvar=False)),
            ],
            args.rounds,
        ),
    )
    report(
        "Frechet distance",
        *seconds([lambda: frechet_distance(*gaussians), lambda: plain_distance(*gaussians)], args.rounds),
    )
    ours, plain, products = seconds(
        [
            lambda: precision_and_recall(real, drawn),
            lambda: calculate_precision_recall_part(drawn, real),
            lambda: (real @ real.T, drawn @ drawn.T, real @ drawn.T),
        ],
        args.rounds,
    )
    report("precision and recall", ours, plain)
    print(f"{'  three products alone':<24}{products:>10.2f}: ours takes {ours / products:.2f} times that")


if __name__ == "__main__":
    main()
