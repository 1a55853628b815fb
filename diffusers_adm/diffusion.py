"""The maths of Gaussian diffusion: noise schedule, forward process, posterior, learned variance, likelihood.

All functions work on tensors. `index` counts the steps of a [`NoiseSchedule`], and step 0 is the least noisy one. It is an int for
all images, or a tensor `(batch,)` with one index per image. Tables are float64. Values that are read from them are cast to float32.

Notation: alpha_bar is the cumulative product of (1 - beta) [Ho et al. 2020, eq. 4], x_0 the clean image, x_t the noised image, and
epsilon the noise.
"""

import math
from dataclasses import dataclass, fields

import torch

from diffusers_adm.betas import betas_from_config, checked_betas
from diffusers_adm.checks import as_numbers, check_images, is_integer
from diffusers_adm.choices import PREDICTION_TYPES
from diffusers_adm.respacing import respaced_timesteps


@dataclass(frozen=True)
class NoiseSchedule:
    """
    Tables of a noise schedule over the visited timesteps. Each table is `(steps,)`, and the least noisy step comes first.

    Args:
        timesteps: Training timestep of each step, which the network is given.
        beta: Variance of the noise that a step adds.
        log_beta: Logarithm of `beta`.
        alpha_bar: Cumulative product of (1 - beta).
        alpha_bar_prev: `alpha_bar` of the previous, less noisy step. It is 1 for the first step.
        signal_scale: sqrt(alpha_bar), the coefficient of x_0 in x_t [Ho et al. 2020, eq. 4].
        noise_scale: sqrt(1 - alpha_bar), the coefficient of epsilon in x_t.
        x_0_from_x_t: sqrt(1 / alpha_bar), the coefficient of x_t in x_0.
        sigma: Noise level sqrt(1 / alpha_bar - 1), the coefficient of -epsilon in x_0.
        posterior_variance: Variance of q(x_{t-1} | x_t, x_0) [Ho et al. 2020, eq. 7].
        posterior_log_variance: Logarithm of `posterior_variance`. The first entry would be -inf and repeats the second one.
        posterior_mean_x0: Coefficient of x_0 in the mean of q(x_{t-1} | x_t, x_0) [Ho et al. 2020, eq. 7].
        posterior_mean_xt: Coefficient of x_t in the mean of q(x_{t-1} | x_t, x_0).
    """

    timesteps: torch.Tensor
    beta: torch.Tensor
    log_beta: torch.Tensor
    alpha_bar: torch.Tensor
    alpha_bar_prev: torch.Tensor
    signal_scale: torch.Tensor
    noise_scale: torch.Tensor
    x_0_from_x_t: torch.Tensor
    sigma: torch.Tensor
    posterior_variance: torch.Tensor
    posterior_log_variance: torch.Tensor
    posterior_mean_x0: torch.Tensor
    posterior_mean_xt: torch.Tensor

    @classmethod
    def from_betas(cls, beta: torch.Tensor, timesteps: list[int] | None = None) -> "NoiseSchedule":
        """
        Builds the tables from betas.

        Args:
            beta: Betas of all training timesteps, `(num_train_timesteps,)`, float64.
            timesteps: Training timesteps to visit, in ascending order. `None` means all. Visited timesteps keep their alpha_bar,
                and the betas of the shorter process follow from it [Nichol & Dhariwal 2021, eq. 19].

        Raises:
            ValueError: If a beta is not in (0, 1), or `timesteps` are not ascending integers in [0, num_train_timesteps).
        """
        beta = checked_betas(beta)
        timesteps = torch.arange(len(beta)) if timesteps is None else as_numbers("timesteps", timesteps)
        integers = not timesteps.is_floating_point() and timesteps.ndim == 1 and len(timesteps)
        if not integers or timesteps[0] < 0 or timesteps[-1] >= len(beta) or (timesteps.diff() <= 0).any():
            raise ValueError(
                f"`timesteps` must be ascending integers in [0, {len(beta) - 1}], but got {timesteps.tolist()}."
            )
        return cls.from_alpha_bar(torch.cumprod(1 - beta, dim=0)[timesteps], timesteps)

    @classmethod
    def from_alpha_bar(cls, alpha_bar: torch.Tensor, timesteps: torch.Tensor) -> "NoiseSchedule":
        """
        Builds the tables from the cumulative product of (1 - beta).

        Args:
            alpha_bar: alpha_bar of each step, `(steps,)`, float64, descending.
            timesteps: Training timestep of each step, `(steps,)`.
        """
        alpha_bar_prev = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
        beta = 1 - alpha_bar / alpha_bar_prev
        posterior_variance = beta * (1 - alpha_bar_prev) / (1 - alpha_bar)
        # A process of a single step has no second entry to repeat. Its variance is beta, the upper bound.
        first = posterior_variance[1:2] if len(beta) > 1 else beta
        return cls(
            timesteps=timesteps,
            beta=beta,
            log_beta=beta.log(),
            alpha_bar=alpha_bar,
            alpha_bar_prev=alpha_bar_prev,
            signal_scale=alpha_bar.sqrt(),
            noise_scale=(1 - alpha_bar).sqrt(),
            x_0_from_x_t=alpha_bar.rsqrt(),
            sigma=(1 / alpha_bar - 1).sqrt(),
            posterior_variance=posterior_variance,
            posterior_log_variance=torch.cat([first, posterior_variance[1:]]).log(),
            posterior_mean_x0=beta * alpha_bar_prev.sqrt() / (1 - alpha_bar),
            posterior_mean_xt=(1 - alpha_bar_prev) * (1 - beta).sqrt() / (1 - alpha_bar),
        )

    @classmethod
    def from_config(cls, config: dict, timesteps: str | list[int] = "") -> "NoiseSchedule":
        """
        Builds the tables that the config of a diffusers scheduler describes. Betas are computed in float64, because the scheduler's
        own betas are rounded to float32, which alone changes a loss by 1e-4.

        Args:
            config: Config of a diffusers scheduler.
            timesteps: Training timesteps to visit: a respacing string of the original code, or an ascending list.

        Raises:
            ValueError: If the config does not describe betas, or the timesteps do not fit it.
        """
        beta = betas_from_config(config)
        timesteps = respaced_timesteps(timesteps, len(beta)) if isinstance(timesteps, str) else timesteps
        return cls.from_betas(beta, timesteps)

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Returns a float32 copy on a device, for loops that index the tables by a tensor on that device."""
        tables = {field.name: getattr(self, field.name) for field in fields(self)}
        tables = {name: table.float() if table.is_floating_point() else table for name, table in tables.items()}
        return NoiseSchedule(**{name: table.to(device) for name, table in tables.items()})


def timestep_at(schedule: NoiseSchedule, sigma: torch.Tensor) -> torch.Tensor:
    """
    Returns the timestep at which a schedule has a noise level, a float tensor of the shape of `sigma`. Between two steps of the
    schedule, the timestep is interpolated in log(sigma). Outside the schedule, it is the nearest step.

    Args:
        schedule: Noise schedule over all training timesteps.
        sigma: Noise level sqrt((1 - alpha_bar) / alpha_bar) of each image, `(batch,)`.
    """
    level = sigma.log()
    levels = schedule.sigma.log().to(sigma.dtype).to(sigma.device, non_blocking=sigma.is_cuda)  # MPS has no float64
    above = torch.searchsorted(levels, level).clamp(1, len(levels) - 1)
    fraction = (level - levels[above - 1]) / (levels[above] - levels[above - 1])
    return above - 1 + fraction.clamp(0, 1)


def read_table(table: torch.Tensor, index: int | torch.Tensor, like: torch.Tensor) -> torch.Tensor | float:
    """Returns the table's value at an index, in float32: a number for an int, `(batch, 1, 1, 1)` for a tensor of indices."""
    if is_integer(index):
        if not 0 <= index < len(table):
            raise ValueError(f"`index` of a step must be in [0, {len(table) - 1}], but got {index}.")
        return table[index].float().item()
    index = as_numbers("index", index)
    values = table.float().to(index.device)[index]
    return values.reshape(-1, *[1] * (like.ndim - 1)).to(like.device)


