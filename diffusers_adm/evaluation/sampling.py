"""Samples by the thousand: on any number of processes, the same whatever their number, and never drawn twice."""

import argparse
import contextlib
import hashlib
import inspect
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler, PNDMScheduler
from PIL import Image
from tqdm.auto import tqdm

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline, default_model
from diffusers_adm.atomic_files import atomic_folder, atomic_write
from diffusers_adm.data.grids import grid_of
from diffusers_adm.data.npz import NpzFile, Rows, write_npz
from diffusers_adm.evaluation.image_sets import NpzImages
from diffusers_adm.evaluation.shards import Shards, image_generator, one_thread, weights_digest
from diffusers_adm.launch import join_processes
from diffusers_adm.solvers import GUIDED_SETTINGS, SUPPORTED_SCHEDULERS, takes_respacing


# By name, with settings beside the noise schedule's.
SCHEDULERS = {scheduler.__name__.removesuffix("Scheduler"): (scheduler, {}) for scheduler in SUPPORTED_SCHEDULERS}
SCHEDULERS["PNDM"] = (PNDMScheduler, {"skip_prk_steps": True})
SCHEDULERS |= {
    scheduler.__name__.removesuffix("Scheduler") + "-guided": (scheduler, settings)
    for scheduler, settings in GUIDED_SETTINGS.items()
}
# Few of their steps, which are straight in sigma, go astray unless placed as by Karras et al. 2022 (arXiv 2206.00364, eq. 5).
SCHEDULERS |= {
    f"{name}-Karras": (SCHEDULERS[name][0], {"use_karras_sigmas": True}) for name in ("HeunDiscrete", "KDPM2Discrete")
}
FORMATS = ("npz", "png")
# Arguments of a call that are not the same for all images of a run, or that no word can say.
GIVEN_BY_THE_RUN = {
    *("self", "image", "class_labels", "batch_size", "height", "width", "generator", "latents"),
    *("output_type", "return_dict", "guiding_unet", "guidance_fn", "x_0_fn"),
    *("callback_on_step_start", "callback_on_step_end", "callback_on_step_end_tensor_inputs"),
}
IMAGES_OF_A_GRID = 100

SamplingPipeline = ClassifierGuidedPipeline | ADMUpsamplePipeline


def call_options() -> list[str]:
    """The arguments of the pipelines' calls that hold for a whole run."""
    calls = (ClassifierGuidedPipeline.__call__, ADMUpsamplePipeline.__call__)
    names = {name: None for call in calls for name in inspect.signature(call).parameters}
    return [name for name in names if name not in GIVEN_BY_THE_RUN]


def parse_value(text: str) -> bool | float | int | str | list | dict | None:
    """A word of the command line: a number, true, false, none, a list or an object in JSON, or else itself."""
    words = {"none": None, "null": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    with contextlib.suppress(json.JSONDecodeError):
        return json.loads(text)
    return text


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `load_pipeline`, and what all runs have."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=None,
        help="Folder or Hub id of a pipeline; by default the one of digits that ships with it.",
    )
    group.add_argument("--revision", default=None, help="Branch, tag or commit on the Hub.")
    group.add_argument("--variant", default=None, help="Of the weight files, such as fp16.")
    group.add_argument(
        "--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="Of the weights."
    )
    group.add_argument(
        "--seed", type=int, default=0, help="Of the run; each image has one of its own that follows from it."
    )
    group.add_argument("--batch_size", type=int, default=50, help="Images drawn at once (default: %(default)s).")


