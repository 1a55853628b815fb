"""Time and memory of one sampling step: `python -m diffusers_adm.benchmarks.step`.

The models have the architecture of the released 64x64 models and random weights. Three pairs are compared, and the two of a pair take
turns: the UNet with diffusers' `UNet2DModel` of the same shape, the classifier's gradient with its forward pass, and a guided step with
an unguided one. Peak memory is measured in a process that loads one UNet and evaluates it. The time of the UNet's operations is shown
next to the time that its multiplications would take at the speed of one large matrix product. The UNet is also timed in bfloat16. With
`--packed`, it is also timed after compilation with weights that are packed for the CPU. This compilation takes minutes.
"""

import argparse
import copy
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from diffusers_adm import ADMUNet2DModel, ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.benchmarks.timing import last_line_of, median_seconds, peak_memory_bytes
from diffusers_adm.command_line import CommandParser, run_command
from diffusers_adm.guidance import classifier_gradient
from diffusers_adm.options import add_examples, add_options, at_least, build_options, option
from diffusers_adm.training.plan import forward_cost


LABEL = 207
TIMESTEP = 500
# Kinds of operations of a UNet, by words in the operations' names.
PARTS = {
    "convolutions": ("convolution",),
    "matrix products": ("addmm", "bmm", "mm"),
    "attention": ("attention",),
    "normalisation": ("group_norm", "batch_norm"),
}


@dataclass(frozen=True)
class StepOptions:
    """Size and number of the measurements."""

    batch_size: int = option(2, help="Number of images per batch.", check=at_least(1))
    rounds: int = option(5, help="Number of rounds, after one for warm-up. The median time counts.", check=at_least(1))
    steps: int = option(2, help="Number of steps per run of the pipeline.", check=at_least(1))
    packed: bool = option(False, help="Also time the UNet compiled with packed weights, which takes minutes.")


def build_adm() -> ADMUNet2DModel:
    """Builds a UNet with the default arguments, which describe the released class-conditional 64x64 UNet."""
    return ADMUNet2DModel().eval()


def build_stock() -> UNet2DModel:
    """Builds a UNet of the same shape from diffusers' own blocks."""
    levels = 3
    return UNet2DModel(
        sample_size=64,
        out_channels=6,
        block_out_channels=(192, 384, 576, 768),
        layers_per_block=3,
        down_block_types=("DownBlock2D", *["AttnDownBlock2D"] * levels),
        up_block_types=(*["AttnUpBlock2D"] * levels, "UpBlock2D"),
        attention_head_dim=64,
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
        num_class_embeds=1000,
        norm_eps=1e-5,
    ).eval()


BUILDERS = {"ADMUNet2DModel": build_adm, "UNet2DModel": build_stock}


@torch.inference_mode()
def evaluate(unet: torch.nn.Module, sample: torch.Tensor) -> torch.Tensor:
    """Evaluates a UNet for noised images of one class."""
    labels = torch.full((len(sample),), LABEL, device=sample.device)
    return unet(sample, torch.tensor(TIMESTEP, device=sample.device), class_labels=labels).sample


def peak_memory(name: str, batch_size: int) -> float:
    """Starts a process that loads a UNet and evaluates it. Returns its peak memory in GB."""
    return float(last_line_of(__spec__.name, ["--memory_of", name, "--batch_size", str(batch_size)]))


def own_peak_memory(name: str, batch_size: int, device: torch.device) -> float:
    """Loads a UNet and evaluates it. Returns the peak memory of this process in GB."""
    evaluate(BUILDERS[name]().to(device), torch.randn(batch_size, 3, 64, 64, device=device))
    return peak_memory_bytes() / 1e9


def times_of_parts(unet: torch.nn.Module, sample: torch.Tensor) -> dict[str, float]:
    """Returns the time of each kind of operations in one evaluation, in seconds."""
    cuda = sample.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        evaluate(unet, sample)
    parts = dict.fromkeys((*PARTS, "all else"), 0.0)
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel. Its time is part of its operation's time
        part = next((part for part, words in PARTS.items() if any(word in event.key for word in words)), "all else")
        parts[part] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
    return parts


def compare(calls: dict[str, Callable], rounds: int, unit: int = 1) -> list[float]:
    """
    Times calls that take turns, and prints their times.

    Args:
        calls: Calls by their names.
        rounds: Number of rounds, after one for warm-up.
        unit: Number of units of work in one call. Times are per unit.
    """
    median_seconds(list(calls.values()), 1)
    times = [time / unit for time in median_seconds(list(calls.values()), rounds)]
    for name, time in zip(calls, times):
        print(f"{name:<34}{time:>8.3f} s")
    return times


def compare_unets(unets: dict[str, torch.nn.Module], sample: torch.Tensor, rounds: int) -> float:
    """Compares two UNets. Returns the time of the first one in seconds."""
    ours, stock = compare(
        {
            f"{name} ({unet.num_parameters() / 1e6:.1f} million)": lambda unet=unet: evaluate(unet, sample)
            for name, unet in unets.items()
        },
        rounds,
    )
    print(f"  ADMUNet2DModel is {stock / ours:.2f} times as fast as UNet2DModel")
    memory = [peak_memory(name, len(sample)) for name in unets]
    print(f"  peak memory: ADMUNet2DModel {memory[0]:.2f} GB, UNet2DModel {memory[1]:.2f} GB")
    return ours


