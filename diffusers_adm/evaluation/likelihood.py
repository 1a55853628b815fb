"""Likelihood: the variational bound of images in bits per dimension, and its terms by timestep (Nichol & Dhariwal 2021, arXiv
2102.09672, section 3)."""

import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.atomic_files import atomic_write, write_json
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
from diffusers_adm.evaluation.sampling import model_settings
from diffusers_adm.evaluation.schedulers import SamplingPipeline
from diffusers_adm.evaluation.shards import Shards, image_generator, one_thread, weights_digest
from diffusers_adm.launch import join_processes
from diffusers_adm.losses import vlb_bits
from diffusers_adm.pipelines.checks import check_told_timesteps
from diffusers_adm.progress import with_progress


@dataclass
class VariationalBound:
    """
    Variational bound of images and its terms in bits per dimension. Steps run from the least noisy to the noisiest.

    Args:
        total: The bound, `(batch,)`.
        prior: KL divergence from the prior at the last timestep, `(batch,)`.
        terms: Term of each step, `(batch, steps)`. The first is the negative log-likelihood, the others are KL divergences.
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
    Computes the variational bound. The network is evaluated once at every step, each time with new noise.

    Args:
        unet: UNet to evaluate.
        schedule: Schedule with all training timesteps, or of a respaced process.
        x_0: 8-bit images in [-1, 1], `(batch, channels, height, width)`.
        class_labels: Class of each image, `(batch,)`.
        generator: Source of the noise, which is drawn from the last step to the first. A list of one generator per image
            makes an image's terms independent of its batch.
        prediction_type: Prediction of the network, `"epsilon"` or `"sample"` (x_0).
        variance_type: `"fixed_large"` or `"fixed_small"`, for a network without learned variance.
        clip_denoised: Whether the predicted x_0 is clipped to [-1, 1], as published.
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
    Computes a model's bound on images, on all processes of a launch, and writes `nll.json`, `terms.csv` and `terms.png`.

    Args:
        pipeline: Pipeline on this process's device.
        images: Images, with their labels if the UNet takes labels.
        folder: Folder of the run, on a disk that all processes see.
        num_images: Number of images, the first ones. All by default.
        timestep_respacing: Steps of the process as a published string. All by default.
        unconditional: Whether the UNet takes its null class for all images.
        clip_denoised: Whether the predicted x_0 is clipped to [-1, 1], as published.
        seed: Seed of the run. The seed of each image is derived from it.
        batch_size: Number of images per batch.
        model_name: Folder or Hub id of the pipeline, for the record.
        image_settings: Settings of the images, for the record.

    Raises:
        ValueError: If model and images do not fit together, or the folder belongs to a run of other settings.
    """
    unet, config = pipeline.unet, pipeline.unet.config
    check_told_timesteps(unet, "likelihood")
    size = (config.sample_size, config.sample_size, config.in_channels)
    if images.shape != size:
        raise ValueError(f"Images are {images.shape} (height, width, channels), and the UNet's {size}.")
    num_images = images.num_images if num_images is None else num_images
    if not 1 <= num_images <= images.num_images:
        raise ValueError(f"--num_images {num_images} is not in 1 ... {images.num_images}.")
    labels = labels_for_unet(unet, images, unconditional)
    schedule = NoiseSchedule.from_config(pipeline.scheduler.config, timestep_respacing)
    settings = {
        **model_settings(pipeline, model_name),
        "weights": weights_digest({"unet": unet}),  # no classifier takes part, nor a solver
        "scheduler": None,
        "images": {"name": images.name, "fingerprint": images.fingerprint, **(image_settings or {})},
        "labels": None if labels is None else hashlib.sha256(labels.astype(np.int64).tobytes()).hexdigest()[:16],
        "timestep_respacing": timestep_respacing,
        "clip_denoised": clip_denoised,
        "seed": seed,
    }
    state = join_processes()
    shards = Shards(folder, settings, num_images, batch_size, state)
    evaluate_batches(pipeline, schedule, shards, images, labels)
    state.wait_for_everyone()
    if state.is_main_process:
        write_likelihood(shards, schedule)


def labels_for_unet(unet: ADMUNet2DModel, images: ImageSet, unconditional: bool) -> np.ndarray | None:
    """
    Returns the UNet's label of each image, `(num_images,)`, or `None` for a UNet without classes.

    Args:
        unet: UNet that takes the labels.
        images: Images, with their labels.
        unconditional: Whether to use the null class for all images.

    Raises:
        ValueError: If the UNet needs labels, and there are none, or unknown ones.
    """
    num_classes = unet.config.num_class_embeds
    if num_classes is None:
        return None
    if unconditional:
        if unet.null_class is None:
            raise ValueError("--unconditional needs a UNet that has a null class, or no classes.")
        return np.full(images.num_images, unet.null_class)
    labels = images.labels
    if labels is None:
        raise ValueError(
            "The UNet is class-conditional, and the images have no labels: give --unconditional or labels."
        )
    if not (0 <= labels.min() and labels.max() < num_classes):
        raise ValueError(f"Labels from {labels.min()} to {labels.max()} are not in 0 ... {num_classes - 1}.")
    return labels


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
    # Beyond the end the last image is repeated, so that all batches have one size. Its results are dropped.
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
                getattr(config, "variance_type", None) or "fixed_large",
                settings["clip_denoised"],
            )
        failed = np.unique(rows[~bound.total.isfinite().cpu().numpy()])
        if len(failed):
            raise ValueError(
                f"The bound of images {failed.tolist()[:5]} is not finite: look for NaN or infinity in the weights, and for a"
                " UNet that overflows float16."
            )
        shards.save(batch, {name: value.cpu().numpy() for name, value in vars(bound).items()})


def write_likelihood(shards: Shards, schedule: NoiseSchedule) -> None:
    """Writes the means over all images, and prints the bound."""
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
    with atomic_write(shards.folder / "terms.csv") as partial, open(partial, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["timestep", "bits_per_dim", "x_0_mse", "epsilon_mse"])
        table.writerows(zip(timesteps, *(values.tolist() for values in means.values())))
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
        f"{figures['bits_per_dim']:.4f}{error} bits per dimension ({figures['num_images']} images, {len(schedule)} steps;"
        f" {figures['prior_bits_per_dim']:.4f} of them for the last timestep): {shards.folder}"
    )
