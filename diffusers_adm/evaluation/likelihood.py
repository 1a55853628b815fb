"""Variational bound on the negative log-likelihood of images, in bits per dimension, and its term at each timestep (Nichol &
Dhariwal 2021, arXiv 2102.09672, section 3)."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.atomic_files import write_json
from diffusers_adm.data.image_sets import ImageSet
from diffusers_adm.diffusion import (
    NoiseSchedule,
    add_noise,
    epsilon_from_x_0,
    gaussian_kl,
    mean_bits,
    read_prediction,
    read_table,
)
from diffusers_adm.evaluation.plots import save_lines
from diffusers_adm.evaluation.report import write_csv
from diffusers_adm.evaluation.sampling import image_shape, model_settings
from diffusers_adm.evaluation.schedulers import SamplingPipeline
from diffusers_adm.evaluation.shards import Shards, image_generator, one_thread
from diffusers_adm.launch import join_processes
from diffusers_adm.losses import vlb_bits
from diffusers_adm.models.class_names import composed
from diffusers_adm.pipelines.checks import check_takes_timesteps
from diffusers_adm.pipelines.class_labels import ClassNames, known_names
from diffusers_adm.progress import with_progress
from diffusers_adm.records import weights_digest
from diffusers_adm.solvers.algorithms import check_variance_type


logger = logging.getLogger(__name__)


@dataclass
class VariationalBound:
    """
    Variational bound of images and its terms, in bits per dimension. The least noisy step comes first.

    Args:
        total: Variational bound, `(batch,)`: the sum of `prior` and all `terms`.
        prior: KL divergence from the prior at the last timestep, `(batch,)`.
        terms: Term of each step, `(batch, steps)`. The first term is a negative log-likelihood, and the others are KL divergences.
        x_0_mse: Mean squared error of the predicted x_0, `(batch, steps)`.
        epsilon_mse: Mean squared error of the noise that the predicted x_0 implies, `(batch, steps)`.
    """

    total: torch.Tensor
    prior: torch.Tensor
    terms: torch.Tensor
    x_0_mse: torch.Tensor
    epsilon_mse: torch.Tensor


@torch.no_grad()
def variational_bound(
    unet: ADMUNet2DModel,
    schedule: NoiseSchedule,
    x_0: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    prediction_type: str = "epsilon",
    variance_type: str = "fixed_large",
    clip_denoised: bool = True,
) -> VariationalBound:
    """
    Computes the variational bound. The network is evaluated once at each step, with new noise each time.

    Args:
        unet: UNet to evaluate.
        schedule: Noise schedule over all training timesteps, or over the timesteps of a respaced process.
        x_0: 8-bit images, scaled to [-1, 1], `(batch, channels, height, width)`.
        class_labels: Class of each image, `(batch,)`.
        generator: Generator of the noise, which is drawn from the last step to the first. With a list of one generator per image,
            the terms of an image do not depend on its batch.
        prediction_type: Kind of the prediction: `"epsilon"`, or `"sample"` for x_0.
        variance_type: Variance of a network without learned variance: `"fixed_large"` or `"fixed_small"`.
        clip_denoised: Whether the predicted x_0 is clipped to [-1, 1], as in the original code.
    """
    terms, x_0_mse, epsilon_mse = [], [], []
    for step in reversed(range(len(schedule))):
        index = torch.full((len(x_0),), step, device=x_0.device)  # (batch,)
        noise = randn_tensor(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)
        x_t = add_noise(schedule, x_0, index, noise)
        timestep = schedule.timesteps.to(x_0.device)[index]
        model_output = unet(x_t.to(unet.dtype), timestep, class_labels).sample
        prediction = read_prediction(schedule, x_t, index, model_output, prediction_type, variance_type)
        predicted = prediction.x_0_clipped if clip_denoised else prediction.x_0
        terms.append(vlb_bits(schedule, x_0, x_t, index, predicted, prediction.log_variance))
        x_0_mse.append((predicted - x_0).square().flatten(1).mean(dim=1))
        implied = epsilon_from_x_0(schedule, x_t, index, predicted)
        epsilon_mse.append((implied - noise).square().flatten(1).mean(dim=1))
    terms, x_0_mse, epsilon_mse = (torch.stack(kind[::-1], dim=1) for kind in (terms, x_0_mse, epsilon_mse))

    last = len(schedule) - 1
    mean = read_table(schedule.signal_scale, last, x_0) * x_0
    log_variance = torch.full_like(mean, (1 - schedule.alpha_bar[last]).log().item())
    standard = torch.zeros_like(mean)
    prior = mean_bits(gaussian_kl(mean, log_variance, standard, standard))
    return VariationalBound(terms.sum(dim=1) + prior, prior, terms, x_0_mse, epsilon_mse)


def evaluate_likelihood(
    pipeline: SamplingPipeline,
    images: ImageSet,
    folder: Path,
    *,
    num_images: int | None = None,
    timestep_respacing: str = "",
    unconditional: bool = False,
    clip_denoised: bool = True,
    seed: int = 0,
    batch_size: int = 50,
    model_name: str | None = None,
    image_settings: dict | None = None,
) -> None:
    """
    Computes the variational bound of images, on all launched processes, and writes `nll.json`, `terms.csv` and `terms.png`.

    Args:
        pipeline: Pipeline on this process's device.
        images: Images, with their labels if the UNet takes labels.
        folder: Folder of the run, on a disk that all processes can read and write.
        num_images: Number of images. The first ones are used. `None` means all.
        timestep_respacing: Respacing string of the original code. `""` means all timesteps.
        unconditional: Whether the UNet is given its null class for all images.
        clip_denoised: Whether the predicted x_0 is clipped to [-1, 1], as in the original code.
        seed: Seed of the run. The seed of each image is derived from it.
        batch_size: Number of images per batch.
        model_name: Folder or Hub id of the pipeline, for the record.
        image_settings: Settings of the images, for the record.

    Raises:
        ValueError: If model and images do not fit together, or the folder belongs to a run with other settings.
    """
    unet = pipeline.unet
    check_takes_timesteps(unet, "likelihood")
    check_variance_type(pipeline.scheduler.config.get("variance_type") or "fixed_large")
    size = image_shape(pipeline)
    if images.shape != size:
        raise ValueError(
            f"Images must be {size} (height, width, channels), the size of the UNet, but got {images.shape}. Pass --resolution and"
            " --in_channels."
        )
    num_images = images.num_images if num_images is None else num_images
    if not 1 <= num_images <= images.num_images:
        raise ValueError(f"--num_images must be in [1, {images.num_images}], but got {num_images}.")
    labels = labels_for_unet(pipeline, images, unconditional)
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config, timestep_respacing)
    settings = {
        **model_settings(pipeline, model_name),
        "weights": weights_digest({"unet": unet}),  # classifier and scheduler have no effect on the bound
        "scheduler": None,
        "source": images.name,
        "images": {"fingerprint": images.fingerprint, **(image_settings or {})},
        "labels": None if labels is None else hashlib.sha256(labels.astype(np.int64).tobytes()).hexdigest()[:16],
        "timestep_respacing": timestep_respacing,
        "clip_denoised": clip_denoised,
        "seed": seed,
    }
    state = join_processes()
    if state.is_main_process and labels is not None and num_images < images.num_images and not images.mixed:
        logger.warning(
            "The first %d of %d images may be of a few classes only, because %s may be sorted by class.",
            num_images, images.num_images, images.name,
        )  # fmt: skip
    shards = Shards(folder, settings, num_images, batch_size, state)
    evaluate_batches(pipeline, schedule, shards, images, labels)
    state.wait_for_everyone()
    if state.is_main_process:
        write_likelihood(shards, schedule)


def labels_for_unet(pipeline: SamplingPipeline, images: ImageSet, unconditional: bool) -> np.ndarray | None:
    """
    Returns the label of each image for the UNet, `(num_images,)`, or `None` for a UNet without classes.

    Args:
        pipeline: Pipeline whose UNet takes the labels.
        images: Images, with their labels.
        unconditional: Whether to use the null class for all images.

    Raises:
        ValueError: If the UNet requires labels, but labels are missing or unknown.
    """
    unet, num_classes = pipeline.unet, pipeline.unet.config.num_class_embeds
    if num_classes is None:
        return None
    if unconditional:
        if unet.null_class is None:
            raise ValueError(
                "--unconditional requires a UNet with a null class or without classes, but this UNet has neither."
            )
        return np.full(images.num_images, unet.null_class)
    labels = images.labels
    if labels is None:
        raise ValueError(
            "Labels are required, because the UNet is class-conditional, but the images have none. Pass labels or --unconditional."
        )
    if images.class_names is not None:
        labels = numbers_of_classes(images.class_names, known_names(pipeline), num_classes)[labels]
    if not (0 <= labels.min() and labels.max() < num_classes):
        raise ValueError(f"Labels must be in [0, {num_classes - 1}], but range from {labels.min()} to {labels.max()}.")
    return labels


def numbers_of_classes(class_names: list[str], known: dict[int, str] | None, num_classes: int) -> np.ndarray:
    """
    Returns the number that a pipeline gives to each class of some images, `(classes,)`.

    Args:
        class_names: Names of the classes of the images, in the order of their numbers. Classes without names are called by their numbers.
        known: Names of the classes of the pipeline, or `None`.
        num_classes: Number of classes of the UNet.

    Raises:
        ValueError: If only some of the names are known, or a name means several classes.
    """
    names, numbers = [composed(name) for name in class_names], range(len(class_names))
    if known is None or names in ([str(number) for number in numbers], [composed(known.get(n, "")) for n in numbers]):
        return np.array(numbers)
    label2id = ClassNames(known).label2id
    found = [label2id.get(name, []) for name in names]
    if not any(found) and len(names) == num_classes:
        return np.array(numbers)  # other names of the same classes, such as WordNet ids
    unclear = [name for name, matches in zip(class_names, found) if len(matches) != 1]
    if unclear:
        raise ValueError(
            f"Each class of the images must be called like one class of the pipeline, but {unclear[:5]} are not. The names are in"
            " `pipe.label2id`."
        )
    return np.array([match for (match,) in found])


def evaluate_batches(
    pipeline: SamplingPipeline, schedule: NoiseSchedule, shards: Shards, images: ImageSet, labels: np.ndarray | None
) -> None:
    """
    Computes the bound of this process's share of the missing batches.

    Args:
        pipeline: Pipeline on this process's device.
        schedule: Steps of the process.
        shards: Shards of the run.
        images: Images of the run.
        labels: Label of each image, or `None`.
    """
    config, device, settings = pipeline.scheduler.config, shards.state.device, shards.settings
    shards.report_found("evaluating")
    batches = shards.assigned()
    # The last image is repeated to fill the last batch, so that all batches have the same size. The repeats are dropped later.
    numbers = [np.minimum(shards.numbers(batch), images.num_images - 1) for batch in batches]
    pixels = images.chosen(np.unique(np.concatenate(numbers)) if numbers else np.arange(0), shards.batch_size)
    work = zip(batches, numbers, pixels)
    if shards.state.is_main_process:
        work = with_progress(work, len(batches), "evaluating", "batches")
    for batch, rows, distinct in work:
        x_0 = torch.from_numpy(distinct[rows - rows[0]]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with one_thread(device):
            bound = variational_bound(
                pipeline.unet,
                schedule,
                x_0.to(device),
                None if labels is None else torch.as_tensor(labels[rows], device=device),
                [image_generator(settings["seed"], number) for number in shards.numbers(batch)],
                config.prediction_type,
                config.get("variance_type") or "fixed_large",
                settings["clip_denoised"],
            )
        failed = np.unique(rows[~bound.total.isfinite().cpu().numpy()])
        if len(failed):
            raise ValueError(
                f"The bound must be finite, but it is not for images {failed.tolist()[:5]}. Check the weights for NaN and infinity,"
                " and use --dtype float32 if the UNet overflows float16."
            )
        shards.save(batch, {name: value.cpu().numpy() for name, value in vars(bound).items()})


def write_likelihood(shards: Shards, schedule: NoiseSchedule) -> None:
    """Writes the mean terms over all images, and prints the bound."""
    total, prior = (np.concatenate(list(shards.rows(name))) for name in ("total", "prior"))
    means = {}
    for name in ("terms", "x_0_mse", "epsilon_mse"):
        means[name] = sum(rows.sum(axis=0, dtype=np.float64) for rows in shards.rows(name)) / shards.num_images
    figures = {
        "bits_per_dim": total.mean(dtype=np.float64).item(),
        "standard_error": (total.std(ddof=1) / len(total) ** 0.5).item() if len(total) > 1 else None,
        "prior_bits_per_dim": prior.mean(dtype=np.float64).item(),
        "num_images": len(total),
        "num_steps": len(schedule),
        "settings": shards.settings,
    }
    write_json(shards.folder / "nll.json", figures)
    timesteps = schedule.timesteps.tolist()
    header = ["timestep", "bits_per_dim", "x_0_mse", "epsilon_mse"]
    write_csv(
        shards.folder / "terms.csv", header, list(zip(timesteps, *(values.tolist() for values in means.values())))
    )
    labels = {
        "terms": "bits per dimension",
        "x_0_mse": "x_0, mean squared error",
        "epsilon_mse": "epsilon, mean squared error",
    }
    save_lines(
        shards.folder / "terms.png",
        [(label, "timestep", {"": (timesteps, means[name])}) for name, label in labels.items()],
        log_scale=True,
    )
    error = "" if figures["standard_error"] is None else f" +- {figures['standard_error']:.4f}"
    print(
        f"{figures['bits_per_dim']:.4f}{error} bits per dimension, of which {figures['prior_bits_per_dim']:.4f} are the prior"
        f" ({figures['num_images']} images, {len(schedule)} steps)\nWrote nll.json, terms.csv and terms.png to {shards.folder}."
    )
