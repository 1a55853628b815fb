"""Training objectives, one number an image.

Source: Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.1, for the hybrid loss; Dhariwal & Nichol 2021
(arXiv 2105.05233), section 4.3 and appendix H, for the classifier.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .diffusion import (
    PREDICTION_TYPES,
    NoiseSchedule,
    discretized_log_likelihood,
    gaussian_kl,
    learned_log_variance,
    mean_bits,
    posterior_mean,
    read_table,
    split_learned_variance,
    x_0_from_epsilon,
)


@dataclass
class HybridLoss:
    """
    Terms of the hybrid loss, `(batch,)` each.

    Args:
        total: What is minimised: `simple + vlb`.
        simple: Mean squared error of what is predicted.
        vlb: The term of the variational bound, in bits a dimension, times `num_train_timesteps / 1000`; its gradient
            reaches the variance alone. `None` if the variance is not learned.
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
) -> HybridLoss:
    """
    Simple loss for the mean, variational bound for the variance [Nichol & Dhariwal 2021, eq. 16].

    Args:
        model_output: Of the network at x_t, `(batch, channels or 2 * channels, height, width)`; the second half is the
            learned variance.
        schedule: All training timesteps.
        x_0: Clean images in [-1, 1], `(batch, channels, height, width)`.
        x_t: Noised images, same shape.
        index: Timestep of each image, `(batch,)`.
        noise: The noise in x_t, same shape as x_0.
        prediction_type: What the network predicts: `"epsilon"`, or `"sample"` for x_0.

    Raises:
        ValueError: If the output has another number of channels, or the prediction type is unknown.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"prediction_type={prediction_type!r} is not one of {PREDICTION_TYPES}.")
    prediction, fraction = split_learned_variance(model_output.float(), x_0.shape[1])
    target = noise if prediction_type == "epsilon" else x_0
    simple = F.mse_loss(prediction, target, reduction="none").flatten(1).mean(dim=1)
    if fraction is None:
        return HybridLoss(total=simple, simple=simple, vlb=None)
    # Detached: the bound would give the mean a far noisier gradient than the simple loss does.
    mean = prediction.detach()
    predicted_x_0 = x_0_from_epsilon(schedule, x_t, index, mean) if prediction_type == "epsilon" else mean
    vlb = vlb_bits(schedule, x_0, x_t, index, predicted_x_0, fraction) * (len(schedule) / 1000)
    return HybridLoss(total=simple + vlb, simple=simple, vlb=vlb)


def vlb_bits(
    schedule: NoiseSchedule,
    x_0: torch.Tensor,
    x_t: torch.Tensor,
    index: torch.Tensor,
    predicted_x_0: torch.Tensor,
    fraction: torch.Tensor,
) -> torch.Tensor:
    """
    Term of the variational bound at each image's timestep, in bits a dimension, `(batch,)` [Ho et al. 2020, eq. 5]: the
    KL divergence of p(x_{t-1} | x_t) from the posterior, or at the first timestep the negative log-likelihood.

    Args:
        schedule: All training timesteps.
        x_0, x_t, predicted_x_0: Clean images in [-1, 1], noised ones, and the clean ones that the network predicts,
            `(batch, channels, height, width)`.
        index: Timestep of each image, `(batch,)`.
        fraction: The network's second half, same shape as x_0.
    """
    predicted_mean = posterior_mean(schedule, x_t, index, predicted_x_0)
    predicted_log_variance = learned_log_variance(schedule, index, fraction)
    true_mean = posterior_mean(schedule, x_t, index, x_0)
    true_log_variance = read_table(schedule.posterior_log_variance, index, x_t)
    kl = mean_bits(gaussian_kl(true_mean, true_log_variance, predicted_mean, predicted_log_variance))
    nll = mean_bits(-discretized_log_likelihood(x_0, predicted_mean, predicted_log_variance))
    return torch.where(index == 0, nll, kl)


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