def compare_formats(unet: ADMUNet2DModel, sample: torch.Tensor, rounds: int, packed: bool) -> None:
    """
    Compares the UNet in float32 and bfloat16.

    Args:
        unet: UNet in float32.
        sample: Noised images.
        rounds: Number of rounds.
        packed: Whether to also time the UNet compiled with packed weights.
    """
    labels = torch.full((len(sample),), LABEL, device=sample.device)
    timestep = torch.tensor(TIMESTEP, device=sample.device)
    calls: dict[str, Callable] = {}
    for dtype in (torch.float32, torch.bfloat16):
        cast, name = copy.deepcopy(unet).to(dtype), str(dtype).removeprefix("torch.")
        networks = {name: cast}
        if packed:
            networks[f"{name}, packed"] = torch.compile(cast, options={"freezing": True})
        for name, network in networks.items():
            calls[name] = torch.no_grad()(
                lambda network=network, x_t=sample.to(dtype): network(x_t, timestep, class_labels=labels)
            )
    times = dict(zip(calls, compare(calls, rounds)))
    for name, time in times.items():
        if name != "float32":
            print(f"  {name} is {times['float32'] / time:.2f} times as fast as float32")


def compare_guidance(unet: ADMUNet2DModel, sample: torch.Tensor, rounds: int, steps: int) -> None:
    """Compares the classifier's gradient with its forward pass, and a guided step with an unguided step."""
    labels = torch.full((len(sample),), LABEL, device=sample.device)
    timestep = torch.full((len(sample),), TIMESTEP, device=sample.device)
    classifier = NoisyClassifier().eval().to(sample.device)
    forward, gradient = compare(
        {
            "classifier, forward": torch.inference_mode()(lambda: classifier(sample, timestep)),
            "classifier, gradient": lambda: classifier_gradient(classifier, sample, timestep, labels),
        },
        rounds,
    )
    print(f"  the gradient takes {gradient / forward:.2f} times as long as the forward pass")

    pipeline = ClassifierGuidedPipeline(unet, DDIMScheduler(), classifier)
    pipeline.set_progress_bar_config(disable=True)
    call = {"class_labels": labels, "num_inference_steps": steps, "output_type": "latent"}
    unguided, guided = compare(
        {
            name: lambda scale=scale: pipeline(guidance_scale=scale, **call)
            for name, scale in (("step, unguided", 0.0), ("step, guided", 1.0))
        },
        rounds,
        unit=steps,
    )
    print(f"  a guided step takes {guided / unguided:.2f} times as long as an unguided step")


def print_parts(unet: ADMUNet2DModel, sample: torch.Tensor, rounds: int, total: float) -> None:
    """
    Prints the time of each kind of operations of a UNet, and the time that its multiplications would take at the speed of a large
    matrix product.

    Args:
        unet: UNet to evaluate.
        sample: Noised images.
        rounds: Number of rounds.
        total: Time of one evaluation in seconds.
    """
    operations = len(sample) * forward_cost(unet)[0]
    side = 2048
    factors = torch.randn(2, side, side, device=sample.device)
    (product,) = median_seconds([lambda: factors[0] @ factors[1]], 2 * rounds)
    speed = 2 * side**3 / product
    ideal = operations / speed
    print(
        f"One evaluation has {operations / 1e9:.0f} GFLOPs, and a matrix product of size {side} runs at {speed / 1e9:.0f}"
        f" GFLOPs per second.\nAt this speed, the UNet would take {ideal:.3f} s, {ideal / total:.0%} of its time. Its operations"
        " take:"
    )
    for part, time in times_of_parts(unet, sample).items():
        print(f"  {part:<32}{time:>8.3f} s{time / total:>8.0%}")


def main() -> None:
    """Times all parts of a step, and prints the times."""
    parser = CommandParser(prog="python -m diffusers_adm.benchmarks.step", description=__doc__)
    add_options(parser, StepOptions, title="measurement")
    add_examples(
        parser,
        parser.prog,
        f"{parser.prog} --batch_size 1 --packed",
    )
    parser.add_argument(
        "--memory_of", choices=BUILDERS, help=argparse.SUPPRESS
    )  # for the process that measures memory
    parsed = parser.parse_args()
    args = build_options(StepOptions, parsed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if parsed.memory_of is not None:
        print(own_peak_memory(parsed.memory_of, args.batch_size, device))
        return

    torch.manual_seed(0)
    sample = torch.randn(args.batch_size, 3, 64, 64, device=device)
    unets = {name: build().to(device) for name, build in BUILDERS.items()}
    print(f"{args.batch_size} images of 64x64, {torch.get_num_threads()} threads, median of {args.rounds} rounds")
    total = compare_unets(unets, sample, args.rounds)
    unet = unets["ADMUNet2DModel"]
    compare_formats(unet, sample, args.rounds, args.packed)
    compare_guidance(unet, sample, args.rounds, args.steps)
    print_parts(unet, sample, args.rounds, total)


if __name__ == "__main__":
    sys.exit(run_command("step", main))
