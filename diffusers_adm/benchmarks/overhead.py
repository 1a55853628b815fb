"""Time that the pipeline adds to its networks, per step: `python -m diffusers_adm.benchmarks.overhead`.

A run of the default model takes turns with a loop that only evaluates the networks, as often as the run does: the UNet, and in guided
runs the classifier with its gradient. The difference is the time of the pipeline's own code: scheduler steps, guidance, hooks, noise.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusers_adm import ClassifierGuidedPipeline, default_model
from diffusers_adm.benchmarks.timing import median_seconds
from diffusers_adm.command_line import CommandParser, run_command
from diffusers_adm.options import add_examples, add_options, at_least, build_options, option


@dataclass(frozen=True)
class OverheadOptions:
    """Size and number of the runs."""

    batch_size: int = option(1, help="Number of images per batch.", check=at_least(1))
    steps: int = option(50, help="Number of steps per run.", check=at_least(1))
    rounds: int = option(7, help="Number of rounds, after one for warm-up. The median time counts.", check=at_least(1))


SCHEDULERS = (DDPMScheduler, DDIMScheduler)


def networks_alone(
    pipeline: ClassifierGuidedPipeline, batch_size: int, steps: int, guided: bool
) -> Callable[[], None]:
    """Returns a function that only evaluates the networks, as often as a run does."""
    unet, classifier, device = pipeline.unet, pipeline.classifier, pipeline.device
    shape = (batch_size, unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    x_t = torch.randn(shape, device=device, dtype=unet.dtype)
    timestep = torch.full((batch_size,), 500, device=device)
    labels = torch.full((batch_size,), 3, device=device)

    @torch.no_grad()
    def evaluate() -> None:
        for _ in range(steps):
            unet(x_t, timestep, labels)
            if guided:
                with torch.enable_grad():
                    leaf = x_t.detach().requires_grad_()
                    log_probabilities = classifier(leaf, timestep).logits.float().log_softmax(dim=-1)
                    torch.autograd.grad(log_probabilities.gather(1, labels[:, None]).sum(), leaf)

    return evaluate


def main() -> None:
    """Times runs with and without guidance, and prints the time that the pipeline adds."""
    parser = CommandParser(prog="python -m diffusers_adm.benchmarks.overhead", description=__doc__)
    add_options(parser, OverheadOptions, title="measurement")
    add_examples(
        parser,
        parser.prog,
        f"{parser.prog} --batch_size 4 --steps 10",
    )
    args = build_options(OverheadOptions, parser.parse_args())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    pipeline = ClassifierGuidedPipeline.from_pretrained(default_model()).to(device)
    pipeline.set_progress_bar_config(disable=True)
    print(
        f"Milliseconds per step of the default model: batch size {args.batch_size}, {args.steps} steps,"
        f" {str(pipeline.unet.dtype).removeprefix('torch.')}, {torch.get_num_threads()} threads on {device.type}, median of"
        f" {args.rounds} rounds"
    )
    for scheduler_class in SCHEDULERS:
        pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config)
        for guided in (False, True):

            def run() -> None:
                pipeline(
                    [3] * args.batch_size,
                    guidance_scale=float(guided),
                    num_inference_steps=args.steps,
                    output_type="latent",
                )

            calls = [run, networks_alone(pipeline, args.batch_size, args.steps, guided)]
            median_seconds(calls, 1)
            whole, networks = (1000 * time / args.steps for time in median_seconds(calls, args.rounds))
            name = f"{scheduler_class.__name__}, {'guided' if guided else 'unguided'}"
            print(
                f"{name:<26} total {whole:7.2f}   networks {networks:7.2f}   pipeline {whole - networks:6.2f}"
                f"   pipeline / networks {whole / networks - 1:6.1%}"
            )


if __name__ == "__main__":
    sys.exit(run_command("overhead", main))
