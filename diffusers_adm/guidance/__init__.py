"""Guidance: gradients that steer the steps of a run (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4).

A guidance function takes four arguments:

- `x_t`: noised images, `(batch, channels, height, width)`, float32
- `timestep`: training timestep of each image, `(batch,)`, or its noise level sigma if the UNet has preconditioning
- `x_0`: predicted clean images, of the shape and dtype of `x_t`
- `class_labels`: class of each image, `(batch,)`, or `None`

It returns one log-probability per image, `(batch,)`, up to a constant. The gradient of the log-probability guides. A function may also
return a gradient itself, of the shape of `x_t`.

By default, the gradient is the sum of the gradients with respect to `x_t` and to `x_0`, as if `x_0` did not depend on `x_t`. If the
function has an attribute `through_unet` that is true, `x_0` depends on `x_t` through the UNet, and the gradient is taken with respect
to `x_t`. The option `through_unet` of [`GuidanceOptions`] overrides the attribute. The pipeline checks that the module in an attribute
`network` is in eval mode, and that all labels are below an attribute `num_classes`. For example, this function draws brighter images:

    def brighter(x_t, timestep, x_0, class_labels):
        return 100 * x_0.mean(dim=(1, 2, 3))

    pipe(guidance_fn=brighter, guidance_scale=1.0)

Tensors are `(batch, channels, height, width)` unless a docstring says otherwise.
"""

from diffusers_adm.diffusion import normalized, shift_epsilon, shift_mean

from .combination import GuiderCombination, WeightedCombination, combine_predictions, parse_guider
from .denoiser import RunDenoiser
from .functions import ClassifierGuidance, CleanClassifierGuidance, CLIPGuidance, classifier_gradient
from .gradient import GuidanceFunction, differentiable, guidance_gradient, leaf, shortened
from .guider import FiniteCheck, Guider
from .options import GuidanceOptions
from .sums import DiscriminatorGuidance, WeightedSum
from .weaker import WeakerPrediction


__all__ = [
    "CLIPGuidance",
    "ClassifierGuidance",
    "CleanClassifierGuidance",
    "DiscriminatorGuidance",
    "FiniteCheck",
    "GuidanceFunction",
    "GuidanceOptions",
    "Guider",
    "GuiderCombination",
    "RunDenoiser",
    "WeakerPrediction",
    "WeightedCombination",
    "WeightedSum",
    "classifier_gradient",
    "combine_predictions",
    "differentiable",
    "guidance_gradient",
    "leaf",
    "normalized",
    "parse_guider",
    "shift_epsilon",
    "shift_mean",
    "shortened",
]
