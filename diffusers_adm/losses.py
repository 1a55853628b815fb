"""Training objectives, one number an image.

Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.1, for the hybrid loss; Dhariwal & Nichol 2021
(arXiv 2105.05233), section 4.3 and appendix H, for the classifier; Ho & Salimans 2022 (arXiv 2207.12598) for label
dropout.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from diffusers_adm.diffusion import (
    NoiseSchedule,
    discretized_log_likelihood,
    gaussian_kl,
    learned_log_variance,
    mean_bits,
    posterior_mean,
    read_prediction,
    read_table,
    split_learned_variance,
    x_0_from_prediction,
)


@dataclass
class HybridLoss:
    """
    Terms of the hybrid loss, `(batch,)` each.

    Args:
        total: What is minimised: `simple + vlb`.
        simple: Mean squared error of what is predicted.
        vlb: The weighted term of the variational bound; its gradient reaches the variance alone. `None` if the variance
            is not learned.
    """

    total: torch.Tensor
    simple: torch.Tensor
    vlb: torch.Tensor | None


def hybrid_loss(
    model_output: torch.Tensor,
    schedule: NoiseSchedule,
    x_0: torch.Tensor,
    x_t: torch.Tensor,
    index: torch.Tensor,
    noise: torch.Tensor,
    prediction_type: str = "epsilon",
    vlb_weight: float | None = None,
) -> HybridLoss:
    """
    Simple loss for the mean, variational bound for the variance [Nichol & Dhariwal 2021, eq. 16].

    Args:
        model_output: Of the network at x_t, `(batch, channels or 2 * channels, height, width)`; the second half is the
            learned variance. Without it the loss is the simple one.
        schedule: All training timesteps.
        x_0: Clean images in [-1, 1], `(batch, channels, height, width)`.
        x_t: Noised images, same shape.
        index: Timestep of each image, `(batch,)`.
        noise: The noise in x_t, same shape as x_0.
        prediction_type: What the network predicts: `"epsilon"`, or `"sample"` for x_0.
        vlb_weight: Of the bound's term in bits a dimension; `None` for the paper's, a thousandth of the number of
            timesteps. 1 is the published code's unscaled form.

    Raises:
        ValueError: If the output has another number of channels, or the prediction type is unknown.
    """
    prediction, variance_interpolation = split_learned_variance(model_output.float(), x_0.shape[1])
    # Detached: the bound would give the mean a far noisier gradient than the simple loss does.
    predicted_x_0 = x_0_from_prediction(schedule, x_t, index, prediction.detach(), prediction_type)
    target = noise if prediction_type == "epsilon" else x_0
    simple = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(dim=1)
    if variance_interpolation is None:
        return HybridLoss(total=simple, simple=simple, vlb=None)
    log_variance = learned_log_variance(schedule, index, variance_interpolation)
    vlb = vlb_bits(schedule, x_0, x_t, index, predicted_x_0, log_variance)
    vlb = vlb * (len(schedule) / 1000 if vlb_weight is None else vlb_weight)
    return HybridLoss(total=simple + vlb, simple=simple, vlb=vlb)


def vlb_loss(
    model_output: torch.Tensor,
    schedule: NoiseSchedule,
    x_0: torch.Tensor,
    x_t: torch.Tensor,
    index: torch.Tensor,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_large",
) -> torch.Tensor:
    """
    The variational bound in bits a dimension, estimated from one timestep an image, `(batch,)`: its term there times the
    number of timesteps (the published code's rescaled KL). Mean and variance learn from it alike.

    Args:
        variance_type: The fixed variance of a network that learns none: `"fixed_large"` or `"fixed_small"`.
        model_output, schedule, x_0, x_t, index, prediction_type: As in [`hybrid_loss`].

    Raises:
        ValueError: If the output has another number of channels, or the prediction type is unknown.
    """
    found = read_prediction(schedule, x_t, index, model_output, prediction_type, variance_type)
    return vlb_bits(schedule, x_0, x_t, index, found.x_0, found.log_variance) * len(schedule)


def vlb_bits(
    schedule: NoiseSchedule,
    x_0: torch.Tensor,
    x_t: torch.Tensor,
    index: torch.Tensor,
    predicted_x_0: torch.Tensor,
    log_variance: torch.Tensor,
) -> torch.Tensor:
    """
    Term of the variational bound at each image's timestep, in bits a dimension, `(batch,)` [Ho et al. 2020, eq. 5]: the
    KL divergence of p(x_{t-1} | x_t) from the posterior, or at the first timestep the negative log-likelihood.

    Args:
        schedule: All training timesteps.
        x_0, x_t, predicted_x_0: Clean images in [-1, 1], noised ones, and the clean ones that the network predicts,
            `(batch, channels, height, width)`.
        index: Timestep of each image, `(batch,)`.
        log_variance: Of p(x_{t-1} | x_t); same shape as x_0, or one that broadcasts.
    """
    predicted_mean = posterior_mean(schedule, x_t, index, predicted_x_0)
    true_mean = posterior_mean(schedule, x_t, index, x_0)
    true_log_variance = read_table(schedule.posterior_log_variance, index, x_t)
    kl = mean_bits(gaussian_kl(true_mean, true_log_variance, predicted_mean, log_variance))
    nll = mean_bits(-discretized_log_likelihood(x_0, predicted_mean, log_variance))
    return torch.where(index == 0, nll, kl)


def classifier_loss(logits: torch.Tensor, labels: torch.Tensor, entropy_weight: float = 0.0) -> torch.Tensor:
    """
    Cross-entropy, `(batch,)`, and on request a penalty on confidence: the KL divergence of the predicted distribution
    from the uniform one. Classifiers trained with a weight of 0.1 guide for longer, because their gradient does not
    vanish once they are certain (entropy-constraint training: Li et al. 2022, arXiv 2206.11474).

    Args:
        logits: `(batch, num_classes)`.
        labels: `(batch,)`.
        entropy_weight: Of the penalty.
    """
    loss = F.cross_entropy(logits, labels, reduction="none")
    if entropy_weight == 0:
        return loss
    log_probabilities = logits.log_softmax(dim=1)
    divergence = (log_probabilities.exp() * log_probabilities).sum(dim=1) + math.log(logits.shape[1])
    return loss + entropy_weight * divergence


def drop_labels(
    class_labels: torch.Tensor, null_class: int, probability: float, generator: torch.Generator | None = None
) -> torch.Tensor:
    """
    Replaces labels by the null class at random, so that one network learns both the conditional and the unconditional
    model (Ho & Salimans 2022, Algorithm 1).

    Args:
        class_labels: `(batch,)`.
        null_class: The label that stands for "no class".
        probability: Of replacing each label, in [0, 1].
        generator: Of the random numbers; on the CPU or the labels' device.
    """
    device = class_labels.device if generator is None else generator.device
    dropped = torch.rand(class_labels.shape, generator=generator, device=device) < probability
    return torch.where(dropped.to(class_labels.device), null_class, class_labels)
