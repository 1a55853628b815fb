"""Training losses, one number per image.

Sources:
- hybrid loss: Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3.1
- loss of EDM: Karras et al. 2022 (arXiv 2206.00364), Table 1
- consistency models: Geng et al. 2024 (arXiv 2406.14548), section 3
- classifier: Dhariwal & Nichol 2021 (arXiv 2105.05233), section 4.3 and appendix H
- label dropout: Ho & Salimans 2022 (arXiv 2207.12598)
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


PSEUDO_HUBER = 0.00054  # per root of a dimension [Song & Dhariwal 2023, arXiv 2310.14189, section 3.3]


@dataclass
class HybridLoss:
    """
    Terms of the hybrid loss, `(batch,)` each.

    Args:
        total: Loss to minimise: `simple + vlb`.
        simple: Mean squared error of the predicted noise, or of the predicted x_0.
        vlb: Weighted term of the variational bound. Its gradient reaches only the variance. `None` without learned variance.
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
    Returns the hybrid loss: the simple loss trains the mean, and the variational bound trains the variance
    [Nichol & Dhariwal 2021, eq. 16].

    Args:
        model_output: Output of the network at x_t, `(batch, channels or 2 * channels, height, width)`. The second half of the
            channels is the learned variance. Without it, the loss is the simple loss.
        schedule: Noise schedule over all training timesteps.
        x_0: Clean images in [-1, 1], `(batch, channels, height, width)`.
        x_t: Noised images, of the shape of `x_0`.
        index: Timestep of each image, `(batch,)`.
        noise: Noise in `x_t`, of the shape of `x_0`.
        prediction_type: Kind of the prediction: `"epsilon"`, or `"sample"` for x_0.
        vlb_weight: Weight of the bound's term in bits per dimension. `None` means the paper's weight, the number of timesteps
            divided by 1000. The original code without rescaling has the weight 1.

    Raises:
        ValueError: If the output has another number of channels, or the prediction type is unknown.
    """
    prediction, variance_interpolation = split_learned_variance(model_output.float(), x_0.shape[1])
    # Detached, because the gradient of the bound with respect to the mean is far noisier than that of the simple loss.
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
    Returns the variational bound in bits per dimension, estimated from one timestep per image, `(batch,)`. The estimate is the
    bound's term at that timestep, times the number of timesteps (the rescaled KL of the original code). It trains both the mean
    and the variance.

    Args:
        model_output: Output of the network at x_t, `(batch, channels or 2 * channels, height, width)`. The second half of the
            channels is the learned variance.
        schedule: Noise schedule over all training timesteps.
        x_0: Clean images in [-1, 1], `(batch, channels, height, width)`.
        x_t: Noised images, of the shape of `x_0`.
        index: Timestep of each image, `(batch,)`.
        prediction_type: Kind of the prediction: `"epsilon"`, or `"sample"` for x_0.
        variance_type: Variance of a network without learned variance: `"fixed_large"` or `"fixed_small"`.

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
    Returns the term of the variational bound at each image's timestep, in bits per dimension, `(batch,)` [Ho et al. 2020, eq. 5].
    At timestep 0 the term is the negative log-likelihood of x_0. At other timesteps it is the KL divergence
    KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)).

    Args:
        schedule: Noise schedule over all training timesteps.
        x_0: Clean images in [-1, 1], `(batch, channels, height, width)`.
        x_t: Noised images, of the shape of `x_0`.
        index: Timestep of each image, `(batch,)`.
        predicted_x_0: Predicted x_0, of the shape of `x_0`.
        log_variance: Log-variance of p(x_{t-1} | x_t), of the shape of `x_0` or one that broadcasts to it.
    """
    predicted_mean = posterior_mean(schedule, x_t, index, predicted_x_0)
    true_mean = posterior_mean(schedule, x_t, index, x_0)
    true_log_variance = read_table(schedule.posterior_log_variance, index, x_t)
    kl = mean_bits(gaussian_kl(true_mean, true_log_variance, predicted_mean, log_variance))
    nll = mean_bits(-discretized_log_likelihood(x_0, predicted_mean, log_variance))
    return torch.where(index == 0, nll, kl)


def edm_loss(denoised: torch.Tensor, x_0: torch.Tensor, sigma: torch.Tensor, sigma_data: float) -> torch.Tensor:
    """
    Returns the squared error of the predicted x_0 with the weight of EDM, 1 / sigma^2 + 1 / sigma_data^2, `(batch,)`
    [Karras et al. 2022, Table 1]. This is the mean squared error of the network's output before the preconditioning.

    Args:
        denoised: Predicted x_0, `(batch, channels, height, width)`.
        x_0: Clean images in [-1, 1], of the shape of `denoised`.
        sigma: Noise level of each image, `(batch,)`.
        sigma_data: Standard deviation of the clean images.
    """
    error = F.mse_loss(denoised, x_0, reduction="none").flatten(1).mean(dim=1)
    return error * (sigma**-2 + sigma_data**-2)


def classifier_loss(logits: torch.Tensor, labels: torch.Tensor, entropy_weight: float = 0.0) -> torch.Tensor:
    """
    Returns the cross-entropy of each image, `(batch,)`, plus an optional penalty on confidence. The penalty is the KL divergence
    KL(predicted distribution || uniform distribution). A classifier that was trained with a weight of 0.1 guides at more steps,
    because its gradient does not vanish when it is certain (entropy-constraint training: Li et al. 2022, arXiv 2206.11474).

    Args:
        logits: Output of the classifier, `(batch, num_classes)`.
        labels: Class of each image, `(batch,)`.
        entropy_weight: Weight of the penalty.
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
        class_labels: Class of each image, `(batch,)`.
        null_class: Label that stands for "no class".
        probability: Probability that a label is replaced, in [0, 1].
        generator: Generator of the random numbers, on the CPU or on the labels' device.
    """
    device = class_labels.device if generator is None else generator.device
    dropped = torch.rand(class_labels.shape, generator=generator, device=device) < probability
    return torch.where(dropped.to(class_labels.device), null_class, class_labels)


def consistency_loss(
    predicted: torch.Tensor, target: torch.Tensor, sigma: torch.Tensor, target_sigma: torch.Tensor, sigma_data: float
) -> torch.Tensor:
    """
    Returns the distance between the predicted x_0 at two noise levels of one path, `(batch,)`. It is a Pseudo-Huber distance of the
    root mean square (Song & Dhariwal 2023, arXiv 2310.14189, section 3.3), with the weight 1 / (sigma - target_sigma) (Geng et al.
    2024, arXiv 2406.14548, section 3) plus 1 / sigma_data. The addend keeps the highest noise levels from being neglected, at which
    sampling begins.

    Args:
        predicted: Predicted x_0 at the noise level `sigma`, `(batch, channels, height, width)`.
        target: Predicted x_0 at the noise level `target_sigma`, of the shape of `predicted`.
        sigma: Higher noise level of each image, `(batch,)`.
        target_sigma: Lower noise level of each image, `(batch,)`.
        sigma_data: Standard deviation of the clean images.
    """
    error = F.mse_loss(predicted, target, reduction="none").flatten(1).mean(dim=1)
    distance = (error + PSEUDO_HUBER**2).sqrt() - PSEUDO_HUBER
    return distance * (1 / (sigma - target_sigma) + 1 / sigma_data)
