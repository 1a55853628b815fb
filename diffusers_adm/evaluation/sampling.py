"""Bulk sampling: on any number of processes, independent of their number, and continued after interruptions."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline, default_model
from diffusers_adm.data.npz_images import NpzImages
from diffusers_adm.evaluation.labels import Labels
from diffusers_adm.evaluation.sample_files import as_8_bit, sample_path, write_samples
from diffusers_adm.evaluation.schedulers import SamplingPipeline
from diffusers_adm.evaluation.shards import Shards, image_generator, one_thread, weights_digest
from diffusers_adm.launch import join_processes
from diffusers_adm.pipelines.options import SamplingOptions, per_image


def load_pipeline(
    model: str | Path | None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    upsampler: bool = False,
) -> SamplingPipeline:
    """
    Loads a pipeline without a progress bar.

    Args:
        model: Folder or Hub id of the pipeline, or `None` for the default model.
        revision: Branch, tag or commit on the Hub.
        variant: Variant of the weight files, such as `"fp16"`.
        dtype: Data type of the weights.
        device: Device of the networks.
        upsampler: Whether it is an upsampler.

    Raises:
        ValueError: If the pipeline is of another class.
    """
    cls = ADMUpsamplePipeline if upsampler else ClassifierGuidedPipeline
    pipeline = cls.from_pretrained(
        model or default_model(), revision=revision, variant=variant, dtype=getattr(torch, dtype)
    )
    pipeline.to(device).set_progress_bar_config(disable=True)
    return pipeline


def model_settings(pipeline: SamplingPipeline, name: str | None) -> dict:
    """
    Returns the settings of a run that come from its pipeline.

    Args:
        pipeline: Pipeline of the run.
        name: Folder or Hub id of the pipeline, for the record.
    """
    config = pipeline.scheduler.config
    return {
        "model": Path(name or default_model()).name,
        "weights": weights_digest(pipeline.components),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": {key: value for key, value in config.items() if not key.startswith("_")},
    }


def given_options(call: dict | None) -> dict:
    """
    Returns the arguments of a call without those that are `None`.

    Raises:
        ValueError: If an argument does not hold for a whole run.
    """
    call = {name: value for name, value in (call or {}).items() if value is not None}
    unknown = sorted(call.keys() - SamplingOptions.recorded().keys())
    if unknown:
        raise ValueError(f"The pipelines take no {', '.join(unknown)} for a whole run.")
    return call


def option_record(options: SamplingOptions) -> dict:
    """Returns the options of a run for its settings."""
    values = {name: getattr(options, name) for name in SamplingOptions.recorded()}
    return {name: value for name, value in values.items() if value is not None}


def draw_samples(
    pipeline: SamplingPipeline,
    folder: Path,
    num_images: int,
    batch_size: int = 50,
    seed: int = 0,
    labels: str | None = None,
    call: dict | None = None,
    low_res: str | Path | None = None,
    model_name: str | None = None,
    format: str = "npz",
) -> Path:
    """
    Draws images on all processes of a launch, except for those that are there already, and writes them as one set. Image i
    depends on the seed, i and its label alone. To that end, each process on a CPU takes one thread.

    Args:
        pipeline: Pipeline on this process's device.
        folder: Folder of the run, on a disk that all processes see.
        num_images: Number of images.
        batch_size: Number of images per batch.
        seed: Seed of the run. The seed of each image is derived from it.
        labels: `"random"`, `"balanced"` (label i is i modulo the number of classes), or a file: `.npz` with `arr_1`, or a
            text of one number or name per line. The default is `"random"`. For an upsampler it is the labels of `low_res`, or
            no labels if there are none.
        call: Arguments of the pipeline's call that hold for the whole run.
        low_res: `.npz` file of the images that an upsampler enlarges, with their labels as `arr_1`.
        model_name: Folder or Hub id of the pipeline, for the record.
        format: `"npz"` or `"png"`.

    Returns:
        The file `samples_NxHxWxC.npz`, or the folder of that name with PNG files and `manifest.jsonl`.

    Raises:
        ValueError: If the run is impossible, or the folder belongs to a run of other settings.
    """
    state = join_processes()
    call = given_options(call)
    options = SamplingOptions(**call).resolved(pipeline)
    per_image(options.guidance_scale, batch_size, "guidance_scale")
    small = None if low_res is None else NpzImages(low_res, labelled=True)
    if small is not None and small.num_images < num_images:
        raise ValueError(f"{low_res} has {small.num_images} images, and {num_images} are wanted.")
    if labels is None and small is None:
        labels = "random"
    elif labels is None and small.labels is not None and options.num_classes(pipeline) is not None:
        labels = str(low_res)
    image_labels = Labels(labels, pipeline, options, seed, num_images)
    settings = {
        **model_settings(pipeline, model_name),
        "call": option_record(options),
        "seed": seed,
        "labels": image_labels.policy,
        "low_res": None if small is None else small.fingerprint,
    }
    shards = Shards(folder, settings, num_images, batch_size, state)
    config = pipeline.unet.config
    path = sample_path(folder, num_images, (config.sample_size, config.sample_size, config.in_channels), format)
    if path.exists():
        return path
    draw_batches(pipeline, shards, image_labels, call, small)
    state.wait_for_everyone()
    if state.is_main_process:
        write_samples(shards, path)
    state.wait_for_everyone()
    return path


def draw_batches(
    pipeline: SamplingPipeline, shards: Shards, labels: Labels, call: dict, low_res: NpzImages | None
) -> None:
    """
    Draws this process's share of the missing batches.

    Args:
        pipeline: Pipeline on this process's device.
        shards: Shards of the run.
        labels: Labels and seed of the run.
        call: Arguments of the pipeline's call.
        low_res: Images that an upsampler enlarges.
    """
    batches = shards.assigned()
    progress = tqdm(batches, desc="batches", disable=None if shards.state.is_main_process else True)
    small = [None] * len(batches) if low_res is None else low_res_batches(low_res, shards, batches)
    for batch, images in zip(progress, small):
        numbers = shards.numbers(batch)
        inputs = {"class_labels": labels.for_call(numbers)}
        if images is not None:
            inputs["image"] = images
        elif inputs["class_labels"] is None:
            inputs["batch_size"] = len(numbers)
        with one_thread(pipeline.device):
            x_0 = pipeline(
                **inputs,
                generator=[image_generator(labels.seed, number) for number in numbers],
                output_type="latent",
                **call,
            ).images
        arrays = {"arr_0": as_8_bit(x_0)}
        classes = labels.of_images(numbers)
        if classes is not None:
            arrays["arr_1"] = np.array(classes, dtype=np.int64)
        shards.save(batch, arrays)


def low_res_batches(low_res: NpzImages, shards: Shards, batches: list[int]) -> Iterator[np.ndarray]:
    """Yields the low-resolution images of some batches. Beyond the end the last image is repeated."""
    wanted = set(batches)
    for batch, images in enumerate(low_res.batches(shards.batch_size)):
        if batch in wanted:
            missing = shards.batch_size - len(images)
            yield np.concatenate([images, images[-1:].repeat(missing, axis=0)])
