"""Options of the commands that run a pipeline, and their allowed values."""

from dataclasses import dataclass

from diffusers_adm.choices import DTYPES, WEAKER_KINDS
from diffusers_adm.options import at_least, in_range, option


# Names of schedulers of diffusers, without "Scheduler". "-guided" means the settings that the authors recommend for guided sampling
# (`solvers.GUIDED_SETTINGS`). "-Karras" means the noise levels of Karras et al. 2022 (arXiv 2206.00364, eq. 5). Only with these levels
# are a few steps that are straight lines in sigma accurate.
SCHEDULERS = (
    "DDPM",
    "DDIM",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "UniPCMultistep",
    "DEISMultistep",
    "SASolver",
    "PNDM",
    "EulerDiscrete",
    "EulerAncestralDiscrete",
    "HeunDiscrete",
    "KDPM2Discrete",
    "KDPM2AncestralDiscrete",
    "DPMSolverMultistep-guided",
    "UniPCMultistep-guided",
    "HeunDiscrete-Karras",
    "KDPM2Discrete-Karras",
)
# Schedulers that only UNets with preconditioning support.
PRECONDITIONED_SCHEDULERS = ("EDMEuler", "EDMDPMSolverMultistep", "CMStochasticIterative")


def parsed_scheduler(text: str) -> str:
    """Returns the name of a scheduler as the commands spell it, from a name in any case that may have the suffix `Scheduler`."""
    kind, dash, settings = text.partition("-")
    name = f"{kind.lower().removesuffix('scheduler')}{dash}{settings.lower()}"
    return next((known for known in (*SCHEDULERS, *PRECONDITIONED_SCHEDULERS) if known.lower() == name), text)


# Arguments of a pipeline's call that can be written on a command line, with the type of the value and the help.
SAMPLING_OPTIONS = {
    "guidance_scale": ("FLOAT", "Scale of classifier guidance. 0 means no guidance. Default: the pipeline's."),
    "num_inference_steps": ("INT", "Number of steps. Default: the pipeline's."),
    "timestep_respacing": (
        "TEXT",
        "Steps of DDPM or DDIM as a respacing string, such as ddim25, or of a consistency model, such as 0,22,39. Default: the"
        " pipeline's.",
    ),
    "condition_unet": ("true|false", "Whether the UNet is given the labels. Default: true."),
    "eta": ("FLOAT", "Noise of DDIM, in [0, 1]. Default: 0."),
    "cfg_weight": ("FLOAT", "Weight w of classifier-free guidance. 0 means no guidance. Default: 0."),
    "weaker": (
        "NAME|JSON",
        f"Weaker prediction that --cfg_weight moves away from: {', '.join(WEAKER_KINDS)}, or options in JSON, such as"
        ' {"kind": "smoothed_attention", "blur_sigma": 2}. Default: null_class.',
    ),
    "guider": (
        "JSON",
        "Guider of diffusers that replaces --cfg_weight, as an object in JSON, such as"
        ' {"kind": "AdaptiveProjectedGuidance", "guidance_scale": 2.5}. Default: none.',
    ),
    "guidance_fn": (
        "FILE:NAME",
        "Guidance function that replaces the classifier: NAME(pipeline) of a Python file returns it. The command runs the file, so"
        " pass only files that you trust. Default: none.",
    ),
    "guidance_options": (
        "JSON",
        "Options that say when guidance acts, and how strongly, as an object in JSON, such as"
        ' {"interval": [0.28, 2.9], "every": 2} or {"method": "dps"}. Default: guidance at all steps.',
    ),
    "timesteps": (
        "JSON",
        "Training timesteps to visit, or steps of CMStochasticIterative, as a list in JSON, such as [900,500,100]. Default: none.",
    ),
    "churn": (
        "JSON",
        "Noise added before each step of HeunDiscrete and EulerDiscrete, as an object in JSON, such as"
        ' {"s_churn": 40, "s_noise": 1.003}. Default: none.',
    ),
    "epsilon_scale": (
        "FLOAT|JSON",
        "Divisor of the predicted noise, or a pair [k, b] in JSON for the divisor k t + b at timestep t. Default: none.",
    ),
    "particles": ("INT", "Number of particles per image, of which one is kept. Default: 1."),
    "sigmas": ("JSON", "Noise levels to visit, as a list in JSON, such as [80,10,1,0.1]. Default: none."),
    "restart": (
        "JSON",
        "Part of the run that is repeated after noise has been added, as an object in JSON, such as"
        ' {"sigma_min": 0.3, "sigma_max": 2, "times": 3}, or a list of them. Default: none.',
    ),
}

FORMATS = ("npz", "png")  # formats of samples
NEIGHBOUR = 3  # balls of precision and recall reach to the third nearest other image, as in the paper
MAX_IMAGES = 10**8  # a larger number is a typing error, which should not fill the memory
MAX_BATCH_SIZE = 10**5
MAX_CANDIDATES = 1000  # of a search for steps, whose memory grows with it
# Arguments of a call that choose its steps, or add noise in them.
STEP_OPTIONS = (
    "num_inference_steps",
    "timestep_respacing",
    "timesteps",
    "sigmas",
    "eta",
    "churn",
    "restart",
    "particles",
)


@dataclass(frozen=True)
class ModelOptions:
    """Pipeline to load."""

    model: str | None = option(
        None,
        metavar="NAME_OR_PATH",
        help="Pipeline: a folder, a Hub id, shipped:NAME for one that ships with this package, such as shipped:adm-cifar-32, or"
        " released:NAME for a released checkpoint.",
        unset="the digits of 32x32 pixels that ship with this package",
    )
    revision: str | None = option(None, help="Branch, tag or commit of the pipeline on the Hub.", unset="main")
    variant: str | None = option(None, help="Variant of the weight files, such as fp16.")
    dtype: str = option("float32", choices=DTYPES, help="Data type of the weights.")


@dataclass(frozen=True)
class RunOptions:
    """Seed and batch size of a run."""

    seed: int = option(0, help="Seed of the run. The seed of each image is derived from it.", check=at_least(0))
    batch_size: int = option(
        50,
        help="Number of images per batch. All batches are whole: with 50, even one image takes as long as 50.",
        check=in_range(1, MAX_BATCH_SIZE),
    )
