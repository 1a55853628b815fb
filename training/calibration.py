"""Calibration of a classifier: agreement of its confidence with its accuracy.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599), section 2.
"""

import torch


def expected_calibration_error(confidence: torch.Tensor, correct: torch.Tensor, num_bins: int = 15) -> float:
    """
    Returns the mean distance between confidence and accuracy in bins of the confidence [Guo et al. 2017, eq. 3].

    Guidance follows the gradient of the log-probability. It therefore needs correct probabilities, not only a correct argmax.

    Args:
        confidence: Probability of the predicted class, `(images,)`, in [0, 1].
        correct: Whether the predicted class is the label, `(images,)`.
        num_bins: Number of bins. All have the same width.

    Returns:
        Expected calibration error in [0, 1]. It is 0 for a calibrated classifier.

    Raises:
        ValueError: If there are no images.
    """
    if len(confidence) == 0:
        raise ValueError("The calibration error requires at least one image, but got 0.")
    confidence, correct = confidence.cpu().double(), correct.cpu().double()
    # Bins exclude their lower end, as in the paper. No image is lost, because the largest probability is never 0.
    bins = (confidence * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add(0, bins, correct - confidence)
    return (gaps.abs().sum() / len(confidence)).item()
