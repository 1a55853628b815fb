"""Statistics and the Frechet distance equal closed forms."""

import numpy as np
import pytest
import torch

from diffusers_adm.evaluation import (
    GaussianStatistics,
    RunningStatistics,
    frechet_distance,
)


def test_distance_of_gaussians_is_the_closed_form():
    generator = np.random.default_rng(0)
    basis, _ = np.linalg.qr(generator.normal(size=(5, 5)))
    first, second = generator.uniform(0.1, 3, 5), generator.uniform(0.1, 3, 5)
    shift = generator.normal(size=5)
    # Covariances that share their axes: the distance is that of the standard deviations along them.
    expected = ((first**0.5 - second**0.5) ** 2).sum() + (shift**2).sum()
    gaussians = [
        GaussianStatistics(mean, basis @ np.diag(variances) @ basis.T)
        for mean, variances in ((np.zeros(5), first), (shift, second))
    ]
    assert frechet_distance(*gaussians) == pytest.approx(expected, rel=1e-10)
    assert frechet_distance(gaussians[0], gaussians[0]) == pytest.approx(0, abs=1e-10)
    with pytest.raises(ValueError, match="got 5 and 3"):
        frechet_distance(gaussians[0], GaussianStatistics(np.zeros(3), np.eye(3)))


@pytest.mark.parametrize("fold", [1, 30, 2048])
def test_statistics_in_batches_are_those_of_all_at_once(fold, monkeypatch):
    monkeypatch.setattr(RunningStatistics, "ROWS_OF_A_FOLD", fold)
    features = torch.randn(103, 6, generator=torch.Generator().manual_seed(0)) + 1e4  # the mean must cost no digits
    running = RunningStatistics()
    for batch in features.split(10):
        running.update(batch)
    found = running.finish()
    exact = features.double().numpy()
    np.testing.assert_allclose(found.mean, exact.mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(exact, rowvar=False), rtol=1e-9, atol=1e-12)
