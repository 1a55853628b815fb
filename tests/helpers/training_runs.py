"""Options of small training runs, and content of their checkpoints."""

from pathlib import Path

import numpy as np
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from safetensors.torch import load_file

from diffusers_adm.training import train_classifier, train_consistency, train_unet, train_upsampler


ARCHITECTURE = (
    "--resolution 16 --in_channels 1 --crop pad --no-random_flip --model_channels 8 --channel_mult 1,2"
    " --layers_per_block 1 --attention_resolutions 8 --attention_head_dim 8 --norm_num_groups 4"
    " --noise_schedule cosine --train_batch_size 4 --logging_steps 1 --checkpointing_steps 3 --validation_steps 100"
    " --learning_rate 1e-3"
).split()

SMALL_CONSISTENCY_RUN = (
    "--crop pad --no-random_flip --in_channels 1 --resolution 16 --train_batch_size 4 --logging_steps 1 --checkpointing_steps 3"
    " --validation_steps 3 --learning_rate 1e-3 --ema_decay 0.5 --num_validation_images 4"
).split()
TINY_UNET = {
    "in_channels": 1,
    "out_channels": 2,
    "num_class_embeds": 2,
    "sample_size": 16,
    "attention_resolutions": (8,),
}


def save_bars(folder: Path, count: int = 14) -> None:
    """Writes a parquet file of images of 12x12 pixels: white on the left (class "left") or on the right."""
    images, labels = [], [i % 2 for i in range(count)]
    for label in labels:
        pixels = np.zeros((12, 12), dtype=np.uint8)
        pixels[:, 6 * label : 6 * label + 6] = 255
        images.append(PILImage.fromarray(pixels))
    features = Features({"image": Image(), "label": ClassLabel(names=["left", "right"])})
    Dataset.from_dict({"image": images, "label": labels}, features=features).to_parquet(folder / "train.parquet")


def unet_args(dataset, output_dir, steps, *more):
    options = f"--dataset_name {dataset} --output_dir {output_dir} --max_train_steps {steps} --ema_decay 0.5"
    return train_unet.parse_args(
        [*options.split(), *ARCHITECTURE, *"--label_dropout 0.3 --num_validation_images 4".split(), *more]
    )


def upsampler_args(dataset, output_dir, steps, *more):
    options = f"--dataset_name {dataset} --output_dir {output_dir} --max_train_steps {steps} --ema_decay 0.5"
    return train_upsampler.parse_args(
        [
            *options.split(),
            *ARCHITECTURE,
            *"--low_resolution 4 --low_res_noise 0.2 --num_validation_images 3".split(),
            *more,
        ]
    )


def classifier_args(dataset, output_dir, steps, *more):
    options = f"--dataset_name {dataset} --output_dir {output_dir} --max_train_steps {steps} --validation_split train"
    return train_classifier.parse_args([*options.split(), *ARCHITECTURE, *more])


def consistency_args(dataset, start, output_dir, steps, *more):
    options = f"--dataset_name {dataset} --output_dir {output_dir} --max_train_steps {steps}"
    options += f" --pretrained_model_name_or_path {start}"
    return train_consistency.parse_args([*options.split(), *SMALL_CONSISTENCY_RUN, *more])


def checkpoint_tensors(folder):
    return {path.name: load_file(path) for path in sorted(folder.glob("*.safetensors"))}


def without_times(entries: list[dict]) -> list[dict]:
    """Returns the entries of a `metrics.jsonl` without values that differ between equal runs."""
    return [{k: v for k, v in entry.items() if k not in ("time", "images_per_second")} for entry in entries]
