"""Calls of a tiny `ClassifierGuidedPipeline`, and the inputs of its networks."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from tiny_models import tiny_pipeline, tiny_scheduler

from diffusers_adm import ClassifierGuidedPipeline


STEPS = 3
SCALE = 20.0  # random classifiers have small gradients
NAMES = {0: "tench, Tinca tinca", 1: "goldfish", 2: "shark", 3: "ray", 4: "cock"}
SOLVERS = {
    "ddpm": (DDPMScheduler, {}),
    "ddim": (DDIMScheduler, {}),
    "ddim eta": (DDIMScheduler, {"eta": 1.0}),
    "dpm++": (DPMSolverMultistepScheduler, {}),
    "unipc": (UniPCMultistepScheduler, {}),
}
every_solver = pytest.mark.parametrize("solver", SOLVERS)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def solver_pipeline(solver: str, **kwargs) -> tuple[ClassifierGuidedPipeline, dict]:
    """Returns a pipeline with the scheduler that `solver` names, and the other arguments of a call."""
    scheduler_class, call = SOLVERS[solver]
    return tiny_pipeline(scheduler=tiny_scheduler(scheduler_class), **kwargs), call


def draw(pipeline: ClassifierGuidedPipeline, class_labels=(1, 3), **kwargs) -> torch.Tensor:
    """Returns x_0 as a tensor. By default, the seed is fixed and the steps are few."""
    if isinstance(class_labels, tuple):
        class_labels = list(class_labels)
    arguments = {"generator": seeded(), "output_type": "latent", "guidance_scale": SCALE, **kwargs}
    if "timestep_respacing" not in arguments:
        arguments.setdefault("num_inference_steps", STEPS)
    return pipeline(class_labels, **arguments).images


def visited(pipeline: ClassifierGuidedPipeline, **kwargs) -> list[int]:
    """The training timesteps that the UNet is given, in order."""
    timesteps = []
    hook = pipeline.unet.register_forward_pre_hook(lambda _, args: timesteps.append(args[1]))
    draw(pipeline, **{"class_labels": [0, 1], "guidance_scale": 0.0, **kwargs})
    hook.remove()
    assert all((timestep == timestep[0]).all() for timestep in timesteps)
    return [int(timestep[0]) for timestep in timesteps]


def rows_seen(module: torch.nn.Module) -> list[int]:
    """A list that collects the batch size of every call of a model."""
    rows = []
    module.register_forward_pre_hook(lambda _, args: rows.append(args[0].shape[0]))
    return rows


def labels_seen(module: torch.nn.Module) -> list:
    """A list that collects the labels of every call of a UNet."""
    labels = []
    module.register_forward_pre_hook(lambda _, args: labels.append(None if args[2] is None else args[2].tolist()))
    return labels


def differ(first: torch.Tensor, second: torch.Tensor) -> bool:
    return (first - second).abs().max().item() > 1e-3


def refused(pipeline: ClassifierGuidedPipeline, *messages: str, **call) -> None:
    """Asserts that a call raises a ValueError that holds each message, before the UNet runs."""
    rows = rows_seen(pipeline.unet)
    with pytest.raises(ValueError) as error:
        draw(pipeline, **call)
    for message in messages:
        assert message in str(error.value), str(error.value)
    assert rows == []
