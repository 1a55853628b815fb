"""Search for the best noise levels of few steps: GITS (Chen et al. 2024, arXiv 2405.11326).

Trajectories of many short steps are recorded. The cost of one long step is the distance between its end and the trajectory. The best
steps are the cheapest path to noise level 0. Two things differ from the paper:

- Distances are those of x_t instead of x_0 + sigma * epsilon, because an error of the latter shrinks on the way to x_0.
- The path may begin below the highest noise level, with pure noise. The distance of this noise from the trajectory is added to the cost.
"""

import copy
import json
import shlex
from dataclasses import dataclass

import torch

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.checks import is_integer
from diffusers_adm.diffusion import NoiseSchedule, timestep_at
from diffusers_adm.evaluation.options import STEP_OPTIONS
from diffusers_adm.evaluation.sampling import given_options, run_options
from diffusers_adm.evaluation.schedulers import set_scheduler
from diffusers_adm.evaluation.shards import image_generator, one_thread
from diffusers_adm.pipelines.class_labels import known_classes
from diffusers_adm.progress import with_progress


@dataclass(frozen=True)
class FoundSteps:
    """
    Steps that a search has found.

    Args:
        name: Name of the argument of a call that takes the steps: `"timesteps"`, or `"sigmas"` for a UNet with preconditioning.
        values: Value of the argument, most noisy first.
        sigmas: Noise level of each step.
    """

    name: str
    values: list[float]
    sigmas: list[float]

    def command(self, model: str | None, call: dict) -> str:
        """
        Returns a command line that draws samples with these steps by DPM-Solver++.

        Args:
            model: Pipeline, as on the command line. `None` means the default model.
            call: Other arguments of the pipeline's call.
        """
        scheduler = "DPMSolverMultistep" if self.name == "timesteps" else "EDMDPMSolverMultistep"
        words = ["diffusers-adm", "sample", "--output", "samples", "--scheduler", scheduler]
        words += [] if model is None else ["--model", str(model)]
        for name, value in {**call, self.name: self.values}.items():
            words += [f"--{name}", value if isinstance(value, str) else json.dumps(value)]
        return shlex.join(words)


def search_steps(
    pipeline: ClassifierGuidedPipeline,
    num_inference_steps: int,
    num_images: int = 64,
    batch_size: int = 50,
    seed: int = 0,
    num_candidates: int = 100,
    call: dict | None = None,
) -> FoundSteps:
    """
    Searches for the noise levels at which few steps follow the path of many steps best.

    Args:
        pipeline: Pipeline whose UNet and guidance are used. It is not changed.
        num_inference_steps: Number of steps to find.
        num_images: Number of images whose trajectories are recorded. Their classes are balanced.
        batch_size: Number of images per batch.
        seed: Seed of the images.
        num_candidates: Number of noise levels among which the search chooses.
        call: Arguments of the pipeline's call that change its predictions, such as `guidance_scale`.

    Raises:
        ValueError: If an argument is out of its range, or the pipeline is an upsampler or has a consistency model.
    """
    call = given_options(call)
    _check_search(pipeline, num_inference_steps, num_images, num_candidates, call)
    fine = copy.copy(pipeline)
    set_scheduler(fine, "EulerDiscrete")
    guidance_fn = run_options(fine, {**call, "num_inference_steps": 1}).guidance_fn
    if guidance_fn is not None:
        call["guidance_fn"] = guidance_fn
    name, values, sigmas = candidates(fine, num_candidates)
    if num_inference_steps > len(values):
        raise ValueError(
            f"`num_inference_steps` must be at most {len(values)}, the number of candidates, but got {num_inference_steps}."
        )
    costs = torch.zeros(len(values) + 1, len(values) + 1, dtype=torch.float64)
    numbers = torch.arange(num_images).split(batch_size)
    for batch in with_progress(numbers, len(numbers), "searching", "batches"):
        states = trajectories(fine, batch.tolist(), seed, {**call, name: values})
        for image in states.split(1, dim=1):  # one at a time, because intermediate results are larger than the states
            costs += step_costs(image, sigmas)
    places = cheapest_path(costs, num_inference_steps)
    return FoundSteps(name, [values[place] for place in places], [sigmas[place] for place in places])


def _check_search(
    pipeline: ClassifierGuidedPipeline, num_inference_steps: int, num_images: int, num_candidates: int, call: dict
) -> None:
    """Raises a `ValueError` if an argument of `search_steps` is out of its range."""
    if not isinstance(pipeline, ClassifierGuidedPipeline):
        raise ValueError(f"`pipeline` must be a ClassifierGuidedPipeline, but got {type(pipeline).__name__}.")
    if pipeline.unet.config.get("preconditioning") == "consistency":
        raise ValueError("`pipeline` must not have a consistency model, whose steps do not follow a path.")
    for name, value, least in (
        ("num_inference_steps", num_inference_steps, 1),
        ("num_images", num_images, 1),
        ("num_candidates", num_candidates, 2),
    ):
        if not (is_integer(value) and value >= least):
            raise ValueError(f"`{name}` must be an integer of at least {least}, but got {value!r}.")
    chosen = sorted(call.keys() & set(STEP_OPTIONS))
    if chosen:
        raise ValueError(f"`call` must not choose the steps of a search, but got {', '.join(chosen)}.")


