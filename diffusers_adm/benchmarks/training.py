"""Images a second and peak memory of training, against a plain loop: `python -m diffusers_adm.benchmarks.training`.

Each measurement is a process of its own, and the two loops take turns. Both read the same images, in the same precision.
The suite's is `train_unet.py` itself. The plain one has an optimizer that goes from tensor to tensor, a moving average that
does too, and attention of separate matrix products.
"""

import argparse
import json
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from torch.utils.data import DataLoader

from diffusers_adm.diffusion import NoiseSchedule, add_noise
from diffusers_adm.losses import drop_labels, hybrid_loss
from diffusers_adm.training import train_unet
from diffusers_adm.training.arguments import build_noise_scheduler, load_images_of
from diffusers_adm.training.denoising import build_unet
from diffusers_adm.training.metrics import read_metrics


CONFIGURATIONS = {
    "default model, 32x32": "--resolution 32 --in_channels 1 --crop pad --model_channels 32 --channel_mult 1,1,2,2"
    " --layers_per_block 1 --attention_resolutions 8 --attention_head_dim 32 --label_dropout 0.2 --train_batch_size 64",
    "small-64 at width 32, 64x64": "--preset small-64 --model_channels 32 --total_batch_size 8 --train_batch_size 8",
}
LOOPS = ("plain", "suite")
NUM_CLASSES = 10


def main() -> None:
    """Measures all, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=6, help="Measured in a row, after as many that are not.")
    parser.add_argument("--rounds", type=int, default=3, help="Of both loops in turn; the median counts.")
    parser.add_argument("--mixed_precision", default="bf16")
    parser.add_argument("--loop", choices=LOOPS, help=argparse.SUPPRESS)  # of a process that measures
    parser.add_argument("--configuration", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.loop is not None:
        json.dump(measure(args), sys.stdout)
        return

    print(f"{args.steps} steps, median of {args.rounds} rounds, precision {args.mixed_precision}")
    print(f"{'':<30}{'loop':<8}{'images/s':>10}{'memory GB':>11}{'loading alone, images/s':>25}")
    for configuration in CONFIGURATIONS:
        results: dict[str, list[dict]] = {loop: [] for loop in LOOPS}
        with tempfile.TemporaryDirectory() as folder:
            save_images(Path(folder) / "images", 28 if "32x32" in configuration else 80)
            for _ in range(args.rounds):
                for loop in LOOPS:
                    words = [sys.executable, "-m", __spec__.name, *sys.argv[1:], "--loop", loop]
                    words += ["--configuration", configuration, "--folder", folder]
                    run = subprocess.run(words, capture_output=True, text=True)
                    if run.returncode != 0:
                        sys.exit(run.stderr)
                    results[loop].append(json.loads(run.stdout.splitlines()[-1]))
        median = {
            loop: {name: statistics.median(result[name] for result in rounds) for name in rounds[0]}
            for loop, rounds in results.items()
        }
        for loop in LOOPS:
            row = median[loop]
            print(
                f"{configuration:<30}{loop:<8}{row['images_per_second']:>10.1f}{row['memory_gb']:>11.2f}"
                f"{row['loaded_per_second']:>25.0f}"
            )
        ratio = median["suite"]["images_per_second"] / median["plain"]["images_per_second"]
        memory = median["suite"]["memory_gb"] / median["plain"]["memory_gb"]
        print(f"{'':<30}{'ratio':<8}{ratio:>10.2f}{memory:>11.2f}")


def save_images(folder: Path, size: int) -> None:
    """A parquet file of images of noise, coloured, in ten classes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    images = [PILImage.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)) for _ in range(2048)]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=NUM_CLASSES)})
    labels = [i % NUM_CLASSES for i in range(len(images))]
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(folder / "train.parquet")


def measure(args: argparse.Namespace) -> dict[str, float]:
    """Images a second and peak memory of one loop, and how many images the loader would give if nothing else were done."""
    output = args.folder / "output"
    words = f"--dataset_name {args.folder / 'images'} --cache_dir {args.folder / 'cache'} --output_dir {output} --ema_decay 0.9"
    words += (
        f" {CONFIGURATIONS[args.configuration]} --mixed_precision {args.mixed_precision} --num_validation_images 1"
    )
    words += f" --max_train_steps {2 * args.steps} --logging_steps {args.steps}"
    options = train_unet.parse_args(words.split())
    if args.loop == "suite":
        train_unet.main(options)
        result = {"images_per_second": read_metrics(output / "metrics.jsonl")[-1]["images_per_second"]}
        shutil.rmtree(output)
    else:
        result = {"images_per_second": plain_loop(options, args.steps)}
    if torch.cuda.is_available():
        result["memory_gb"] = torch.cuda.max_memory_allocated() / 2**30
    else:
        result["memory_gb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    images, _ = load_images_of(options)
    start = time.perf_counter()
    for _ in DataLoader(images, batch_size=options.train_batch_size):
        pass
    result["loaded_per_second"] = len(images) / (time.perf_counter() - start)
    return result


def plain_loop(options: argparse.Namespace, steps: int) -> float:
    """Images a second of a loop as one would write it down first."""
    accelerator = Accelerator(mixed_precision=options.mixed_precision)
    images, _ = load_images_of(options)
    unet = build_unet(options, NUM_CLASSES)
    unet.set_attention_backend("_native_math")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=options.learning_rate, foreach=False, fused=False)
    loader = DataLoader(images, batch_size=options.train_batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = accelerator.prepare(unet, optimizer, loader)
    average = [parameter.detach().clone() for parameter in unet.parameters()]
    schedule = NoiseSchedule.from_config(build_noise_scheduler(options).config).to(accelerator.device)
    step = 0
    while True:
        for batch in loader:
            if step == steps:
                start = time.perf_counter()
            x_0 = batch["image"]
            timestep = torch.randint(len(schedule), (len(x_0),), device=x_0.device)
            noise = torch.randn_like(x_0)
            x_t = add_noise(schedule, x_0, timestep, noise)
            labels = drop_labels(batch["label"], unet.null_class, options.label_dropout)
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
                return steps * options.train_batch_size / (time.perf_counter() - start)


if __name__ == "__main__":
    main()
