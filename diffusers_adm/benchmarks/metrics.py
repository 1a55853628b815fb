"""Time of the parts of an evaluation, compared with plain implementations: `python -m diffusers_adm.benchmarks.metrics`.

By default, each part is computed for 10,000 images with as many features as Inception has. The two implementations of a part take
turns, and the median time counts. The plain implementations are NumPy's covariance, a matrix square root by general eigenvectors, and
precision and recall of torch-fidelity. The time of the three matrix products alone is a lower bound for precision and recall.
"""

import sys
from dataclasses import dataclass

import numpy as np
import torch
from torch_fidelity.metric_prc import calculate_precision_recall_part

from diffusers_adm.benchmarks.timing import median_seconds
from diffusers_adm.command_line import CommandParser, run_command
from diffusers_adm.evaluation.precision_recall import precision_and_recall
from diffusers_adm.evaluation.statistics import GaussianStatistics, RunningStatistics, frechet_distance
from diffusers_adm.options import add_examples, add_options, at_least, build_options, option


@dataclass(frozen=True)
class MetricsOptions:
    """Size of the sets of features, and number of measurements."""

    images: int = option(10_000, help="Number of images of each set.", check=at_least(4))
    features: int = option(2048, help="Number of features per image.", check=at_least(1))
    rounds: int = option(3, help="Number of rounds. The median time counts.", check=at_least(1))


def running_statistics(features: torch.Tensor, batch_size: int = 64) -> GaussianStatistics:
    """Returns the statistics of features, computed as in `summarise`."""
    running = RunningStatistics()
    for batch in features.split(batch_size):
        running.update(batch)
    return running.finish()


def plain_distance(first: GaussianStatistics, second: GaussianStatistics) -> float:
    """Returns the Frechet distance. The square root of the product of the covariances is computed from eigenvectors."""
    values, vectors = np.linalg.eig(first.covariance @ second.covariance)
    root = (vectors * np.sqrt(values.astype(complex))) @ np.linalg.inv(vectors)
    difference = first.mean - second.mean
    return difference @ difference + np.trace(first.covariance + second.covariance - 2 * root.real)


def random_features(images: int, features: int) -> list[torch.Tensor]:
    """Returns two sets of random features, distributed as Inception's: not negative, and few of them large."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.rand(features, generator=generator) + 0.1
    return [(torch.randn(images, features, generator=generator) * spread).relu() for _ in range(2)]


def main() -> None:
    """Times all parts, and prints a table."""
    parser = CommandParser(prog="python -m diffusers_adm.benchmarks.metrics", description=__doc__)
    add_options(parser, MetricsOptions, title="measurement")
    add_examples(
        parser,
        parser.prog,
        f"{parser.prog} --images 2000 --features 64",
    )
    args = build_options(MetricsOptions, parser.parse_args())

    real, drawn = random_features(args.images, args.features)
    gaussians = [running_statistics(features) for features in (real, drawn)]
    print(
        f"{args.images} x {args.features} features, {torch.get_num_threads()} threads, median of {args.rounds} rounds"
    )
    print(f"{'':<24}{'ours, s':>10}{'plain, s':>10}{'plain / ours':>14}")
    parts = {
        "mean and covariance": [
            lambda: running_statistics(real),
            lambda: (real.numpy().mean(axis=0), np.cov(real.numpy(), rowvar=False)),
        ],
        "Frechet distance": [lambda: frechet_distance(*gaussians), lambda: plain_distance(*gaussians)],
        "precision and recall": [
            lambda: precision_and_recall(real, drawn),
            lambda: calculate_precision_recall_part(drawn, real),
            lambda: (real @ real.T, drawn @ drawn.T, real @ drawn.T),
        ],
    }
    for name, calls in parts.items():
        ours, plain, *floor = median_seconds(calls, args.rounds)
        print(f"{name:<24}{ours:>10.2f}{plain:>10.2f}{plain / ours:>14.2f}", flush=True)
        for products in floor:
            print(f"{'  three products alone':<24}{products:>10.2f}, ours takes {ours / products:.2f} times as long")


if __name__ == "__main__":
    sys.exit(run_command("metrics", main))
