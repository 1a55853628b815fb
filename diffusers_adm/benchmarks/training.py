"""Images per second and peak memory of training, compared with a plain loop: `python -m diffusers_adm.benchmarks.training`.

Each measurement runs in a new process, and the two loops take turns. Both read the same images and use the same precision. The loop
"suite" is the script `train_unet.py`. In the loop "plain", the optimizer and the moving average update one tensor after the other, and
attention consists of separate matrix products.
"""

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from diffusers_adm.benchmarks.timing import last_line_of, peak_memory_bytes
from diffusers_adm.command_line import CommandParser, run_command
from diffusers_adm.diffusion import NoiseSchedule, add_noise
from diffusers_adm.losses import drop_labels, hybrid_loss
from diffusers_adm.options import add_examples, add_options, at_least, build_options, option
from diffusers_adm.training import train_unet
from diffusers_adm.training.metrics import read_metrics
from diffusers_adm.training.objective import build_noise_scheduler
from diffusers_adm.training.options import MIXED_PRECISIONS, UNetTrainingOptions
from diffusers_adm.training.setup import build_unet, load_training_images


CONFIGURATIONS = {
    "default model, 32x32": "--resolution 32 --in_channels 1 --crop pad --model_channels 32 --channel_mult 1,1,2,2"
    " --layers_per_block 1 --attention_resolutions 8 --attention_head_dim 32 --label_dropout 0.2 --train_batch_size 64",
    "small-64 at width 32, 64x64": "--preset small-64 --model_channels 32 --total_batch_size 8 --train_batch_size 8",
}
LOOPS = ("plain", "suite")
NUM_CLASSES = 10


@dataclass(frozen=True)
class LoopOptions:
    """Length, number and precision of the measurements."""

    steps: int = option(6, help="Number of timed steps. As many steps for warm-up come before.", check=at_least(1))
    rounds: int = option(
        3, help="Number of rounds, in which both loops take turns. The median counts.", check=at_least(1)
    )
    mixed_precision: str = option("bf16", choices=MIXED_PRECISIONS, help="Precision of the forward pass.")


