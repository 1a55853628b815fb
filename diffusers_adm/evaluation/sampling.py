"""Sampling of many images. Images do not depend on the number of processes, and an interrupted run continues."""

import math
from collections.abc import Iterator
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline
from diffusers_adm.data.npz_images import NpzImages
from diffusers_adm.evaluation.labels import Labels
from diffusers_adm.evaluation.options import SAMPLING_OPTIONS
from diffusers_adm.evaluation.sample_files import as_8_bit, sample_path, write_samples
from diffusers_adm.evaluation.schedulers import SamplingPipeline
from diffusers_adm.evaluation.shards import Shards, image_generator, one_thread
from diffusers_adm.evaluation.user_files import guidance_from_file, place_record
from diffusers_adm.hub.download import OtherPipelineError
from diffusers_adm.hub.saved_files import check_variant
from diffusers_adm.launch import join_processes
from diffusers_adm.pipelines.options import SamplingOptions
from diffusers_adm.pipelines.released import name_of_released
from diffusers_adm.pipelines.run_checks import check_run
from diffusers_adm.progress import with_progress
from diffusers_adm.records import weights_digest
from diffusers_adm.shipped import name_or_folder


def load_pipeline(
    model: str | Path | None,
    *,
    revision: str | None = None,
    variant: str | None = None,
    dtype: str = "float32",
    device: torch.device | str = "cpu",
    upsampler: bool | None = None,
) -> SamplingPipeline:
    """
    Loads a pipeline without a progress bar.

    Args:
        model: Folder or Hub id of the pipeline, `shipped:NAME` of one that ships with this package, `released:NAME` of a released
            checkpoint, or `None` for the default model.
        revision: Branch, tag or commit on the Hub.
        variant: Variant of the weight files, such as `"fp16"`.
        dtype: Data type of the weights.
        device: Device of the networks.
        upsampler: Whether the pipeline is an upsampler. `None` for commands that run neither class.

    Raises:
        ValueError: If the pipeline is of another class, or the variant or the id is not valid.
        OSError: If the pipeline exists neither as a folder nor on the Hub, or a released checkpoint cannot be downloaded.
    """
    check_variant(variant)
    model = name_or_folder(model)
    if revision is not None and Path(model).is_dir():
        raise ValueError(f"--revision requires a pipeline on the Hub, but got {revision} for the folder {model}.")
    released = name_of_released(model)
    if released is not None and (revision is not None or variant is not None):
        raise ValueError(
            f"--revision and --variant require a saved pipeline, but got --model {model}. Leave them out."
        )
    if released is None and "/" not in str(model) and not Path(model).exists():
        raise ValueError(f"There is no folder {str(model)!r}. Ids on the Hub look like 'owner/name'.")
    cls = ADMUpsamplePipeline if upsampler else ClassifierGuidedPipeline
    try:
        if released is not None:
            pipeline = cls.from_released(released, dtype=getattr(torch, dtype))
        else:
            pipeline = cls.from_pretrained(model, revision=revision, variant=variant, dtype=getattr(torch, dtype))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise OSError(
            f"There is no folder {str(model)!r}, and no pipeline with this id could be loaded from the Hub. Ids look like"
            f" 'owner/name'. {error}"
        ) from error
    except OtherPipelineError as error:
        advice = {
            True: "Leave out --low_res, or choose another --model.",
            False: "Pass --low_res for an upsampler, or choose another --model.",
            None: "Choose another --model.",
        }
        raise ValueError(f"{error} {advice[upsampler]}") from error
    pipeline.to(device).set_progress_bar_config(disable=True)
    return pipeline


def model_settings(pipeline: SamplingPipeline, name: str | None) -> dict:
    """
    Returns the settings of a run that its pipeline determines.

    Args:
        pipeline: Pipeline of the run.
        name: Folder or Hub id of the pipeline, for the record.
    """
    config = pipeline.scheduler.config
    return {
        "model": Path(name_or_folder(name)).name,
        "weights": weights_digest(pipeline.components),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": {key: value for key, value in config.items() if not key.startswith("_")},
    }


def image_shape(pipeline: SamplingPipeline) -> tuple[int, int, int]:
    """Returns the shape of the images that a pipeline draws by default, `(height, width, channels)`."""
    config = pipeline.unet.config
    return config.sample_size, config.sample_size, config.in_channels


def given_options(call: dict | None) -> dict:
    """
    Returns the arguments of a call that are not `None`.

    Raises:
        ValueError: If an argument cannot be used for a whole run.
    """
    call = {name: value for name, value in (call or {}).items() if value is not None}
    unknown = sorted(call.keys() - SAMPLING_OPTIONS.keys())
    if unknown:
        raise ValueError(f"Options of a whole run must not include {', '.join(unknown)}. Leave them out.")
    return call


def run_options(pipeline: SamplingPipeline, call: dict | None) -> SamplingOptions:
    """
    Returns the options of a run, with the defaults of its pipeline. All are checked, so that an error comes before the first image.

    Args:
        pipeline: Pipeline of the run.
        call: Arguments of the pipeline's call, the same for all images. `guidance_fn` is `"FILE:NAME"`, see [`guidance_from_file`].

    Raises:
        ValueError: If an argument cannot be used for a whole run, or is not valid for the pipeline.
    """
    call = given_options(call)
    if "guidance_fn" in call:
        call["guidance_fn"] = guidance_from_file(call["guidance_fn"], pipeline)
    options = SamplingOptions(**call).resolved(pipeline)
    for name in ("guidance_scale", "cfg_weight"):
        value = getattr(options, name)
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            # With a list, the value of an image would depend on its place in the batch.
            raise ValueError(f"`{name}` must be one finite number for a whole run, but got {value!r}.")
    if not isinstance(options.condition_unet, bool):
        raise ValueError(f"`condition_unet` must be True or False, but got {options.condition_unet!r}.")
    check_run(pipeline, options)
    return options


