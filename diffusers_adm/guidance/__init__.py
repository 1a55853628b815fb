"""Guidance: gradients that steer the steps of a run (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4).

A guidance function takes four arguments, `(x_t, timestep, x_0, class_labels)`: the noised images and the predicted clean ones,
`(batch, channels, height, width)`, float32; the training timestep of each image, `(batch,)`, or its noise level sigma if the UNet has
preconditioning; the class of each image, `(batch,)`, or
`None`. It returns a log-probability per image, `(batch,)`, up to a constant, whose gradient guides; or that gradient itself, of the
shape of x_t. The gradient is the sum of those with respect to x_t and to x_0, where x_0 is taken as independent of x_t. A function whose
attribute `through_unet` is true gets an x_0 that depends on x_t through the UNet. For example, this draws brighter images:

    def brighter(x_t, timestep, x_0, class_labels):
        return 100 * x_0.mean(dim=(1, 2, 3))

    pipe(guidance_fn=brighter, guidance_scale=1.0)

Tensors are `(batch, channels, height, width)` unless a docstring says otherwise.
"""

from diffusers_adm.diffusion import shift_epsilon, shift_mean

from .denoiser import Denoiser, combine_predictions
from .functions import ClassifierGuidance, CleanClassifierGuidance, CLIPGuidance, classifier_gradient
from .gradient import GuidanceFunction, differentiable, guidance_gradient, leaf, normalized, shortened
from .guider import FiniteCheck, Guider
from .options import GuidanceOptions


__all__ = [
    "CLIPGuidance",
    "ClassifierGuidance",
    "CleanClassifierGuidance",
    "Denoiser",
    "FiniteCheck",
    "GuidanceFunction",
    "GuidanceOptions",
    "Guider",
    "classifier_gradient",
    "combine_predictions",
    "differentiable",
    "guidance_gradient",
    "leaf",
    "normalized",
    "shift_epsilon",
    "shift_mean",
    "shortened",
]