def add_noise(schedule: NoiseSchedule, x_0: torch.Tensor, index: int | torch.Tensor, noise: torch.Tensor):
    """
    Returns a sample of q(x_t | x_0) [Ho et al. 2020, eq. 4], `(batch, channels, height, width)`.

    Args:
        schedule: Steps of the process.
        x_0: Clean images, `(batch, channels, height, width)`.
        index: Step, one for all images or one per image.
        noise: Standard normal noise, of the shape of `x_0`.
    """
    return read_table(schedule.signal_scale, index, x_0) * x_0 + read_table(schedule.noise_scale, index, x_0) * noise


def renoise(schedule: NoiseSchedule, x: torch.Tensor, index: int, to_index: int, noise: torch.Tensor) -> torch.Tensor:
    """
    Returns a sample of q(x_t | x_s) for t > s: the forward process from one step of a schedule to a noisier one.

    Args:
        schedule: Steps of the process.
        x: Images at step `index`, `(batch, channels, height, width)`.
        index: Step of the schedule, or -1 for clean images.
        to_index: Noisier step of the schedule.
        noise: Standard normal noise, of the shape of `x`.

    Raises:
        ValueError: If `to_index` is not a noisier step of the schedule, or `x` and `noise` are not images of the same shape.
    """
    check_images("x", x)
    check_images("noise", noise)
    if x.shape != noise.shape:
        raise ValueError(f"`noise` must have the shape of `x`, {tuple(x.shape)}, but got {tuple(noise.shape)}.")
    if not (is_integer(index) and is_integer(to_index)):
        raise ValueError(f"`index` and `to_index` must be integers, but got {index!r} and {to_index!r}.")
    if not -1 <= index < to_index < len(schedule):
        raise ValueError(
            f"`to_index` must be above `index`, and both must be in [-1, {len(schedule) - 1}], but got to_index={to_index} and"
            f" index={index}."
        )
    before = schedule.alpha_bar[index].item() if index >= 0 else 1.0
    kept = schedule.alpha_bar[to_index].item() / before
    return kept**0.5 * x + (1 - kept) ** 0.5 * noise


