"""Options of the commands that run a pipeline, and what they accept."""

from dataclasses import dataclass

from diffusers_adm.choices import DTYPES
from diffusers_adm.options import at_least, in_range, option


# Schedulers of diffusers, without the ending of their names. With "-guided", they have the settings that their authors advise for
# guided sampling (`solvers.GUIDED_SETTINGS`). With "-Karras", they have the noise levels of Karras et al. 2022 (arXiv 2206.00364, eq.
# 5), because few steps that are straight in sigma go astray.
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
# Schedulers of UNets with preconditioning alone.
PRECONDITIONED_SCHEDULERS = ("EDMEuler", "EDMDPMSolverMultistep", "CMStochasticIterative")

# Arguments of a pipeline's call that can be written on a command line, and their help.
SAMPLING_OPTIONS = {
    "guidance_scale": "Scale of classifier guidance; 0 is no guidance.",
    "num_inference_steps": "Number of steps.",
    "timestep_respacing": "Steps of DDPM or DDIM as a respacing string, such as ddim25, or of a consistency model, such as 0,22,39.",
    "condition_unet": "Whether the UNet is told the class.",
    "eta": "Noise of DDIM, in [0, 1].",
    "cfg_weight": "Weight w of classifier-free guidance; 0 is none.",
    "weaker": "Weaker prediction that `cfg_weight` moves away from: a name, or options as JSON.",
    "guidance_options": "Options that say when guidance acts, and how strongly, as JSON.",
    "timesteps": "Training timesteps that DDPM or DDIM visits, or steps of CMStochasticIterative, as JSON.",
    "churn": "Noise added before each step, for a UNet with preconditioning, as JSON.",
    "epsilon_scale": "Divisor of the predicted noise, or as JSON the pair (k, b) for k t + b at timestep t.",
}

FORMATS = ("npz", "png")  # of samples
NEIGHBOUR = 3  # to which manifolds reach, of precision and recall
MAX_IMAGES = 10**8  # more is a slip of the keyboard, for which nobody should wait until the memory is full
MAX_BATCH_SIZE = 10**5


@dataclass(frozen=True)
class ModelOptions:
    """Pipeline to load."""

    model: str | None = option(
        None,
        help="Folder or Hub id of a pipeline, or released:NAME of a released checkpoint. By default the one of digits that ships"
        " with this package.",
    )
    revision: str | None = option(None, help="Branch, tag or commit on the Hub.")
    variant: str | None = option(None, help="Variant of the weight files, such as fp16.")
    dtype: str = option("float32", choices=DTYPES, help="Data type of the weights.")


@dataclass(frozen=True)
class RunOptions:
    """Seed and batch size of a run."""

    seed: int = option(0, help="Seed of the run. The seed of each image is derived from it.", check=at_least(0))
    batch_size: int = option(50, help="Number of images per batch.", check=in_range(1, MAX_BATCH_SIZE))
