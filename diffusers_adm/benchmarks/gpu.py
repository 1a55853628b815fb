"""Speed and memory of the UNet on a GPU: `python -m diffusers_adm.benchmarks.gpu`.

The UNet of this package, with and without compilation, is compared with a plain UNet of the same weights, which is written like that of
the original code. Each UNet is measured in a process of its own, in each data type: one evaluation, one training step with the
optimizer, and the peak memory of both. In half precision, training has float32 weights and autocast. Then the pipeline draws images,
guided by a classifier. The architecture is that of the released 64x64 models unless options change it. Without a GPU, the CPU is used,
which is useful only for small architectures. Memory then includes that of the process itself.
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import DDIMScheduler

from diffusers_adm import ADMUNet2DModel, ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.benchmarks.plain_unet import PlainUNet
from diffusers_adm.benchmarks.timing import last_line_of, median_seconds, peak_memory_bytes
from diffusers_adm.command_line import CommandParser, run_command
from diffusers_adm.evaluation.report import markdown_table
from diffusers_adm.options import Check, add_examples, add_options, at_least, build_options, option, option_values


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
NETWORKS = ("plain", "package", "package, compiled")
SAMPLING_STEPS = 10
FITS_HEADS = Check("a multiple of 64, the channels of a head", lambda channels: channels > 0 and channels % 64 == 0)


@dataclass(frozen=True)
class GpuOptions:
    """Architecture, and size and number of the measurements."""

    batch_size: int = option(16, help="Number of images per batch.", check=at_least(1))
    rounds: int = option(10, help="Number of rounds, after three for warm-up. The median counts.", check=at_least(1))
    sample_size: int = option(64, help="Height and width of the images in pixels.", check=at_least(8))
    model_channels: int = option(192, help="Base width of the UNet.", check=FITS_HEADS)
    dtypes: tuple[str, ...] = option(
        tuple(DTYPES),
        metavar="NAME,...",
        help=f"Data types to measure: some of {', '.join(DTYPES)}.",
        check=Check(f"some of {', '.join(DTYPES)}", lambda names: names and set(names) <= set(DTYPES)),
    )
    compile: bool = option(True, help="Also measure the compiled UNet. Compilation takes minutes on a CPU.")
    classifier_channels: int = option(128, help="Base width of the classifier.", check=FITS_HEADS)


def architecture(options: GpuOptions, model_channels: int) -> dict:
    """Returns the arguments that UNet and classifier share. The three lowest of the four resolutions have attention."""
    attended = tuple(options.sample_size // factor for factor in (2, 4, 8))
    size = {"sample_size": options.sample_size, "model_channels": model_channels}
    return {**size, "channel_mult": (1, 2, 3, 4), "attention_resolutions": attended}


def build_unet(options: GpuOptions) -> ADMUNet2DModel:
    """Builds the UNet with random weights, without dropout."""
    torch.manual_seed(0)
    return ADMUNet2DModel(**architecture(options, options.model_channels), dropout=0.0)


def build_network(name: str, options: GpuOptions, device: torch.device) -> torch.nn.Module:
    """Builds a network of `NETWORKS`."""
    unet = build_unet(options)
    if name == "plain":
        return PlainUNet(unet).to(device)
    unet.to(device)
    if name == "package, compiled":
        unet.compile()
    return unet


def measure(name: str, dtype: str, options: GpuOptions, device: torch.device) -> dict[str, float]:
    """
    Times a network in this process.

    Returns:
        Milliseconds of an evaluation and of a training step, and their peak memory in GB.
    """
    sample = torch.randn(options.batch_size, 3, options.sample_size, options.sample_size, device=device)
    labels = torch.arange(options.batch_size, device=device) % 1000
    timestep = torch.tensor(500, device=device)
    data_type = DTYPES[dtype]

    def predict(network: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        output = network(x, timestep, class_labels=labels)
        return output if torch.is_tensor(output) else output.sample

    network = build_network(name, options, device).eval().to(data_type)
    evaluate = torch.inference_mode()(lambda: predict(network, sample.to(data_type)))
    milliseconds, gigabytes = time_of(evaluate, options.rounds)
    results = {"evaluation": milliseconds, "evaluation_memory": gigabytes}
    network.train().float()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)

    def train() -> None:
        with torch.autocast(device.type, data_type, enabled=data_type != torch.float32):
            loss = predict(network, sample).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    milliseconds, gigabytes = time_of(train, options.rounds)
    return results | {"training": milliseconds, "training_memory": gigabytes}


def time_of(call: Callable, rounds: int) -> tuple[float, float]:
    """Returns the median time of a call in milliseconds, after a warm-up, and the peak memory in GB."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    median_seconds([call], 3)
    (seconds,) = median_seconds([call], rounds)
    return 1000 * seconds, peak_memory_bytes() / 1e9


