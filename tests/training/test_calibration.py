"""Calibration error against cases whose value is known."""

import pytest
import torch

from diffusers_adm.training.calibration import expected_calibration_error


def test_error_is_the_gap_between_confidence_and_accuracy():
    confidence = torch.tensor([0.9] * 10 + [0.6] * 10)
    correct = torch.tensor([True] * 9 + [False] + [True] * 3 + [False] * 7)
    # The first ten are as sure as they should be; the others are right in 3 of 10, sure by 0.6.
    assert expected_calibration_error(confidence, correct) == pytest.approx(0.5 * 0.3, abs=1e-6)


def test_a_certain_and_right_classifier_is_calibrated():
    assert expected_calibration_error(torch.ones(5), torch.ones(5, dtype=torch.bool)) == 0
    assert expected_calibration_error(torch.ones(5), torch.zeros(5, dtype=torch.bool)) == 1


def test_bins_are_averaged_by_their_number_of_images():
    generator = torch.Generator().manual_seed(0)
    confidence = torch.rand(1000, generator=generator)
    correct = torch.rand(1000, generator=generator) < confidence**2
    expected = 0.0
    for k in range(10):
        inside = (confidence > k / 10) & (confidence <= (k + 1) / 10)
        if inside.any():
            gap = (correct[inside].double().mean() - confidence[inside].double().mean()).abs()
            expected += gap.item() * inside.double().mean().item()
    assert expected_calibration_error(confidence, correct, num_bins=10) == pytest.approx(expected, abs=1e-6)


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one image"):
        expected_calibration_error(torch.empty(0), torch.empty(0))