def x_0_from_epsilon(schedule: NoiseSchedule, x_t: torch.Tensor, index: int | torch.Tensor, epsilon: torch.Tensor):
    """Returns the clean image x_0 that x_t and its noise imply. Shapes are `(batch, channels, height, width)`."""
    return read_table(schedule.x_0_from_x_t, index, x_t) * x_t - read_table(schedule.sigma, index, x_t) * epsilon


def epsilon_from_x_0(schedule: NoiseSchedule, x_t: torch.Tensor, index: int | torch.Tensor, x_0: torch.Tensor):
    """Returns the noise epsilon that x_t and its clean image imply. Shapes are `(batch, channels, height, width)`."""
    return (read_table(schedule.x_0_from_x_t, index, x_t) * x_t - x_0) / read_table(schedule.sigma, index, x_t)


def x_0_from_prediction(
    schedule: NoiseSchedule,
    x_t: torch.Tensor,
    index: int | torch.Tensor,
    prediction: torch.Tensor,
    prediction_type: str,
) -> torch.Tensor:
    """
    Returns the predicted x_0, `(batch, channels, height, width)`.

    Args:
        schedule: Steps of the process.
        x_t: Noised images, `(batch, channels, height, width)`.
        index: Step, one for all images or one per image.
        prediction: Prediction of the network, of the shape of `x_t`.
        prediction_type: Kind of the prediction: `"epsilon"`, or `"sample"` for x_0.

    Raises:
        ValueError: If the prediction type is unknown.
    """
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(f"`prediction_type` must be one of {PREDICTION_TYPES}, but got {prediction_type!r}.")
    return prediction if prediction_type == "sample" else x_0_from_epsilon(schedule, x_t, index, prediction)


def posterior_mean(schedule: NoiseSchedule, x_t: torch.Tensor, index: int | torch.Tensor, x_0: torch.Tensor):
    """Returns the mean of q(x_{t-1} | x_t, x_0) [Ho et al. 2020, eq. 7], `(batch, channels, height, width)`."""
    return (
        read_table(schedule.posterior_mean_x0, index, x_t) * x_0
        + read_table(schedule.posterior_mean_xt, index, x_t) * x_t
    )


def shift_mean(mean: torch.Tensor, log_variance: torch.Tensor | float, gradient: torch.Tensor) -> torch.Tensor:
    """
    Returns the mean of the guided step p(x_{t-1} | x_t, y): mu + Sigma * gradient [Dhariwal & Nichol 2021, Algorithm 1].

    Args:
        mean: Mean of the unguided step, `(batch, channels, height, width)`.
        log_variance: Log-variance of the step.
        gradient: Gradient of log p(y | x_t), times the guidance scale, of the shape of `mean`.
    """
    variance = log_variance.exp() if isinstance(log_variance, torch.Tensor) else math.exp(log_variance)
    return mean + variance * gradient