def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `sample`."""
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="Folder of the run: new, or of one to go on with."
    )
    parser.add_argument("--num_samples", type=int, default=50_000)
    parser.add_argument(
        "--labels",
        default=None,
        help="random, balanced, or a file: .npz with arr_1, or a text of one number or name a line. By default random; for an"
        " upsampler those of --low_res, and none where it has none.",
    )
    parser.add_argument("--format", choices=FORMATS, default="npz", help="npz: one file; png: a folder a class.")
    parser.add_argument("--remove_shards", action="store_true", help="Once the samples are written.")
    parser.add_argument(
        "--low_res",
        metavar="FILE",
        default=None,
        help="Samples (.npz) for an upsampler to enlarge, with their labels.",
    )
    add_model_arguments(parser)
    group = parser.add_argument_group(
        "sampling", "Arguments of the pipeline's call; its own defaults where not given."
    )
    group.add_argument(
        "--scheduler",
        choices=sorted(SCHEDULERS),
        default=None,
        help="Instead of the pipeline's; -guided: as its authors advise for guided sampling; -Karras: with their noise levels.",
    )
    for name in call_options():
        group.add_argument(f"--{name}", type=option_type(name), default=argparse.SUPPRESS, metavar="VALUE")


def option_type(name: str) -> Callable:
    """What makes an argument of a call of a word: respacing strings may look like numbers."""
    return str if name == "timestep_respacing" else parse_value


def load_pipeline(args: argparse.Namespace, device: torch.device) -> SamplingPipeline:
    """
    The pipeline that the options name, an upsampler where there are images to enlarge.

    Raises:
        ValueError: If it is of another class.
    """
    cls = ClassifierGuidedPipeline if getattr(args, "low_res", None) is None else ADMUpsamplePipeline
    pipeline = cls.from_pretrained(
        args.model or default_model(),
        revision=args.revision,
        variant=args.variant,
        dtype=getattr(torch, args.dtype),
    ).to(device)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def set_scheduler(pipeline: SamplingPipeline, name: str | None) -> None:
    """Puts another scheduler of the same noise schedule in the place of a pipeline's; `None` leaves it."""
    if name is None:
        return
    scheduler_class, settings = SCHEDULERS[name]
    if type(pipeline.scheduler) is scheduler_class and not settings:
        return
    if scheduler_class is DDPMScheduler:
        settings = {"variance_type": "learned_range" if pipeline.unet.learns_variance else "fixed_large"}
    pipeline.scheduler = scheduler_class.from_config(pipeline.scheduler.config, **settings)


def known_classes(pipeline: SamplingPipeline, call: dict) -> int | None:
    """How many classes all networks know that a run tells them; `None` where it tells none."""
    unet, classifier = pipeline.unet.config, pipeline.classifier
    guided = classifier is not None and call.get("guidance_scale", pipeline.config.guidance_scale)
    receivers = [unet.num_class_embeds] if call.get("condition_unet", True) else []
    receivers += [classifier.config.num_classes] if guided else []
    return min((count for count in receivers if count is not None), default=None)


class Labels:
    """
    The label of each image of a run.

    Args:
        policy: `"random"`, `"balanced"` or a file's path; `None` for no labels.
        pipeline: That is told them.
        call: Arguments of its call.
        seed: Of the run.
        num_images: How many there will be.

    Raises:
        ValueError: If there is no such file, or it has too few labels or others than the pipeline knows.
    """

    def __init__(self, policy: str | None, pipeline: SamplingPipeline, call: dict, seed: int, num_images: int):
        self.seed = seed
        self.policy = policy
        self.listed = None
        self.num_classes = None if policy is None else known_classes(pipeline, call)
        if policy in ("random", "balanced", None):
            return
        if self.num_classes is None:
            raise ValueError(f"--labels {policy}: nothing in this run takes labels.")
        path = Path(policy)
        if not path.is_file():
            raise ValueError(f"--labels {policy} is not random, balanced or a file.")
        if path.suffix == ".npz":
            given = NpzFile(path).read("arr_1")
        else:
            words = path.read_text(encoding="utf-8").splitlines()
            given = [int(word) if word.strip().isdigit() else word.strip() for word in words if word.strip()]
        self.listed = pipeline.class_ids(given)
        self.policy = f"listed, {hashlib.sha256(str(self.listed).encode()).hexdigest()[:16]}"
        if len(self.listed) < num_images:
            raise ValueError(f"--labels {policy} has {len(self.listed)} labels for {num_images} images.")
        wrong = sorted({label for label in self.listed if not 0 <= label < self.num_classes})
        if wrong:
            raise ValueError(
                f"--labels {policy} has labels {wrong[:5]}, which are not in 0 ... {self.num_classes - 1}."
            )

    def of(self, numbers: range) -> list[int] | None:
        """The labels of images by their numbers; `None` where nothing takes any."""
        if self.num_classes is None:
            return None
        if self.listed is not None:
            return [self.listed[number % len(self.listed)] for number in numbers]  # beyond the end none is kept
        if self.policy == "balanced":
            return [number % self.num_classes for number in numbers]
        generators = (image_generator(self.seed, number, purpose=1) for number in numbers)
        return [torch.randint(self.num_classes, (), generator=generator).item() for generator in generators]


