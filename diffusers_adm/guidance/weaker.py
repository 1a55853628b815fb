"""Weaker predictions. Classifier-free guidance and related methods extrapolate from the weaker prediction to the stronger one."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_adm.checks import check_types
from diffusers_adm.choices import WEAKER_KINDS
from diffusers_adm.diffusion import add_noise
from diffusers_adm.guidance.attention import (
    RecordingAttnProcessor,
    attention_layers,
    layers_of_lowest_resolution,
    with_processor,
)


@dataclass(frozen=True)
class WeakerPrediction:
    """
    Kind of a weaker prediction of the same UNet.

    Args:
        kind: Kind of the prediction:
            `"null_class"`: prediction for the null class (Ho & Salimans 2022, arXiv 2207.12598).
            `"random_class"`: prediction for a random class, drawn anew for each image and step. It replaces the null class of a
            UNet that has none (independent condition guidance, Sadat et al. 2024, arXiv 2407.02687).
            `"perturbed_attention"`: prediction of a UNet with changed attention layers, in which each token attends only to itself
            (Ahn et al. 2024, arXiv 2403.17377). It does not require classes.
            `"smoothed_attention"`: prediction for an image whose predicted x_0 has been blurred where the UNet attends (Hong et al.
            2023, arXiv 2210.00939). It does not require classes.
        layers: Names of attention layers, such as `"encoder.mid_blocks.0"`. `"perturbed_attention"` changes these layers, and
            `"smoothed_attention"` blurs where the last of them attends. `None` means the middle block, and for
            `"perturbed_attention"` also the level with the lowest resolution that has attention.
        blur_sigma: Standard deviation of the blur of `"smoothed_attention"` in pixels.
        threshold: Attention above which a place is blurred by `"smoothed_attention"`. The mean over all places is 1.

    Raises:
        ValueError: If the kind is unknown, or a number is out of its range.
    """

    kind: str = "null_class"
    layers: tuple[str, ...] | None = None
    blur_sigma: float = 3.0
    threshold: float = 1.0

    def __post_init__(self):
        check_types(type(self).__init__, vars(self))
        if self.kind not in WEAKER_KINDS:
            raise ValueError(f"`weaker` must be one of {WEAKER_KINDS}, a UNet or a function, but got {self.kind!r}.")
        if not 0 < self.blur_sigma < float("inf"):
            raise ValueError(f"`blur_sigma` of `weaker` must be above 0 and finite, but got {self.blur_sigma}.")
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(self.layers))

    @classmethod
    def parse(
        cls, given: "str | dict | WeakerPrediction | nn.Module | Callable | None"
    ) -> "WeakerPrediction | nn.Module | Callable":
        """
        Returns the object that a name or a dict describes. UNets and functions are returned unchanged.

        Raises:
            ValueError: If `given` has another type, or the dict has a name that is not an option.
        """
        if given is None or isinstance(given, str):
            return cls(given or "null_class")
        if isinstance(given, dict):
            unknown = [name for name in given if name not in cls.__dataclass_fields__]
            if unknown:
                raise ValueError(f"`weaker` takes the options {tuple(cls.__dataclass_fields__)}, but got {unknown}.")
            return cls(**given)
        if not callable(given) and not isinstance(given, cls):
            raise ValueError(f"`weaker` must be one of {WEAKER_KINDS}, a UNet or a function, but got {given!r}.")
        return given

    @property
    def needs_class(self) -> bool:
        """Whether the UNet must be given the class of each image."""
        return self.kind in ("null_class", "random_class")

    def layers_of(self, unet: nn.Module) -> tuple[str, ...]:
        """
        Returns the names of the attention layers.

        Raises:
            ValueError: If the UNet has no attention, or lacks one of the layers.
        """
        names = tuple(attention_layers(unet))
        layers = self.layers
        if layers is None and self.kind == "perturbed_attention":
            layers = layers_of_lowest_resolution(unet)
        elif layers is None:
            layers = tuple(name for name in names if "mid_blocks" in name)
        unknown = [layer for layer in layers if layer not in names]
        if unknown or not layers:
            raise ValueError(
                f"`layers` of `weaker` must be some of the UNet's attention layers {names}, but got {layers}."
            )
        return layers


class Predictions(Protocol):
    """Stronger and weaker prediction of one step, both `(batch, channels or 2 * channels, height, width)`, float32."""

    def __call__(
        self, run, x_t: torch.Tensor, timestep: torch.Tensor, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]: ...


class OtherClass:
    """
    Weaker prediction for another class. Both predictions come from one batch of twice the size.

    Args:
        labels: Function that returns the other class of each image, `(batch,)`. It is called at each step.
    """

    def __init__(self, labels: Callable[[], torch.Tensor]):
        self.labels = labels

    def __call__(self, run, x_t: torch.Tensor, timestep: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.cat([run.class_labels, self.labels()])
        low_res = None if run.low_res is None else torch.cat([run.low_res, run.low_res])
        both = run.output(run.unet, torch.cat([x_t, x_t]), torch.cat([timestep, timestep]), labels, low_res)
        return both.chunk(2)


class OtherUNet:
    """
    Weaker prediction by another UNet: a worse UNet in autoguidance (Karras et al. 2024, arXiv 2406.02507), or one with perturbed
    attention.

    Args:
        unet: UNet of the weaker prediction.
    """

    def __init__(self, unet: nn.Module):
        self.unet = unet

    def __call__(self, run, x_t: torch.Tensor, timestep: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = run.class_labels if self.unet.config.num_class_embeds is not None else None
        output = run.output(run.unet, x_t, timestep, run.class_labels, run.low_res)
        return output, run.output(self.unet, x_t, timestep, labels, run.low_res)


class FunctionPrediction:
    """
    Weaker prediction by a function of the caller.

    Args:
        function: Function `function(x_t, timestep, class_labels)` that returns a prediction of the same kind as the UNet's.
    """

    def __init__(self, function: Callable):
        self.function = function

    def __call__(self, run, x_t: torch.Tensor, timestep: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        output = run.output(run.unet, x_t, timestep, run.class_labels, run.low_res)
        weaker = self.function(x_t, timestep, run.class_labels)
        shapes = (x_t.shape, output.shape)
        if not isinstance(weaker, torch.Tensor) or weaker.shape not in shapes:
            got = tuple(weaker.shape) if isinstance(weaker, torch.Tensor) else type(weaker).__name__
            raise ValueError(f"`weaker` must return a prediction, {tuple(x_t.shape)}, but it returned {got}.")
        return output, weaker.float()


class SmoothedAttention:
    """
    Weaker prediction for a smoothed image: the predicted x_0 is blurred where the UNet attends, and gets the predicted noise again.

    Args:
        unet: UNet of both predictions.
        options: Options of the prediction.
    """

    def __init__(self, unet: nn.Module, options: WeakerPrediction):
        self.options = options
        self.processor = RecordingAttnProcessor()
        self.unet = with_processor(unet, options.layers_of(unet)[-1:], self.processor)

    def __call__(self, run, x_t: torch.Tensor, timestep: torch.Tensor, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        output = run.output(self.unet, x_t, timestep, run.class_labels, run.low_res)
        x_0, epsilon = run.x_0_and_epsilon(output, x_t, step)
        mask = attended_places(self.processor.attention, x_t.shape[2:], self.options.threshold)
        smooth = torch.where(mask, blurred(x_0, self.options.blur_sigma), x_0)
        smooth_x_t = add_noise(run.solver.schedule, smooth, run.solver.visits[step], epsilon)
        weaker = run.output(run.unet, smooth_x_t, timestep, run.class_labels, run.low_res)[:, : x_t.shape[1]]
        if run.predicts_x_0:
            weaker = weaker + (x_0 - smooth)  # x_0 at x_t, from the same predicted noise
        return output, weaker


def attended_places(attention: torch.Tensor, size: torch.Size, threshold: float) -> torch.Tensor:
    """
    Returns a mask of the places that the UNet attends to, `(batch, 1, height, width)`, boolean. It is true where the attention to a
    place, averaged over heads and summed over queries, is above a threshold.

    Args:
        attention: Weight of each key, `(batch, heads, queries, keys)`.
        size: Height and width of the images.
        threshold: Threshold. The mean over all places is 1.
    """
    attended = attention.float().mean(dim=1).sum(dim=1)  # (batch, keys)
    factor = round((size[0] * size[1] / attended.shape[1]) ** 0.5)
    places = attended.unflatten(
        1, (1, size[0] // factor, size[1] // factor)
    )  # (batch, 1, height / factor, width / factor)
    return F.interpolate((places > threshold).float(), size=tuple(size)) > 0.5


def blurred(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """
    Returns images after a Gaussian blur, of the same shape. The kernel reaches three standard deviations, or to the edge of smaller
    images. Beyond their borders, images are mirrored.

    Args:
        images: Images, `(batch, channels, height, width)`.
        sigma: Standard deviation of the kernel in pixels.
    """
    reach = min(math.ceil(3 * sigma), *(side - 1 for side in images.shape[2:]))
    offsets = torch.arange(-reach, reach + 1, device=images.device)
    kernel = torch.exp(-((offsets / sigma) ** 2) / 2)
    kernel = (kernel / kernel.sum()).expand(images.shape[1], 1, 1, -1)  # (channels, 1, 1, 2 * reach + 1)
    for _ in range(2):  # along the width, then along the height
        images = F.conv2d(F.pad(images, (reach, reach, 0, 0), mode="reflect"), kernel, groups=images.shape[1])
        images = images.transpose(2, 3)
    return images