def option_record(options: SamplingOptions, call: dict) -> dict:
    """Returns the options of a run that are recorded in its settings. A guidance function is recorded as its file."""
    values = {name: getattr(options, name) for name in SAMPLING_OPTIONS}
    if options.guidance_fn is not None:
        values["guidance_fn"] = place_record(call["guidance_fn"])
    return {name: value for name, value in values.items() if value is not None}


def labels_of_run(
    policy: str | None,
    pipeline: SamplingPipeline,
    options: SamplingOptions,
    small: NpzImages | None,
    seed: int,
    num_images: int,
) -> Labels:
    """
    Returns the labels of the images of a run.

    Args:
        policy: Choice of the labels, the argument `labels` of [`draw_samples`].
        pipeline: Pipeline of the run.
        options: Resolved options of the pipeline's call.
        small: Images that an upsampler enlarges, or `None`.
        seed: Seed of the run.
        num_images: Number of images.

    Raises:
        ValueError: If a file of labels does not exist, or has too few or unknown labels, or no network takes labels.
    """
    if policy is None and small is None:
        policy = "random"
    elif policy is None and small.labels is not None and options.num_classes(pipeline) is not None:
        policy = small.name
    return Labels(policy, pipeline, options, seed, num_images)


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
    Draws images on all launched processes and writes them as one set. Batches that an earlier run has drawn are kept. Image i depends
    only on the seed, on i and on its label. For this reason, each process on a CPU uses one thread.

    Args:
        pipeline: Pipeline on this process's device.
        folder: Folder of the run, on a disk that all processes can read and write.
        num_images: Number of images.
        batch_size: Number of images per batch.
        seed: Seed of the run. The seed of each image is derived from it.
        labels: Labels of the images: `"random"`, `"balanced"` (label i is i modulo the number of classes), or a file. The file is
            an `.npz` file with `arr_1`, or a text file with one number or name per line. `None` means `"random"`. For an upsampler,
            `None` means the labels of `low_res` if it has any, and no labels otherwise.
        call: Arguments of the pipeline's call, the same for all images. `guidance_fn` is `"FILE:NAME"`, see [`guidance_from_file`].
        low_res: Path of an `.npz` file of the images that an upsampler enlarges. Their labels are in `arr_1`.
        model_name: Folder or Hub id of the pipeline, for the record.
        format: Format of the samples: `"npz"` or `"png"`.

    Returns:
        Path of the file `samples_NxHxWxC.npz`, or of a folder `samples_NxHxWxC` with PNG files and `manifest.jsonl`.

    Raises:
        ValueError: If an argument is not valid, or the folder belongs to a run with other settings.
    """
    state = join_processes()
    call = given_options(call)
    options = run_options(pipeline, call)
    small = None if low_res is None else open_low_res(low_res, pipeline, num_images)
    image_labels = labels_of_run(labels, pipeline, options, small, seed, num_images)
    settings = {
        **model_settings(pipeline, model_name),
        "call": option_record(options, call),
        "seed": seed,
        "labels": image_labels.policy,
        "low_res": None if small is None else small.fingerprint,
    }
    shards = Shards(folder, settings, num_images, batch_size, state)
    path = sample_path(folder, num_images, image_shape(pipeline), format)
    if path.exists():
        if state.is_main_process:
            print(f"Found {path}.", flush=True)
        return path
    if options.guidance_fn is not None:
        call["guidance_fn"] = options.guidance_fn
    draw_batches(pipeline, shards, image_labels, call, small)
    state.wait_for_everyone()
    if state.is_main_process:
        write_samples(shards, path)
    state.wait_for_everyone()
    return path


def open_low_res(path: str | Path, pipeline: SamplingPipeline, num_images: int) -> NpzImages:
    """
    Opens the images that an upsampler enlarges.

    Args:
        path: Path of an `.npz` file.
        pipeline: Upsampler that enlarges the images.
        num_images: Number of images that are required.

    Raises:
        ValueError: If the pipeline is not an upsampler, or the images are too few or of another size.
    """
    if not isinstance(pipeline, ADMUpsamplePipeline):
        raise ValueError(f"--low_res requires an upsampler, but the pipeline is a {type(pipeline).__name__}.")
    if not Path(path).is_file():
        raise ValueError(f"--low_res must be an .npz file, but there is no file {path}.")
    images = NpzImages(path, labelled=True)
    size = pipeline.config.low_res_size
    shape = (size, size, pipeline.unet.config.in_channels)
    if images.shape != shape:
        raise ValueError(
            f"--low_res {path} must have images of {shape} (height, width, channels), as the upsampler requires, but they are"
            f" {images.shape}."
        )
    if images.num_images < num_images:
        raise ValueError(f"--low_res must have at least {num_images} images, but {path} has {images.num_images}.")
    return images


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
    shards.report_found("drawing")
    batches = shards.assigned()
    small = [None] * len(batches) if low_res is None else low_res_batches(low_res, shards, batches)
    work = zip(batches, small)
    if shards.state.is_main_process:
        work = with_progress(work, len(batches), "drawing", "batches")
    for batch, images in work:
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
    """Yields the low-resolution images of some batches. The last image is repeated to fill the last batch."""
    wanted = set(batches)
    for batch, images in enumerate(low_res.batches(shards.batch_size)):
        if batch in wanted:
            missing = shards.batch_size - len(images)
            yield np.concatenate([images, images[-1:].repeat(missing, axis=0)])
