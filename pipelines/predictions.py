"""Denoiser of a run: the UNet, and the weaker prediction that guides it."""

import torch
from diffusers import CMStochasticIterativeScheduler, DiffusionPipeline

from diffusers_adm.checks import is_number
from diffusers_adm.guidance import GuiderCombination, RunDenoiser, WeakerPrediction, WeightedCombination, parse_guider
from diffusers_adm.guidance.attention import IdentityAttnProcessor, with_processor
from diffusers_adm.guidance.weaker import FunctionPrediction, OtherClass, OtherUNet, Predictions, SmoothedAttention
from diffusers_adm.pipelines.checks import check_weaker_unet
from diffusers_adm.pipelines.class_labels import draw_labels
from diffusers_adm.pipelines.options import SamplingOptions, per_image
from diffusers_adm.solvers import Solver


def check_weaker(pipeline: DiffusionPipeline, options: SamplingOptions, has_labels: bool, batch_size: int) -> bool:
    """
    Checks guidance by a weaker prediction.

    Args:
        pipeline: Pipeline of the run.
        options: Resolved options of the run.
        has_labels: Whether each image has a label, given or drawn.
        batch_size: Number of images.

    Returns:
        Whether a weaker prediction guides.

    Raises:
        ValueError: If the UNet cannot make the weaker prediction, or the options contradict each other.
    """
    weighted = any(per_image(options.cfg_weight, batch_size, "cfg_weight"))
    weaker = WeakerPrediction.parse(options.weaker)
    if options.guider is not None:
        parse_guider(options.guider)
        if weighted:
            raise ValueError(
                f"`cfg_weight` must be 0 with `guider`, which has its own scale, but got {options.cfg_weight}."
            )
    guides = weighted or options.guider is not None
    if options.weaker is not None and not guides:
        raise ValueError("`weaker` requires a `cfg_weight` that is not 0, or a `guider`.")
    if not guides:
        return False
    has_class = has_labels and options.unet_takes_labels(pipeline)
    if isinstance(weaker, torch.nn.Module):
        check_weaker_unet(weaker, pipeline.unet, has_class)
    elif isinstance(weaker, WeakerPrediction):
        if weaker.kind == "null_class" and pipeline.unet.null_class is None:
            raise ValueError(
                "Classifier-free guidance requires a UNet with a null class (use_null_class), or another `weaker`, such as"
                " 'random_class' or 'perturbed_attention'."
            )
        if weaker.needs_class and not has_class:
            raise ValueError(
                f"weaker={weaker.kind!r} requires a UNet that is given the class of each image. Pass class_labels, or"
                " weaker='perturbed_attention', which requires no class."
            )
        if not weaker.needs_class:
            weaker.layers_of(pipeline.unet)
    return True


def build_denoiser(
    pipeline: DiffusionPipeline,
    options: SamplingOptions,
    solver: Solver,
    factors: list[float],
    labels: list[int] | None,
    batch_size: int,
    generator: torch.Generator | list[torch.Generator] | None,
    low_res: torch.Tensor | None = None,
) -> RunDenoiser:
    """
    Returns the denoiser of a run.

    Args:
        pipeline: Pipeline of the run.
        options: Resolved options of the run.
        solver: Run of the scheduler.
        factors: Factor of guidance at each step.
        labels: Class of each image, or `None`.
        batch_size: Number of images.
        generator: Generator of random classes, one for all images or one per image.
        low_res: Low-resolution images of an upsampler, `(batch, channels, any height, any width)`, or `None`.

    Raises:
        ValueError: If the guider or `epsilon_scale` is not valid, or the scheduler does not support it.
    """
    unet, device, class_labels = pipeline.unet, pipeline._execution_device, None
    if labels is not None and options.unet_takes_labels(pipeline):
        class_labels = torch.tensor(labels, device=device)
    elif unet.null_class is not None and not options.condition_unet:
        class_labels = torch.full((batch_size,), unet.null_class, device=device)
    weights = per_image(options.cfg_weight, batch_size, "cfg_weight")
    predictions, combination = None, None
    if any(weights) or options.guider is not None:
        predictions = _predictions(pipeline, options, class_labels, generator, weights)
    if any(weights):
        weight = torch.tensor(weights, dtype=torch.float32, device=device)[:, None, None, None]
        combination = WeightedCombination(weight, factors)
    elif options.guider is not None:
        combination = GuiderCombination(parse_guider(options.guider), timesteps_of(solver), factors, solver.jumps_to)
    scales = epsilon_scales(pipeline, options, solver)
    return RunDenoiser(unet, solver, class_labels, low_res, predictions, combination, scales, options.with_gradients)


