"""Likelihood: the variational bound of images in bits a dimension, and its terms by timestep (Nichol & Dhariwal 2021, arXiv
2102.09672, section 3)."""

import argparse
import csv
import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers.utils.torch_utils import randn_tensor
from tqdm.auto import tqdm

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.atomic_files import atomic_write, write_json
from diffusers_adm.diffusion import (
    NoiseSchedule,
    add_noise,
    epsilon_from_x_0,
    gaussian_kl,
    mean_bits,
    read_prediction,
    read_table,
)
from diffusers_adm.evaluation.image_sets import ImageSet, add_image_set_arguments, check_changes, open_images
from diffusers_adm.evaluation.plots import save_lines
from diffusers_adm.evaluation.sampling import add_model_arguments, load_pipeline, model_settings
from diffusers_adm.evaluation.shards import Shards, image_generator, one_thread, weights_digest
from diffusers_adm.launch import join_processes
from diffusers_adm.losses import vlb_bits


@dataclass
class VariationalBound:
    """
    Terms of images, in bits a dimension where nothing else is said; steps run from the least noisy to the noisiest.

    Args:
        total: The bound, `(batch,)`.
        prior: What is left of the image at the last timestep, `(batch,)`.
        terms: Of each step, `(batch, steps)`: the first is the negative log-likelihood, the others are KL divergences.
        x_0_mse: Mean squared error of the predicted x_0, `(batch, steps)`.
        epsilon_mse: Mean squared error of the noise that it implies, `(batch, steps)`.
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
    Evaluates the network once at every step, each time on newly drawn noise.

    Args:
        unet: The network.
        schedule: The steps: all training timesteps, or a respaced process.
        x_0: 8-bit images in [-1, 1], `(batch, channels, height, width)`.
        class_labels: Of each image, `(batch,)`.
        generator: Of the noise, which is drawn from the last step to the first; a list of one an image makes an image's
            terms independent of its batch.
        prediction_type: What the network predicts: `"epsilon"`, or `"sample"` for x_0.
        variance_type: Of a network that learns none: `"fixed_large"` or `"fixed_small"`.
        clip_denoised: Whether the predicted x_0 is clipped to [-1, 1], as published.
    """
    terms, x_0_mse, epsilon_mse = [], [], []
    for step in reversed(range(len(schedule))):
        index = torch.full((len(x_0),), step, device=x_0.device)  # (batch,)
        noise = randn_tensor(x_0.shape, generator=generator, device=x_0.device, dtype=x_0.dtype)
        x_t = add_noise(schedule, x_0, index, noise)
        timestep = schedule.timesteps.to(x_0.device)[index]
        model_output = unet(x_t.to(unet.dtype), timestep, class_labels).sample
        found = read_prediction(schedule, x_t, index, model_output, prediction_type, variance_type)
        predicted = found.x_0_clipped if clip_denoised else found.x_0
        terms.append(vlb_bits(schedule, x_0, x_t, index, predicted, found.log_variance))
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


def add_likelihood_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `measure_likelihood`."""
    parser.add_argument("dataset", help="Hub id, folder of images, dataset's folder, or .npz with arr_0.")
    parser.add_argument(
        "--output", metavar="DIR", required=True, help="Folder of the run: new, or of one to go on with."
    )
    parser.add_argument("--num_images", type=int, default=None, help="The first so many; all by default.")
    parser.add_argument(
        "--timestep_respacing", default="", help="Steps of the process as a published string; all by default."
    )
    parser.add_argument("--unconditional", action="store_true", help="Do not tell the UNet the class (null class).")
    parser.add_argument("--clip_denoised", action=argparse.BooleanOptionalAction, default=True)
    add_model_arguments(parser)
    add_image_set_arguments(parser)


def measure_likelihood(args: argparse.Namespace) -> None:
    """
    Measures a model's bound on a dataset, on all processes of a launch, and writes `nll.json`, `terms.csv` and `terms.png`
    into `args.output`.

    Args:
        args: Parsed `add_likelihood_arguments`.

    Raises:
        ValueError: If model and images do not fit together, or the folder is of another run.
    """
    check_changes(args, args.dataset)
    state = join_processes()
    pipeline = load_pipeline(args, state.device)
    unet, scheduler = pipeline.unet, pipeline.scheduler
    told = unet.config.num_class_embeds is not None and not args.unconditional
    images = open_images(args.dataset, args, labelled=told)
    size = (unet.config.sample_size, unet.config.sample_size, unet.config.in_channels)
    if images.shape != size:
        raise ValueError(f"Images are {images.shape} (height, width, channels), and the UNet's {size}.")
    num_images = images.num_images if args.num_images is None else args.num_images
    if not 1 <= num_images <= images.num_images:
        raise ValueError(f"--num_images {num_images} is not in 1 ... {images.num_images}.")
    labels = labels_of(unet, images, args.unconditional)
    schedule = NoiseSchedule.from_config(scheduler.config, args.timestep_respacing)
    settings = {
        **model_settings(pipeline, args.model),
        "weights": weights_digest({"unet": unet}),  # no classifier takes part, nor a solver
        "scheduler": None,
        "images": {
            "name": images.name,
            "fingerprint": images.fingerprint,
            "resolution": args.resolution,
            "crop": args.crop,
            "source_resolution": args.source_resolution,
            "in_channels": args.in_channels,
        },
        "labels": None if labels is None else hashlib.sha256(labels.astype(np.int64).tobytes()).hexdigest()[:16],
        "timestep_respacing": args.timestep_respacing,
        "clip_denoised": args.clip_denoised,
        "seed": args.seed,
    }
    shards = Shards(Path(args.output), settings, num_images, args.batch_size, state)
    dealt = shards.dealt()
    # Beyond the end the last image is repeated, so that all batches are of one size; of that none is kept.
    numbers = [np.minimum(shards.numbers(batch), images.num_images - 1) for batch in dealt]
    read = images.chosen(np.unique(np.concatenate(numbers)) if numbers else np.arange(0), args.batch_size)
    progress = tqdm(zip(dealt, numbers, read), total=len(dealt), disable=None if state.is_main_process else True)
    for batch, rows, pixels in progress:
        x_0 = torch.from_numpy(pixels[rows - rows[0]]).permute(0, 3, 1, 2).float() / 127.5 - 1
        with one_thread(state.device):
            bound = variational_bound(
                unet,
                schedule,
                x_0.to(state.device),
                None if labels is None else torch.as_tensor(labels[rows], device=state.device),
                [image_generator(args.seed, number) for number in shards.numbers(batch)],
                scheduler.config.prediction_type,
                getattr(scheduler.config, "variance_type", None) or "fixed_large",
                args.clip_denoised,
            )
        shards.save(batch, {name: value.cpu().numpy() for name, value in vars(bound).items()})
    state.wait_for_everyone()
    if state.is_main_process:
        write_likelihood(shards, schedule)


def labels_of(unet: ADMUNet2DModel, images: ImageSet, unconditional: bool) -> np.ndarray | None:
    """
    What the UNet is told of all images, `(num_images,)`.

    Raises:
        ValueError: If it needs labels, and there are none or others than it knows.
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


def write_likelihood(shards: Shards, schedule: NoiseSchedule) -> None:
    """Puts what was measured of all images together, and prints the bound."""
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
        "terms": "bits a dimension",
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
        f"{figures['bits_per_dim']:.4f}{error} bits a dimension ({figures['num_images']} images, {len(schedule)} steps;"
        f" {figures['prior_bits_per_dim']:.4f} of them for the last timestep): {shards.folder}"
    )