def sample(args: argparse.Namespace) -> None:
    """
    Draws samples into `args.output`: `samples_NxHxWxC.npz` as the published scripts write it, or PNG files, and a grid.

    Args:
        args: Parsed `add_sample_arguments`.

    Raises:
        ValueError: If the run cannot be, or the folder is of another.
    """
    state = join_processes()
    call = {name: getattr(args, name) for name in call_options() if hasattr(args, name)}
    pipeline = load_pipeline(args, state.device)
    set_scheduler(pipeline, args.scheduler)
    path = draw_samples(
        pipeline,
        Path(args.output),
        num_images=args.num_samples,
        batch_size=args.batch_size,
        seed=args.seed,
        labels=args.labels,
        call=call,
        low_res=args.low_res,
        model_name=args.model,
        format=args.format,
    )
    if state.is_main_process:
        if args.remove_shards:
            shutil.rmtree(Path(args.output) / "shards")
        print(f"{args.num_samples} samples in {path}")


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
    Draws images on all processes of a launch, without those that are there already, and writes them as one set. Image i
    depends on the seed, i and its label, and on nothing else of the run; so on a CPU each process takes one thread.

    Args:
        pipeline: On this process's device.
        folder: Of the run, on a disk that all processes see.
        num_images: How many are wanted.
        batch_size: Images drawn at once.
        seed: Of the run.
        labels: `"random"`, `"balanced"` (label i is i modulo the number of classes), or a file: `.npz` with `arr_1`, or a
            text of one number or name a line. By default random; for an upsampler those of `low_res`, and none where it has
            none.
        call: Arguments of the pipeline's call.
        low_res: `.npz` file of the images that an upsampler enlarges; its `arr_1` are their labels.
        model_name: For the record.
        format: `"npz"` or `"png"`.

    Returns:
        The file `samples_NxHxWxC.npz`, or the folder of that name with PNG files and `manifest.jsonl`.

    Raises:
        ValueError: If the run cannot be, or the folder is of another.
    """
    state = join_processes()
    call = {name: value for name, value in (call or {}).items() if value is not None}
    known = inspect.signature(type(pipeline).__call__).parameters
    unknown = sorted(name for name in call if name not in known or name in GIVEN_BY_THE_RUN)
    if unknown:
        raise ValueError(f"{type(pipeline).__name__} takes no {', '.join(unknown)} of a whole run.")
    small = None if low_res is None else NpzImages(low_res, labelled=True)
    if small is not None:
        if small.num_images < num_images:
            raise ValueError(f"{low_res} has {small.num_images} images, and {num_images} are wanted.")
    if labels is None:
        labels = "random"
        if small is not None:  # the classes are those of the images
            has_labels = small.labels is not None and known_classes(pipeline, call) is not None
            labels = str(low_res) if has_labels else None
    of_image = Labels(labels, pipeline, call, seed, num_images)
    settings = {
        **model_settings(pipeline, model_name),
        "call": {**run_defaults(pipeline, call), **call},
        "seed": seed,
        "labels": of_image.policy,
        "low_res": None if small is None else small.fingerprint,
    }
    shards = Shards(folder, settings, num_images, batch_size, state)
    config = pipeline.unet.config
    size = (num_images, config.sample_size, config.sample_size, config.in_channels)
    path = folder / f"samples_{'x'.join(map(str, size))}{'.npz' if format == 'npz' else ''}"
    if path.exists():
        return path
    dealt = shards.dealt()
    progress = tqdm(dealt, desc="batches", disable=None if state.is_main_process else True)
    for batch, images in zip(progress, small_images(small, shards, dealt)):
        numbers = shards.numbers(batch)
        classes = of_image.of(numbers)
        with one_thread(pipeline.device):
            x_0 = pipeline(
                **images,
                class_labels=classes,
                generator=[image_generator(seed, number) for number in numbers],
                output_type="latent",
                **({} if small is not None or classes is not None else {"batch_size": len(numbers)}),
                **call,
            ).images
        arrays = {"arr_0": as_8_bit(x_0)}
        if classes is not None:
            arrays["arr_1"] = np.array(classes, dtype=np.int64)
        shards.save(batch, arrays)
    state.wait_for_everyone()
    if state.is_main_process:
        merge(shards, path)
    state.wait_for_everyone()
    return path


def model_settings(pipeline: SamplingPipeline, name: str | None) -> dict:
    """What a run of a pipeline depends on; its name, of `--model`, is for the record."""
    config = pipeline.scheduler.config
    return {
        "model": Path(name or default_model()).name,
        "weights": weights_digest(pipeline.components),
        "dtype": str(pipeline.unet.dtype).removeprefix("torch."),
        "scheduler": type(pipeline.scheduler).__name__,
        "scheduler_config": {key: value for key, value in config.items() if not key.startswith("_")},
    }


def run_defaults(pipeline: SamplingPipeline, call: dict) -> dict:
    """What arguments are that are not given."""
    signature = inspect.signature(type(pipeline).__call__).parameters
    defaults = {name: signature[name].default for name in call_options() if name in signature}
    defaults["guidance_scale"] = pipeline.config.guidance_scale if pipeline.classifier is not None else 0.0
    if not {"num_inference_steps", "timestep_respacing", "timesteps"} & set(call):
        defaults["num_inference_steps"] = pipeline.config.num_inference_steps
        if takes_respacing(pipeline.scheduler):
            defaults["timestep_respacing"] = pipeline.config.timestep_respacing
    return {name: value for name, value in defaults.items() if value is not None}


def small_images(small: NpzImages | None, shards: Shards, dealt: list[int]) -> Iterator[dict]:
    """For each batch the argument that an upsampler's call takes beside the others; nothing for other pipelines."""
    if small is None:
        yield from ({} for _ in dealt)
        return
    wanted = set(dealt)
    for batch, images in enumerate(small.batches(shards.batch_size)):
        if batch in wanted:
            missing = shards.batch_size - len(images)
            yield {"image": np.concatenate([images, images[-1:].repeat(missing, axis=0)])}


