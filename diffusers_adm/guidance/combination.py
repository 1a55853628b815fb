"""Combination of a stronger and a weaker prediction, by classifier-free guidance or by a guider of diffusers."""

import copy
import inspect
from collections.abc import Callable

import torch
from diffusers import ConfigMixin, guiders

from diffusers_adm.checks import check_types, is_integer
from diffusers_adm.diffusion import epsilon_from_x_0


# Class names of the guiders of diffusers that are supported.
GUIDERS = (
    "AdaptiveProjectedGuidance",
    "AdaptiveProjectedMixGuidance",
    "ClassifierFreeGuidance",
    "ClassifierFreeZeroStarGuidance",
    "TangentialClassifierFreeGuidance",
)
# Guiders that combine predictions of x_0 (Sadat et al. 2024, arXiv 2410.02416). The others combine predictions of the noise.
GUIDERS_OF_X_0 = GUIDERS[:2]
# Reasons why the other guiders of diffusers are not supported.
REFUSED_GUIDERS = {
    "AutoGuidance": "it drops layers of transformers. Pass the weaker UNet as `weaker` with `cfg_weight`.",
    "FrequencyDecoupledGuidance": "it requires the package kornia.",
    "MagnitudeAwareGuidance": "its norm does not accept images.",
    "PerturbedAttentionGuidance": "it changes layers of transformers. Pass weaker='perturbed_attention' with `cfg_weight`.",
    "SkipLayerGuidance": "it skips layers of transformers.",
    "SmoothedEnergyGuidance": "it changes layers of transformers. Pass weaker='smoothed_attention' with `cfg_weight`.",
}


def combine_predictions(
    prediction: torch.Tensor, weaker: torch.Tensor, weight: torch.Tensor | float, channels: int
) -> torch.Tensor:
    """
    Returns (1 + w) * prediction - w * weaker. With a weaker output for the null class, this is classifier-free guidance (Ho &
    Salimans 2022, arXiv 2207.12598, eq. 6). With the output of a worse network, it is autoguidance (Karras et al. 2024, arXiv
    2406.02507).

    Args:
        prediction: Stronger output, `(batch, channels or 2 * channels, height, width)`. A learned variance is taken from it.
        weaker: Weaker output, of the same shape or without variance.
        weight: Weight w, one number or `(batch, 1, 1, 1)`.
        channels: Number of channels of the images.
    """
    combined = (1 + weight) * prediction[:, :channels] - weight * weaker[:, :channels]
    return torch.cat([combined, prediction[:, channels:]], dim=1)


class WeightedCombination:
    """
    Classifier-free guidance with one weight per image.

    Args:
        weight: Weight w of each image, `(batch, 1, 1, 1)`.
        factors: Factor of the weight at each step of the run.
    """

    def __init__(self, weight: torch.Tensor, factors: list[float]):
        self.weight = weight
        self.factors = factors

    def acts(self, step: int) -> bool:
        """Returns whether a step needs a weaker prediction."""
        return self.factors[step] != 0

    def __call__(
        self, run, prediction: torch.Tensor, weaker: torch.Tensor, x_t: torch.Tensor, step: int
    ) -> torch.Tensor:
        """Returns the guided output, `(batch, channels or 2 * channels, height, width)`."""
        return combine_predictions(prediction, weaker, self.weight * self.factors[step], x_t.shape[1])


class GuiderCombination:
    """
    Combination by a guider of diffusers in one run. A copy of the guider is used, so that the given guider does not change.

    Args:
        guider: Guider, one of `GUIDERS`.
        timesteps: Training timestep of each step of the run.
        factors: Factor at each step of the run, by which the guider's change of the prediction is multiplied.
        jumps_to: Function that returns whether noise is added before a step of the run.
    """

    def __init__(
        self, guider: ConfigMixin, timesteps: list[float], factors: list[float], jumps_to: Callable[[int], bool]
    ):
        self.guider = copy.deepcopy(guider)
        self.timesteps = timesteps
        self.factors = factors
        self.jumps_to = jumps_to

    def _begin_step(self, step: int) -> None:
        if step == 0 or self.jumps_to(step):
            self.guider.set_state(0, len(self.timesteps), self.timesteps[step])
            self.guider.prepare_inputs({})  # forgets the momentum of an earlier run, or of an earlier part of this run
        self.guider.set_state(step, len(self.timesteps), self.timesteps[step])

    def acts(self, step: int) -> bool:
        """Returns whether a step needs a weaker prediction."""
        self._begin_step(step)
        return self.factors[step] != 0 and self.guider.num_conditions > 1

    def __call__(
        self, run, prediction: torch.Tensor, weaker: torch.Tensor, x_t: torch.Tensor, step: int
    ) -> torch.Tensor:
        """Returns the guided output, `(batch, channels or 2 * channels, height, width)`."""
        of_x_0 = type(self.guider).__name__ in GUIDERS_OF_X_0
        pair = [run.x_0_and_epsilon(output, x_t, step)[0 if of_x_0 else 1] for output in (prediction, weaker)]
        guided = pair[0] + self.factors[step] * (self.guider.forward(*pair).pred - pair[0])
        if of_x_0:
            guided = epsilon_from_x_0(run.solver.schedule, x_t, run.solver.visits[step], guided)
        return run.with_epsilon(prediction, guided, x_t, step)


def parse_guider(given: ConfigMixin | dict) -> ConfigMixin:
    """
    Returns a guider of diffusers that can combine predictions of images.

    Args:
        given: Guider, or a dict. The entry `kind` of the dict is the name of the class, and the other entries are its arguments.

    Raises:
        ValueError: If the guider does not exist, cannot combine predictions of images, or has other arguments.
    """
    name = given.get("kind") if isinstance(given, dict) else type(given).__name__
    if not isinstance(name, str) or name not in (*GUIDERS, *REFUSED_GUIDERS):
        raise ValueError(f"`guider` must be a guider of diffusers, one of {GUIDERS}, but got {given!r}.")
    if name in REFUSED_GUIDERS:
        raise ValueError(f"`guider` must not be {name}: {REFUSED_GUIDERS[name]}")
    if isinstance(given, dict):
        cls, arguments = getattr(guiders, name), {key: value for key, value in given.items() if key != "kind"}
        known = set(inspect.signature(cls).parameters)
        if not arguments.keys() <= known:
            raise ValueError(f"`guider` of the kind {name} takes the entries {sorted(known)}, but got {given!r}.")
        check_types(cls.__init__, arguments)
        given = cls(**arguments)
    dims = getattr(given, "adaptive_projected_guidance_norm_dim", None)
    dims = dims if isinstance(dims, (tuple, list)) else (dims,)
    if not all(dim is None or (is_integer(dim) and 1 <= abs(dim) <= 3) for dim in dims):
        raise ValueError(
            "`guider` must have an adaptive_projected_guidance_norm_dim in [1, 3], the dimensions of channels, height and width, but got"
            f" {given.adaptive_projected_guidance_norm_dim!r}."
        )
    if getattr(given, "zero_init_steps", 0):
        raise ValueError(
            "`guider` must have zero_init_steps=0, because a prediction of zero noise is an error in diffusion models, but got"
            f" {given.zero_init_steps}."
        )
    return given