def _predictions(
    pipeline: DiffusionPipeline,
    options: SamplingOptions,
    class_labels: torch.Tensor | None,
    generator: torch.Generator | list[torch.Generator] | None,
    weights: list[float],
) -> Predictions:
    """Returns the stronger and the weaker prediction of a run. The arguments are those of `build_denoiser`."""
    unet, weaker = pipeline.unet, WeakerPrediction.parse(options.weaker)
    if isinstance(weaker, torch.nn.Module):
        return OtherUNet(weaker)
    if not isinstance(weaker, WeakerPrediction):
        return FunctionPrediction(weaker)
    if weaker.kind == "perturbed_attention":
        return OtherUNet(with_processor(unet, weaker.layers_of(unet), IdentityAttnProcessor()))
    if weaker.kind == "smoothed_attention":
        return SmoothedAttention(unet, weaker)
    if weaker.kind == "null_class":
        return OtherClass(lambda: torch.full_like(class_labels, unet.null_class))

    guided = [row for row, weight in enumerate(weights) if weight or options.guider is not None]

    def random_classes() -> torch.Tensor:
        if not isinstance(generator, list):
            drawn = draw_labels(unet.config.num_class_embeds, len(class_labels), generator)
        else:  # images that are not guided draw nothing, so that their noise is the same in any batch
            own = [generator[row] for row in guided]
            drawn = torch.zeros(len(weights), dtype=torch.long, device=own[0].device)
            drawn[guided] = draw_labels(unet.config.num_class_embeds, len(own), own)
        return drawn.to(class_labels.device, non_blocking=True)

    return OtherClass(random_classes)


def timesteps_of(solver: Solver) -> list[float]:
    """Returns the timestep of each step of a run."""
    return solver.schedule.timesteps[solver.visits].tolist()


def epsilon_scales(pipeline: DiffusionPipeline, options: SamplingOptions, solver: Solver) -> list[float] | None:
    """
    Returns the divisor of epsilon at each step of a run, or `None`.

    Args:
        pipeline: Pipeline of the run.
        options: Options of the run.
        solver: Run of the scheduler.

    Raises:
        ValueError: If `epsilon_scale` is neither a number nor a pair of numbers, a divisor is not above 0, or the scheduler does not
            support it.
    """
    epsilon_scale = options.epsilon_scale
    if epsilon_scale is None:
        return None
    if isinstance(pipeline.scheduler, CMStochasticIterativeScheduler):
        raise ValueError(
            "`epsilon_scale` is not supported with CMStochasticIterativeScheduler, whose steps all lead to x_0, but got"
            f" {epsilon_scale}."
        )
    is_pair = (
        isinstance(epsilon_scale, (tuple, list)) and len(epsilon_scale) == 2 and all(map(is_number, epsilon_scale))
    )
    if not is_pair and not is_number(epsilon_scale):
        raise ValueError(f"`epsilon_scale` must be a number, or a pair of them, but got {epsilon_scale!r}.")
    slope, offset = epsilon_scale if is_pair else (0.0, epsilon_scale)
    scales = [slope * timestep + offset for timestep in timesteps_of(solver)]
    if not all(0 < scale < float("inf") for scale in scales):
        raise ValueError(f"`epsilon_scale` must be above 0 and finite at each step, but got {epsilon_scale}.")
    return scales
