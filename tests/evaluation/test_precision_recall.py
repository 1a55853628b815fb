"""Precision and recall equal the values from all distances in float64."""

import pytest
import torch
from distances import direct_precision_and_recall

from diffusers_adm.evaluation import (
    RunningStatistics,
    precision_and_recall,
)


@pytest.mark.parametrize("block_size", [7, 5000])
@pytest.mark.parametrize("kind", ["gaussian", "far from zero", "lattice", "outlier", "copies", "clusters", "bfloat16"])
def test_precision_and_recall_are_those_of_all_distances(kind, block_size):
    generator = torch.Generator().manual_seed(1)
    reference, samples = torch.randn(60, 4, generator=generator), 0.7 * torch.randn(50, 4, generator=generator)
    if kind == "far from zero":
        reference, samples = reference + 1000, samples + 1000
    if kind == "lattice":  # on the edge of a ball lie many
        reference, samples = (3 * reference).round(), (3 * samples).round() + 1
    if kind == "outlier":
        reference[3] *= 1e3
    if kind == "copies":  # balls of radius 0
        reference, samples = reference[:15].repeat(4, 1), reference[:20].repeat(3, 1)
    if kind == "clusters":  # every fifth image lies far away
        reference, samples = torch.randn(2, 200, 16, generator=generator)
        reference[::5] += 100
        samples[::5] += 100
    if kind == "bfloat16":
        reference, samples = reference.bfloat16(), samples.bfloat16()
    found = precision_and_recall(reference, samples, block_size=block_size)
    assert found == direct_precision_and_recall(reference.double().numpy(), samples.double().numpy())


def test_precision_and_recall_of_known_sets():
    line = torch.tensor([[0.0], [1.0], [2.0], [3.0]])  # balls of radius 3, 2, 2, 3: all from -3 to 6
    samples = torch.tensor([[6.0], [6.25], [100.0], [-3.0]])  # the first and the last are on the edge
    assert precision_and_recall(line, samples) == (0.5, 1.0)
    assert precision_and_recall(line, line) == (1.0, 1.0)
    assert precision_and_recall(line, line + 1000) == (0.0, 0.0)
    with pytest.raises(ValueError, match="as the reference, 1, but have 2"):
        precision_and_recall(line, line.repeat(1, 2))
    with pytest.raises(ValueError, match="too large"):
        precision_and_recall(1e25 * line, line)


def test_features_that_are_not_finite_are_refused():
    features = torch.randn(10, 3)
    features[4, 1] = torch.nan
    with pytest.raises(ValueError, match="samples must be finite"):
        precision_and_recall(torch.randn(10, 3), features)
    running = RunningStatistics()
    running.update(features)
    with pytest.raises(ValueError, match="must be finite"):
        running.finish()
