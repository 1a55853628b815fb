"""Calibration of a classifier: agreement of its confidence with its accuracy.

Source: Guo et al. 2017, "On Calibration of Modern Neural Networks" (arXiv 1706.04599), section 2.
"""

import torch


def expected_calibration_error(confidence: torch.Tensor, correct: torch.Tensor, num_bins: int = 15) -> float:
    """
    Returns the distance of confidence from accuracy, on average over images in bins of equal confidence
    [Guo et al. 2017, eq. 3]. Guidance follows the gradient of the log-probability, so it needs correct probabilities, not
    only a correct argmax.

    Args:
        confidence: Probability of the predicted class, `(images,)`, in [0, 1].
        correct: Whether that class is the label, `(images,)`.
        num_bins: Number of bins of equal width.

    Returns:
        The expected calibration error in [0, 1]. 0 is calibrated.

    Raises:
        ValueError: If there are no images.
    """
    if len(confidence) == 0:
        raise ValueError("The calibration error of no images is not defined.")
    confidence, correct = confidence.cpu().double(), correct.cpu().double()
    # The bins are open below, as in the paper; a confidence of 0 cannot be the largest probability.
    bins = (confidence * num_bins).ceil().long().sub(1).clamp(0, num_bins - 1)
    gaps = torch.zeros(num_bins, dtype=torch.float64).index_add(0, bins, correct - confidence)
    return (gaps.abs().sum() / len(confidence)).item()