def shift_epsilon(epsilon: torch.Tensor, noise_scale: torch.Tensor | float, gradient: torch.Tensor) -> torch.Tensor:
    """
    Returns the guided noise: epsilon - sqrt(1 - alpha_bar) * gradient [Dhariwal & Nichol 2021, Algorithm 2]. The paper leaves the
    guidance scale out of Algorithm 2.

    Args:
        epsilon: Predicted noise, `(batch, channels, height, width)`.
        noise_scale: sqrt(1 - alpha_bar).
        gradient: Gradient of log p(y | x_t), times the guidance scale, of the shape of `epsilon`.
    """
    return epsilon - noise_scale * gradient


def spherical_noise(noise: torch.Tensor, gradient: torch.Tensor, rate: float) -> torch.Tensor:
    """
    Returns noise that has been turned towards the gradient and scaled to a root mean square of 1, the length that noise has on average
    in high dimensions [Yang et al. 2024, arXiv 2402.03201, section 4]. Where the gradient is zero, the noise does not change.

    Args:
        noise: Standard normal noise, `(batch, channels, height, width)`.
        gradient: Gradient of log p(y | x_t) with respect to the noise, of any size, of the shape of `noise`.
        rate: Rate in (0, 1] at which the gradient's direction is mixed with the noise.
    """
    guided = gradient.abs().amax(dim=(1, 2, 3), keepdim=True) > 0  # (batch, 1, 1, 1)
    return torch.where(guided, normalized((1 - rate) * noise + rate * normalized(gradient)), noise)


def normalized(gradient: torch.Tensor) -> torch.Tensor:
    """Scales each image's gradient to a root mean square of 1. A gradient of zero stays zero."""
    size = root_mean_square(gradient)
    return gradient / size.where(size > 0, 1.0)


def root_mean_square(gradient: torch.Tensor) -> torch.Tensor:
    """Returns the root mean square of each image, `(batch, 1, 1, 1)`."""
    largest = gradient.detach().abs().amax(dim=(1, 2, 3), keepdim=True)
    largest = largest.where(largest > 0, 1.0)  # squares of very large or small numbers would overflow or vanish
    mean = (gradient / largest).square().mean(dim=(1, 2, 3), keepdim=True)
    size = largest * mean.where(mean != 0, 1.0).sqrt()  # the square root has no derivative at 0
    return size.where(mean != 0, 0.0)


