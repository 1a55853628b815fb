"""Size, cost and expected time of an ablation, before it begins."""

import time
from collections.abc import Callable

import torch
from diffusers import ModelMixin

from diffusers_adm.ablation.runs import AblationRun, AblationSamples, describe_budget, drawing_pipeline
from diffusers_adm.evaluation.sampling import run_options
from diffusers_adm.evaluation.shards import one_thread
from diffusers_adm.launch import join_processes
from diffusers_adm.training.plan import device_name, forward_cost
from diffusers_adm.training.setup import build_optimizer, prepare_model, set_up_accelerator


TIMED_STEPS = 3


def variant_costs(unets: dict[str, ModelMixin]) -> dict[str, dict[str, int]]:
    """Returns the number of parameters and of multiplications and additions (MACs) per image of each UNet."""
    return {
        variant: {"parameters": unet.num_parameters(), "macs": forward_cost(unet)[0] // 2}
        for variant, unet in unets.items()
    }


def print_ablation_plan(
    runs: list[AblationRun],
    unets: dict[str, ModelMixin],
    costs: dict[str, dict[str, int]],
    samples: AblationSamples,
) -> None:
    """
    Prints the cost of each variant, and its expected time, from a few timed steps with random images.

    Args:
        runs: All runs.
        unets: UNet of each variant on the meta device.
        costs: Number of parameters and of MACs per image of each variant.
        samples: Samples to draw from each run.
    """
    show = join_processes().print
    show(f"{'variant':<20}{'parameters':>12}{'MACs/image':>12}{'train hours':>13}{'sample hours':>14}")
    total, seeds = 0.0, len({run.seed for run in runs})
    for variant, unet in unets.items():
        run = next(run for run in runs if run.variant == variant)
        train, sample = (seconds / 3600 for seconds in expected_seconds(run, unet, samples))
        total += seeds * (train + sample)
        parameters, macs = costs[variant]["parameters"] / 1e6, costs[variant]["macs"] / 1e6
        show(f"{variant:<20}{parameters:>10.2f} M{macs:>10.1f} M{train:>13.2f}{sample:>14.2f}", flush=True)
    accelerator = set_up_accelerator(runs[0].options)
    show(
        f"{describe_budget(runs[0])} {len(runs)} runs take about {total:.1f} hours on {accelerator.num_processes} x"
        f" {device_name(accelerator)}, without validations."
    )


def expected_seconds(run: AblationRun, unet: ModelMixin, samples: AblationSamples) -> tuple[float, float]:
    """Returns the expected seconds of the training and of the sampling of a run without guidance."""
    accelerator = set_up_accelerator(run.options)
    device, config, optimisation = accelerator.device, unet.config, run.options.optimisation
    # A separate UNet draws, because samples are drawn in float32 and without the settings of the training.
    drawing = type(unet).from_config(config).to(device)
    model = type(unet).from_config(config)
    prepare_model(model, run.options, accelerator)
    model, optimizer = accelerator.prepare(
        model, build_optimizer(model, optimisation, scaled=accelerator.scaler is not None)
    )

    def inputs(num_images: int) -> list[torch.Tensor]:
        images = torch.randn(num_images, config.in_channels, config.sample_size, config.sample_size, device=device)
        zeros = torch.zeros(num_images, dtype=torch.long, device=device)
        return [images, zeros] if config.num_class_embeds is None else [images, zeros, zeros]

    def step(batch: list[torch.Tensor] = inputs(optimisation.train_batch_size)) -> None:
        accelerator.backward(model(*batch).sample.square().mean())
        optimizer.step()
        optimizer.zero_grad()

    def draw(batch: list[torch.Tensor] = inputs(samples.batch_size)) -> None:
        with torch.no_grad(), one_thread(device):
            drawing(*batch)

    train = run.num_steps * optimisation.gradient_accumulation_steps * shortest_seconds(step, device)
    batches = -(-samples.num_images // samples.batch_size) / accelerator.num_processes
    pipeline = drawing_pipeline(run, drawing, samples)
    evaluations = len(run_options(pipeline, samples.call).solver(pipeline).visits)
    return train, batches * evaluations * shortest_seconds(draw, device)


def shortest_seconds(call: Callable[[], None], device: torch.device) -> float:
    """Returns the shortest time of a few calls, because other programs can only make a call slower."""
    times = []
    for _ in range(TIMED_STEPS):
        started = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return min(times)
