"""Time and memory of one step of sampling, at the shape of the released 64x64 models with random weights:
`python -m diffusers_adm.benchmarks.step`.

The UNet takes turns with diffusers' `UNet2DModel` of the same shape, a guided step with an unguided one, and the classifier's
gradient with its forward pass. Peak memory is that of a process that loads one of the two UNets and evaluates it. What a UNet's
operations take is shown beside the time that its multiplications would take at the speed of one large matrix product.
"""

import argparse
import resource
import subprocess
import sys

import torch
from diffusers import DDIMScheduler, UNet2DModel
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from diffusers_adm import ADMUNet2DModel, ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.benchmarks.timing import seconds
from diffusers_adm.guidance import classifier_gradient
from diffusers_adm.training.plan import measure


LABEL = 207
TIMESTEP = 500
# Parts of a UNet's time, by what their operations are called.
PARTS = {
    "convolutions": ("convolution",),
    "matrix products": ("addmm", "bmm", "mm"),
    "attention": ("attention",),
    "normalisation": ("group_norm", "batch_norm"),
}


def build_adm() -> ADMUNet2DModel:
    """The released class-conditional UNet's shape, which is the default."""
    return ADMUNet2DModel().eval()


def build_stock() -> UNet2DModel:
    """The same of diffusers' own blocks."""
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
    """A UNet at noised images of one class."""
    labels = torch.full((len(sample),), LABEL, device=sample.device)
    return unet(sample, torch.tensor(TIMESTEP, device=sample.device), class_labels=labels).sample


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """In GB, of a process of its own."""
    words = [sys.executable, "-m", __spec__.name, "--memory_of", name, "--batch_size", str(args.batch_size)]
    return float(subprocess.run(words, check=True, capture_output=True, text=True).stdout.split()[-1])


def own_peak_memory(name: str, batch_size: int, device: torch.device) -> float:
    """In GB, of this process: loads a UNet and evaluates it."""
    evaluate(BUILDERS[name]().to(device), torch.randn(batch_size, 3, 64, 64, device=device))
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def times_of_parts(unet: torch.nn.Module, sample: torch.Tensor) -> dict[str, float]:
    """Seconds that the kinds of operations take in one evaluation."""
    cuda = sample.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * cuda]) as profiler:
        evaluate(unet, sample)
    parts = dict.fromkeys((*PARTS, "all else"), 0.0)
    for event in profiler.key_averages():
        if event.device_type != DeviceType.CPU:
            continue  # a kernel, whose time its operation has too
        part = next((part for part, words in PARTS.items() if any(word in event.key for word in words)), "all else")
        parts[part] += (event.self_device_time_total if cuda else event.self_cpu_time_total) / 1e6
    return parts


def main() -> None:
    """Measures all, and prints it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch_size", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5, help="The median counts; one more comes before, uncounted.")
    parser.add_argument("--steps", type=int, default=2, help="Of a run of the pipeline.")
    parser.add_argument("--memory_of", choices=BUILDERS, help=argparse.SUPPRESS)  # of a process that measures
    args = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.memory_of is not None:
        print(own_peak_memory(args.memory_of, args.batch_size, device))
        return

    torch.manual_seed(0)
    sample = torch.randn(args.batch_size, 3, 64, 64, device=device)
    labels = torch.full((args.batch_size,), LABEL, device=device)
    timestep = torch.full((args.batch_size,), TIMESTEP, device=device)
    unets = [build().to(device) for build in BUILDERS.values()]
    classifier = NoisyClassifier().eval().to(device)
    print(f"{args.batch_size} images of 64x64, {torch.get_num_threads()} threads, median of {args.rounds} rounds")

    def compare(names: list[str], calls: list, unit: int = 1) -> list[float]:
        seconds(calls, 1)
        taken = [time / unit for time in seconds(calls, args.rounds)]
        for name, time in zip(names, taken):
            print(f"{name:<34}{time:>8.3f} s")
        return taken

    ours, stock = compare(
        [f"{name} ({unet.num_parameters() / 1e6:.1f} million)" for name, unet in zip(BUILDERS, unets)],
        [lambda unet=unet: evaluate(unet, sample) for unet in unets],
    )
    print(f"  {stock / ours:.2f} times UNet2DModel's speed")
    memory = [peak_memory(name, args) for name in BUILDERS]
    print(f"  peak memory {memory[0]:.2f} GB, UNet2DModel's {memory[1]:.2f} GB")

    forward, gradient = compare(
        ["classifier, forward", "classifier, gradient"],
        [
            torch.inference_mode()(lambda: classifier(sample, timestep)),
            lambda: classifier_gradient(classifier, sample, timestep, labels),
        ],
    )
    print(f"  the gradient takes {gradient / forward:.2f} forward passes")

    pipeline = ClassifierGuidedPipeline(unets[0], DDIMScheduler(), classifier)
    pipeline.set_progress_bar_config(disable=True)
    call = {"class_labels": labels, "num_inference_steps": args.steps, "output_type": "latent"}
    unguided, guided = compare(
        ["step, unguided", "step, guided"],
        [lambda scale=scale: pipeline(guidance_scale=scale, **call) for scale in (0.0, 1.0)],
        args.steps,
    )
    print(f"  a guided step takes {guided / unguided:.2f} unguided ones")

    operations = args.batch_size * measure(unets[0])[0]
    side = 2048
    factors = torch.randn(2, side, side, device=device)
    (product,) = seconds([lambda: factors[0] @ factors[1]], 2 * args.rounds)
    speed = 2 * side**3 / product
    ideal = operations / speed
    print(
        f"{operations / 1e9:.0f} GFLOPs an evaluation; a matrix product of {side} runs at {speed / 1e9:.0f}"
        f" GFLOPs a second.\nAt that speed the UNet would take {ideal:.3f} s, {ideal / ours:.0%} of what it takes. Its"
        " operations take"
    )
    for part, time in times_of_parts(unets[0], sample).items():
        print(f"  {part:<32}{time:>8.3f} s{time / ours:>8.0%}")


if __name__ == "__main__":
    main()
