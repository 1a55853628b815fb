"""Bulk sampling: on any number of processes, independent of their number, and continued after interruptions."""

import math
from collections.abc import Iterator
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline, default_model
from diffusers_adm.data.npz_images import NpzImages
from diffusers_adm.evaluation.labels import Labels
from diffusers_adm.evaluation.options import SAMPLING_OPTIONS
from diffusers_adm.evaluation.sample_files import as_8_bit, sample_path, write_samples
from diffusers_adm.evaluation.schedulers import SamplingPipeline
from diffusers_adm.evaluation.shards import Shards, image_generator, one_thread, weights_digest
from diffusers_adm.guidance import GuidanceOptions
from diffusers_adm.hub.download import OtherPipelineError
from diffusers_adm.hub.saved_files import check_variant
from diffusers_adm.launch import join_processes
from diffusers_adm.pipelines.options import SamplingOptions
from diffusers_adm.pipelines.released import RELEASED_PREFIX
from diffusers_adm.progress import with_progress


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
        model: Folder or Hub id of the pipeline, `released:NAME` of a released checkpoint, or `None` for the default model.
        revision: Branch, tag or commit on the Hub.
        variant: Variant of the weight files, such as `"fp16"`.
        dtype: Data type of the weights.
        device: Device of the networks.
        upsampler: Whether it is an upsampler. `None` for commands that run none.

    Raises:
        ValueError: If the pipeline is of another class, or the variant or the id cannot be one.
        OSError: If there is no such folder, and no such pipeline on the Hub, or a released checkpoint cannot be downloaded.
    """
    check_variant(variant)
    model = default_model() if model is None else model
    if revision is not None and Path(model).is_dir():
        raise ValueError(f"--revision {revision} is for pipelines on the Hub, but {model} is a folder.")
    is_released = str(model).startswith(RELEASED_PREFIX)
    if is_released and (revision is not None or variant is not None):
        raise ValueError(f"--revision and --variant are for saved pipelines, but got --model {model}.")
    if not is_released and "/" not in str(model) and not Path(model).exists():
        raise ValueError(f"There is no folder {str(model)!r}. Ids on the Hub look like 'owner/name'.")
    cls = ADMUpsamplePipeline if upsampler else ClassifierGuidedPipeline
    try:
        if is_released:
            pipeline = cls.from_released(str(model).removeprefix(RELEASED_PREFIX), dtype=getattr(torch, dtype))
        else:
            pipeline = cls.from_pretrained(model, revision=revision, variant=variant, dtype=getattr(torch, dtype))
    except (HfHubHTTPError, LocalEntryNotFoundError) as error:
        raise OSError(
            f"There is no folder {str(model)!r}, and the Hub gave no pipeline with this id. Ids look like 'owner/name'. {error}"
        ) from error
    except OtherPipelineError as error:
        advice = {
            True: "--low_res is for upsamplers: leave it out, or choose another --model.",
            False: "An upsampler needs --low_res: give it, or choose another --model.",
            None: "Choose another --model.",
        }
        raise ValueError(f"{error} {advice[upsampler]}") from error
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
        "model": Path(default_model() if name is None else name).name,
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
    unknown = sorted(call.keys() - SAMPLING_OPTIONS.keys())
    if unknown:
        raise ValueError(f"The pipelines take no {', '.join(unknown)} for a whole run.")
    return call


def run_options(pipeline: SamplingPipeline, call: dict | None) -> SamplingOptions:
    """
    Returns the options of a run with the pipeline's defaults. They are checked before anything is drawn.

    Args:
        pipeline: Pipeline of the run.
        call: Arguments of the pipeline's call that hold for the whole run.

    Raises:
        ValueError: If an argument does not hold for a whole run, or the pipeline refuses it.
    """
    options = SamplingOptions(**given_options(call)).resolved(pipeline)
    for name in ("guidance_scale", "cfg_weight"):
        value = getattr(options, name)
        if not isinstance(value, Real) or isinstance(value, bool) or not math.isfinite(value):
            # A list would give an image another value in another place of a batch.
            raise ValueError(f"`{name}` must be one finite number for a whole run, but got {value!r}.")
    if not isinstance(options.condition_unet, bool):
        raise ValueError(f"`condition_unet` must be True or False, but got {options.condition_unet!r}.")
    GuidanceOptions.parse(options.guidance_options)
    options.solver(pipeline)
    return options


def option_record(options: SamplingOptions) -> dict:
    """Returns the options of a run for its settings."""
    values = {name: getattr(options, name) for name in SAMPLING_OPTIONS}
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
    options = run_options(pipeline, call)
    small = None if low_res is None else open_low_res(low_res, pipeline, num_images)
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
        if state.is_main_process:
            print(f"Found {path}.", flush=True)
        return path
    draw_batches(pipeline, shards, image_labels, given_options(call), small)
    state.wait_for_everyone()
    if state.is_main_process:
        write_samples(shards, path)
    state.wait_for_everyone()
    return path


def open_low_res(path: str | Path, pipeline: SamplingPipeline, num_images: int) -> NpzImages:
    """
    Opens the images that an upsampler enlarges.

    Args:
        path: `.npz` file.
        pipeline: The upsampler.
        num_images: Number of images that are needed.

    Raises:
        ValueError: If the pipeline is no upsampler, or the images are too few or of another size.
    """
    if not isinstance(pipeline, ADMUpsamplePipeline):
        raise ValueError(f"--low_res {path}: a {type(pipeline).__name__} does not enlarge images.")
    if not Path(path).is_file():
        raise ValueError(f"--low_res {path}: there is no such file.")
    images = NpzImages(path, labelled=True)
    size = pipeline.config.low_res_size
    shape = (size, size, pipeline.unet.config.in_channels)
    if images.shape != shape:
        raise ValueError(
            f"--low_res {path}: images must be {shape} (height, width, channels), as the upsampler takes them, but are"
            f" {images.shape}."
        )
    if images.num_images < num_images:
        raise ValueError(f"--low_res {path} has {images.num_images} images, and {num_images} are wanted.")
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
    """Yields the low-resolution images of some batches. Beyond the end the last image is repeated."""
    wanted = set(batches)
    for batch, images in enumerate(low_res.batches(shards.batch_size)):
        if batch in wanted:
            missing = shards.batch_size - len(images)
            yield np.concatenate([images, images[-1:].repeat(missing, axis=0)])