def main() -> None:
    """Compares the two loops in each configuration, and prints a table."""
    parser = CommandParser(prog="python -m diffusers_adm.benchmarks.training", description=__doc__)
    add_options(parser, LoopOptions, title="measurement")
    add_examples(
        parser,
        parser.prog,
        f"{parser.prog} --steps 12 --mixed_precision no",
    )
    parser.add_argument(
        "--loop", choices=LOOPS, help=argparse.SUPPRESS
    )  # for the process that measures, as the next two
    parser.add_argument("--configuration", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parsed = parser.parse_args()
    args = build_options(LoopOptions, parsed)
    if parsed.loop is not None:
        result = run_loop(parsed.loop, parsed.configuration, parsed.folder, args.steps, args.mixed_precision)
        json.dump(result, sys.stdout)
        return

    print(f"{args.steps} steps, median of {args.rounds} rounds, precision {args.mixed_precision}")
    print(f"{'':<30}{'loop':<8}{'images/s':>10}{'memory GB':>11}{'loading alone, images/s':>25}")
    for configuration in CONFIGURATIONS:
        plain, suite = compare_loops(configuration, args.rounds)
        for loop, row in (("plain", plain), ("suite", suite)):
            print(
                f"{configuration:<30}{loop:<8}{row['images_per_second']:>10.1f}{row['memory_gb']:>11.2f}"
                f"{row['loaded_per_second']:>25.0f}"
            )
        speed = suite["images_per_second"] / plain["images_per_second"]
        print(f"{'':<30}{'ratio':<8}{speed:>10.2f}{suite['memory_gb'] / plain['memory_gb']:>11.2f}")


def compare_loops(configuration: str, rounds: int) -> list[dict[str, float]]:
    """Returns the median figures of each loop. Each run is a new process with the options of this process."""
    results: dict[str, list[dict]] = {loop: [] for loop in LOOPS}
    with tempfile.TemporaryDirectory() as folder:
        save_images(Path(folder) / "images", 28 if "32x32" in configuration else 80)
        for _ in range(rounds):
            for loop, own_results in results.items():
                words = ["--loop", loop, "--configuration", configuration, "--folder", folder]
                own_results.append(json.loads(last_line_of(__spec__.name, [*sys.argv[1:], *words])))
    return [
        {name: statistics.median(result[name] for result in own_results) for name in own_results[0]}
        for own_results in results.values()
    ]


def save_images(folder: Path, size: int) -> None:
    """Writes a parquet file of random colour images in ten classes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(2048)]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=NUM_CLASSES)})
    labels = [i % NUM_CLASSES for i in range(len(images))]
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(folder / "train.parquet")


def run_loop(loop: str, configuration: str, folder: Path, steps: int, mixed_precision: str) -> dict[str, float]:
    """
    Runs one loop. Returns its images per second, its peak memory, and the images per second of its loader alone.

    Args:
        loop: Name of the loop, one of `LOOPS`.
        configuration: Name in `CONFIGURATIONS`.
        folder: Folder of the images.
        steps: Number of timed steps. As many steps for warm-up come before.
        mixed_precision: Precision of the forward pass: `"no"`, `"fp16"` or `"bf16"`.
    """
    output = folder / "output"
    words = f"--dataset_name {folder / 'images'} --cache_dir {folder / 'cache'} --output_dir {output} --ema_decay 0.9"
    words += f" {CONFIGURATIONS[configuration]} --mixed_precision {mixed_precision} --num_validation_images 1"
    words += f" --max_train_steps {2 * steps} --logging_steps {steps} --validation_steps {2 * steps}"
    options = train_unet.parse_args(words.split())
    if loop == "suite":
        train_unet.main(options)
        result = {"images_per_second": read_metrics(output / "metrics.jsonl")[-1]["images_per_second"]}
        shutil.rmtree(output)
    else:
        result = {"images_per_second": plain_loop(options, steps)}
    result["memory_gb"] = peak_memory_bytes() / 2**30
    images, _ = load_training_images(options)
    start = time.perf_counter()
    for _ in DataLoader(images, batch_size=options.optimisation.train_batch_size):
        pass
    result["loaded_per_second"] = len(images) / (time.perf_counter() - start)
    return result


def plain_loop(options: UNetTrainingOptions, steps: int) -> float:
    """Returns the images per second of the plain loop."""
    accelerator = Accelerator(mixed_precision=options.optimisation.mixed_precision)
    images, _ = load_training_images(options)
    unet = build_unet(options, NUM_CLASSES)
    unet.set_attention_backend("_native_math")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.optimisation.learning_rate, foreach=False, fused=False)
    loader = DataLoader(images, batch_size=options.optimisation.train_batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    average = [parameter.detach().clone() for parameter in unet.parameters()]
    schedule = NoiseSchedule.from_config(build_noise_scheduler(options.diffusion).config).to(accelerator.device)
    step = 0
    while True:
        for batch in loader:
            if step == steps:
                start = time.perf_counter()
            x_0 = batch["image"]
            timestep = torch.randint(len(schedule), (len(x_0),), device=x_0.device)
            noise = torch.randn_like(x_0)
            x_t = add_noise(schedule, x_0, timestep, noise)
            labels = drop_labels(batch["label"], unet.null_class, options.classes.label_dropout)
            model_output = model(x_t, timestep, labels).sample
            loss = hybrid_loss(model_output, schedule, x_0, x_t, timestep, noise).total.mean()
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                for shadow, parameter in zip(average, unet.parameters()):
                    shadow.mul_(0.9).add_(parameter, alpha=0.1)
            loss.item()
            step += 1
            if step == 2 * steps:
                return steps * options.optimisation.train_batch_size / (time.perf_counter() - start)


if __name__ == "__main__":
    sys.exit(run_command("training", main))