def split_learned_variance(model_output: torch.Tensor, channels: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """
    Splits the output of a network into the prediction and the learned variance, which is `None` if the network has none.

    Args:
        model_output: Output of the network, `(batch, channels or 2 * channels, height, width)`.
        channels: Number of channels of the images.

    Raises:
        ValueError: If the output has another number of channels.
    """
    if model_output.shape[1] == channels:
        return model_output, None
    if model_output.shape[1] != 2 * channels:
        raise ValueError(
            f"The network's output must have {channels} channels, as many as the images, or {2 * channels} channels with learned"
            f" variance, but got {model_output.shape[1]}."
        )
    return model_output.split(channels, dim=1)


def learned_log_variance(
    schedule: NoiseSchedule, index: int | torch.Tensor, variance_interpolation: torch.Tensor
) -> torch.Tensor:
    """
    Returns the learned log-variance of p(x_{t-1} | x_t) [Nichol & Dhariwal 2021, eq. 15].

    Args:
        schedule: Steps of the process.
        index: Step, one for all images or one per image.
        variance_interpolation: Second half of the network's output, `(batch, channels, height, width)`. -1 stands for the
            posterior variance (lower bound), and 1 stands for beta (upper bound).
    """
    lower = read_table(schedule.posterior_log_variance, index, variance_interpolation)
    upper = read_table(schedule.log_beta, index, variance_interpolation)
    v = (variance_interpolation + 1) / 2
    return v * upper + (1 - v) * lower


def fixed_log_variance(schedule: NoiseSchedule, variance_type: str) -> torch.Tensor:
    """
    Returns the fixed log-variance of p(x_{t-1} | x_t) at each step, `(steps,)`, float64.

    Args:
        schedule: Steps of the process.
        variance_type: Kind of the variance: `"fixed_large"` for beta, `"fixed_small"` or `"fixed_small_log"` for the posterior
            variance. At step 0 both kinds are the posterior variance of step 1, as in the original code. Guidance is then as strong
            at step 0 as at step 1.
    """
    if variance_type == "fixed_large":
        return torch.cat([schedule.posterior_log_variance[:1], schedule.log_beta[1:]])
    return schedule.posterior_log_variance


@dataclass
class Prediction:
    """
    Prediction of a network for noised images. Tensors are `(batch, channels, height, width)`, float32.

    Args:
        epsilon: Predicted noise.
        x_0: Predicted clean images.
        log_variance: Log-variance of p(x_{t-1} | x_t). A fixed one has a shape that broadcasts.
    """

    epsilon: torch.Tensor
    x_0: torch.Tensor
    log_variance: torch.Tensor

    @property
    def x_0_clipped(self) -> torch.Tensor:
        """Predicted x_0, clipped to [-1, 1]. The clipping options of a scheduler have no effect on it."""
        return self.x_0.clamp(-1, 1)


def read_prediction(
    schedule: NoiseSchedule,
    x_t: torch.Tensor,
    index: torch.Tensor,
    model_output: torch.Tensor,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_large",
) -> Prediction:
    """
    Converts the output of a network to its prediction: noise, x_0 and log-variance, in float32.

    Args:
        schedule: Steps of the process.
        x_t: Noised images, `(batch, channels, height, width)`.
        index: Step of each image, `(batch,)`.
        model_output: Output of the network, `(batch, channels or 2 * channels, height, width)`. The second half of the channels is
            the learned variance.
        prediction_type: Kind of the prediction: `"epsilon"`, or `"sample"` for x_0.
        variance_type: Variance of a network without learned variance: `"fixed_large"` or `"fixed_small"`.

    Raises:
        ValueError: If the output has another number of channels, or the prediction type is unknown.
    """
    prediction, variance_interpolation = split_learned_variance(model_output.float(), x_t.shape[1])
    x_0 = x_0_from_prediction(schedule, x_t, index, prediction, prediction_type)
    epsilon = prediction if prediction_type == "epsilon" else epsilon_from_x_0(schedule, x_t, index, x_0)
    if variance_interpolation is None:
        log_variance = read_table(fixed_log_variance(schedule, variance_type), index, x_t)
    else:
        log_variance = learned_log_variance(schedule, index, variance_interpolation)
    return Prediction(epsilon, x_0, log_variance)


def mean_bits(values: torch.Tensor) -> torch.Tensor:
    """Returns the mean over all but the batch dimension, converted from nats to bits, `(batch,)`."""
    return values.flatten(1).mean(dim=1) / math.log(2)


def gaussian_kl(
    mean: torch.Tensor, log_variance: torch.Tensor, other_mean: torch.Tensor, other_log_variance: torch.Tensor
) -> torch.Tensor:
    """Returns the elementwise KL divergence KL(first || second) of two diagonal Gaussians, in nats."""
    return 0.5 * (
        other_log_variance
        - log_variance
        - 1
        + torch.exp(log_variance - other_log_variance)
        + (mean - other_mean) ** 2 * torch.exp(-other_log_variance)
    )


def discretized_log_likelihood(x_0: torch.Tensor, mean: torch.Tensor, log_variance: torch.Tensor) -> torch.Tensor:
    """
    Returns the elementwise log-likelihood of 8-bit images, in nats, under a Gaussian that is integrated over each of the 256 bins
    [Ho et al. 2020, eq. 13].

    Args:
        x_0: Images in [-1, 1], `(batch, channels, height, width)`. Each value is -1 plus a multiple of 2 / 255.
        mean: Mean of the Gaussian, of the shape of `x_0` or one that broadcasts to it.
        log_variance: Log-variance of the Gaussian, of the shape of `x_0` or one that broadcasts to it.
    """
    centred = x_0 - mean
    inverse_std = torch.exp(-0.5 * log_variance)
    upper = _approximate_normal_cdf(inverse_std * (centred + 1 / 255))
    lower = _approximate_normal_cdf(inverse_std * (centred - 1 / 255))
    # The outermost bins reach to infinity. The clamp keeps the logarithm of an empty bin finite, as in the original code.
    probability = torch.where(x_0 < -0.999, upper, torch.where(x_0 > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()


def _approximate_normal_cdf(x: torch.Tensor) -> torch.Tensor:
    # Page's approximation (1977), because the original code uses it. The exact function changes its losses by 1e-4.
    return 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