def as_8_bit(x_0: torch.Tensor) -> np.ndarray:
    """From [-1, 1] `(batch, channels, height, width)` to 8 bits `(batch, height, width, channels)`, cut as published."""
    return ((x_0.float() + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def merge(shards: Shards, path: Path) -> None:
    """
    Writes the samples of all shards, whole or not at all, and a grid of the first.

    Args:
        shards: Of a run.
        path: `.npz` file, or a folder for PNG files.

    Raises:
        ValueError: If some are missing.
    """
    missing = shards.missing()
    if missing:
        raise ValueError(
            f"{len(missing)} of {shards.num_batches} batches are missing in {shards.folder}: run it again."
        )
    images = itertools.chain.from_iterable(shards.rows("arr_0"))
    with atomic_write(shards.folder / "grid.png") as partial:
        grid_of([to_picture(image) for image in itertools.islice(images, IMAGES_OF_A_GRID)]).save(
            partial, format="PNG"
        )
    first = NpzFile(shards.path(0))
    labelled = "arr_1" in first
    if path.suffix == ".npz":
        shape, dtype = first.header("arr_0")
        arrays: dict[str, np.ndarray | Rows] = {
            "arr_0": Rows((shards.num_images, *shape[1:]), dtype, shards.rows("arr_0"))
        }
        if labelled:
            arrays["arr_1"] = np.concatenate(list(shards.rows("arr_1")))
        arrays["metadata"] = np.array(json.dumps({**shards.settings, "num_images": shards.num_images}))
        write_npz(path, arrays)
    else:
        write_png(shards, path, labelled)


def write_png(shards: Shards, folder: Path, labelled: bool) -> None:
    """`images/<label>/<number>.png`, and `manifest.jsonl` with file, number and label of each."""
    images = itertools.chain.from_iterable(shards.rows("arr_0"))
    labels = itertools.chain.from_iterable(shards.rows("arr_1")) if labelled else itertools.repeat(None)
    with atomic_folder(folder) as partial:
        partial.mkdir()
        with open(partial / "manifest.jsonl", "w", encoding="utf-8") as manifest:
            for number, (image, label) in enumerate(zip(images, labels)):
                label = None if label is None else int(label)
                file = Path("images", "" if label is None else f"{label:04d}", f"{number:06d}.png")
                (partial / file).parent.mkdir(parents=True, exist_ok=True)
                to_picture(image).save(partial / file)
                manifest.write(json.dumps({"file_name": file.as_posix(), "number": number, "label": label}) + "\n")


def to_picture(image: np.ndarray) -> Image.Image:
    """A picture of 8-bit pixels `(height, width, 1 or 3)`."""
    return Image.fromarray(image[..., 0] if image.shape[2] == 1 else image)
