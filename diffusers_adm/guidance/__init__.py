"""Guidance: gradients that tell a step where to go (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4), and what they shift.

What guides is a function of four arguments, `(x_t, timestep, x_0, class_labels)`: the noised images and the clean ones that
the UNet predicts, `(batch, channels, height, width)`, float32; the training timestep of each, `(batch,)`; the class of each,
`(batch,)`, or `None`. It returns a log-probability of each image, `(batch,)`, up to a constant, whose gradient guides; or that
gradient itself, of x_t's shape. The gradient is the sum of those with respect to x_t and to x_0, where x_0 is held to be
independent of x_t; a function whose attribute `through_unet` is true gets an x_0 that depends on x_t by the UNet. So this draws
brighter images:

    def brighter(x_t, timestep, x_0, class_labels):
        return 100 * x_0.mean(dim=(1, 2, 3))

    pipe(guidance_fn=brighter, guidance_scale=1.0)

All tensors are `(batch, channels, height, width)` where nothing else is said.
"""

from diffusers_adm.diffusion import shift_epsilon, shift_mean

from .denoiser import Denoiser, combine_predictions
from .functions import ClassifierGuidance, CleanClassifierGuidance, CLIPGuidance, classifier_gradient
from .gradient import GuidanceFunction, differentiable, guidance_gradient, leaf, normalized, shortened
from .guider import FiniteCheck, Guider
from .options import GuidanceOptions