def candidates(pipeline: ClassifierGuidedPipeline, count: int) -> tuple[str, list[float], list[float]]:
    """
    Returns the noise levels among which a search chooses, spaced as in Karras et al. 2022 (arXiv 2206.00364, eq. 5).

    Args:
        pipeline: Pipeline whose scheduler describes the noise.
        count: Number of candidates. There may be fewer, because training timesteps are integers.

    Returns:
        Name and value of the argument of a call that visits them, and their noise levels, most noisy first.
    """
    unet = pipeline.unet.config
    trained = None
    if unet.get("preconditioning") is None:
        trained = NoiseSchedule.from_config(pipeline.scheduler.config)
    low, high = (unet.sigma_min, unet.sigma_max) if trained is None else trained.sigma[[0, -1]].tolist()
    sigmas = torch.linspace(high ** (1 / 7), low ** (1 / 7), count, dtype=torch.float64) ** 7
    if trained is None:
        return "sigmas", sigmas.tolist(), sigmas.tolist()
    timesteps = sorted(set(timestep_at(trained, sigmas).round().int().tolist()), reverse=True)
    return "timesteps", timesteps, trained.sigma[timesteps].tolist()


def trajectories(pipeline: ClassifierGuidedPipeline, numbers: list[int], seed: int, call: dict) -> torch.Tensor:
    """
    Returns the x_t of a run of Euler's method, `(steps + 1, images, values)`. The last ones are at noise level 0.

    Args:
        pipeline: Pipeline with `EulerDiscreteScheduler`.
        numbers: Numbers of the images.
        seed: Seed of the images.
        call: Arguments of the pipeline's call.
    """
    classes = known_classes(pipeline)
    inputs = {"batch_size": len(numbers)} if classes is None else {"class_labels": [one % classes for one in numbers]}
    generators = [image_generator(seed, number) for number in numbers]
    states = []
    with one_thread(pipeline.device):
        for step in pipeline.steps(**inputs, generator=generators, output_type="latent", **call):
            states.append(step.x_t.flatten(1))
    return torch.stack([*states, step.latents.flatten(1)])


def step_costs(states: torch.Tensor, sigmas: list[float]) -> torch.Tensor:
    """
    Returns the error of one step of Euler's method between each two points of trajectories, `(steps + 1, steps + 1)`, float64. The first
    row is the error of a run that begins at each point with the first x_t. Row i + 1 has the steps from point i.

    Args:
        states: x_t at each point, `(steps + 1, images, values)`. The last ones are at noise level 0.
        sigmas: Noise level of each step, most noisy first.
    """
    levels = torch.tensor([*sigmas, 0.0], device=states.device)[:, None, None]
    scales = (1 + levels**2).sqrt()
    scaled = states * scales  # x_0 + sigma * epsilon, on whose paths Euler's method takes straight steps
    costs = torch.zeros(len(levels), len(levels), dtype=torch.float64)
    costs[0] = _distance(states[0], states)
    for start in range(len(sigmas)):
        lengths = levels[start + 1 :] - levels[start]
        slope = (scaled[start + 1] - scaled[start]) / lengths[0]
        ends = (scaled[start] + lengths * slope) / scales[start + 1 :]  # (later points, images, values)
        costs[start + 1, start + 1 :] = _distance(ends, states[start + 1 :])
    return costs


def _distance(found: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """Returns the root mean square difference per image, averaged over the images, `(points,)`."""
    return (found - exact).square().mean(dim=2).sqrt().mean(dim=1).double().cpu()


def cheapest_path(costs: torch.Tensor, steps: int) -> list[int]:
    """
    Returns the points at which the steps of the cheapest path begin, by dynamic programming.

    Args:
        costs: Cost of the beginning at each point, and of the step from each point to each later one, see `step_costs`.
        steps: Number of steps of the path.
    """
    later = torch.ones_like(costs[1:], dtype=torch.bool).triu(diagonal=1)
    lengths = costs[1:].masked_fill(~later, torch.inf)
    reached, origins = costs[0], []
    for _ in range(steps):
        reached, origin = (reached[:-1, None] + lengths).min(dim=0)
        origins.append(origin.tolist())
    path = [costs.shape[1] - 1]
    for origin in reversed(origins):
        path.append(origin[path[-1]])
    return path[:0:-1]