def images_per_second(dtype: str, guided: bool, options: GpuOptions, device: torch.device) -> float:
    """Returns how many images per second the pipeline draws in `SAMPLING_STEPS` steps of DDIM."""
    classifier = NoisyClassifier(**architecture(options, options.classifier_channels)).eval()
    pipeline = ClassifierGuidedPipeline(build_unet(options).eval(), DDIMScheduler(), classifier)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to(device, DTYPES[dtype])
    labels = torch.arange(options.batch_size, device=device) % 1000
    settings = {"guidance_scale": float(guided), "num_inference_steps": SAMPLING_STEPS, "output_type": "latent"}
    milliseconds, _ = time_of(lambda: pipeline(labels, **settings), options.rounds)
    return 1000 * options.batch_size / milliseconds


def print_networks(options: GpuOptions) -> None:
    """Measures all networks in the chosen data types, and prints their table."""
    sizes = {name: value for name, value in option_values(options).items() if name not in ("compile", "dtypes")}
    words = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    networks = [name for name in NETWORKS if options.compile or "compiled" not in name]
    rows = []
    for dtype in options.dtypes:
        measured = {
            name: json.loads(last_line_of(__spec__.name, ["--measure", name, dtype, *words])) for name in networks
        }
        plain = measured["plain"]
        for name, result in measured.items():
            rows.append((name, dtype))
            for kind in ("evaluation", "training"):
                milliseconds, gigabytes = result[kind], result[f"{kind}_memory"]
                rows[-1] += (f"{milliseconds:.1f} ms", f"{plain[kind] / milliseconds:.2f}", f"{gigabytes:.2f} GB")
    header = ("UNet", "data type", "evaluation", "speed", "memory", "training step", "speed", "memory")
    print(markdown_table(header, rows))
    print("Speed is relative to the plain UNet with the same data type.")


def print_sampling(options: GpuOptions, device: torch.device) -> None:
    """Measures sampling in the chosen data types, and prints a table."""
    rows = [
        (dtype, *(f"{images_per_second(dtype, guided, options, device):.1f}" for guided in (False, True)))
        for dtype in options.dtypes
    ]
    print(f"Images per second with {SAMPLING_STEPS} steps of DDIM:")
    print(markdown_table(("data type", "unguided", "guided by a classifier"), rows))


def main() -> None:
    """Measures the UNets and the pipeline, and prints tables."""
    parser = CommandParser(prog="python -m diffusers_adm.benchmarks.gpu", description=__doc__)
    add_options(parser, GpuOptions, title="measurement")
    add_examples(parser, parser.prog, f"{parser.prog} --batch_size 64 --sample_size 32 --model_channels 128")
    # For the processes that measure one network.
    parser.add_argument("--measure", nargs=2, metavar=("NETWORK", "DTYPE"), help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    options = build_options(GpuOptions, parsed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if parsed.measure is not None:
        print(json.dumps(measure(*parsed.measure, options, device)))
        return
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, batches of {options.batch_size} images of {options.sample_size}x{options.sample_size},"
        f" median of {options.rounds} rounds"
    )
    print_networks(options)
    print_sampling(options, device)


if __name__ == "__main__":
    sys.exit(run_command("gpu", main))
