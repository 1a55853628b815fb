"""Setup of a run from its options: processes, images, model, optimizer and loaders."""

import os
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.tracking import get_available_trackers
from accelerate.utils import DataLoaderConfiguration, DistributedType, GradientAccumulationPlugin, set_seed
from diffusers import ModelMixin
from diffusers.models.attention_dispatch import attention_backend
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.data.datasets import LabelledImages, load_images
from diffusers_adm.data.options import ImageFormat
from diffusers_adm.data.streams import StreamedImages
from diffusers_adm.launch import join_processes
from diffusers_adm.quiet import without_warning
from diffusers_adm.training.options import (
    ArchitectureOptions,
    OptimisationOptions,
    TrainingOptions,
    UNetTrainingOptions,
)
from diffusers_adm.training.stopping import leave_signals_to_the_trainer


logger = get_logger(__name__)


def set_up_accelerator(options: TrainingOptions) -> Accelerator:
    """
    Joins the processes, divides the batch among them, and seeds them. Call it before any code that draws random numbers.

    Raises:
        ValueError: If the processes cannot be joined, `total_batch_size` cannot be divided among them, the launcher would divide
            the weights among them, or the tracker is not installed.
    """
    optimisation, tracker = options.optimisation, options.output.report_to
    trackers = [str(available) for available in get_available_trackers()]
    if tracker is not None and tracker not in (*trackers, "all"):
        raise ValueError(
            f"--report_to {tracker} is not installed. Installed trackers: {', '.join(trackers) or 'none'}."
        )
    divide_batch(optimisation, join_processes().num_processes)
    if optimisation.allow_tf32:
        torch.backends.cuda.matmul.allow_tf32 = True
        torch.backends.cudnn.allow_tf32 = True
    accelerator = Accelerator(
        mixed_precision=optimisation.mixed_precision,
        # Accumulation continues across the end of an epoch, because the gradient of a step of fewer batches would be too small.
        gradient_accumulation_plugin=GradientAccumulationPlugin(
            num_steps=optimisation.gradient_accumulation_steps, sync_with_dataloader=False
        ),
        log_with=options.output.report_to,
        project_dir=options.output.output_dir,
        step_scheduler_with_optimizer=False,
        dataloader_config=DataLoaderConfiguration(
            use_seedable_sampler=True, data_seed=optimisation.seed, non_blocking=True
        ),
        dynamo_backend="inductor" if optimisation.compile else None,
    )
    check_distribution(accelerator.distributed_type)
    set_seed(optimisation.seed, device_specific=True)
    return accelerator


def divide_batch(optimisation: OptimisationOptions, num_processes: int) -> None:
    """
    Sets `gradient_accumulation_steps` as `total_batch_size` implies. Warns if another number was given.

    Raises:
        ValueError: If the total is not a multiple of the batch size of all processes.
    """
    total = optimisation.total_batch_size
    if total is None:
        return
    at_once = optimisation.train_batch_size * num_processes
    if total < at_once or total % at_once:
        raise ValueError(
            f"--total_batch_size must be a multiple of {at_once}, which is --train_batch_size times the number of processes,"
            f" but got {total}."
        )
    given, steps = optimisation.gradient_accumulation_steps, total // at_once
    if given not in (1, steps):
        logger.warning(
            "--gradient_accumulation_steps is %d instead of %d, because of --total_batch_size %d.", steps, given, total
        )
    optimisation.gradient_accumulation_steps = steps


def check_distribution(distributed_type: DistributedType) -> None:
    """Raises a `ValueError` if weights would be divided among processes. Averages and checkpoints do not support that."""
    if distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise ValueError(
            f"{distributed_type.value} is not supported, because it divides the weights among processes. Launch with --multi_gpu,"
            " and save memory with --gradient_checkpointing, --offload_ema and --use_8bit_adam."
        )


def load_training_images(
    options: TrainingOptions, labelled: bool = True
) -> tuple[LabelledImages | StreamedImages, LabelledImages | None]:
    """Loads training images and held-out images, see `load_images`."""
    seed = options.optimisation.seed
    return load_images(options.source, options.format, options.selection, seed=seed, labelled=labelled)


def resolve_steps(optimisation: OptimisationOptions, num_images: int | None, num_processes: int) -> None:
    """
    Sets `max_train_steps` as `num_epochs` implies.

    Raises:
        ValueError: If the number of images is not known, or there are too few for one step.
    """
    if optimisation.num_epochs is None:
        return
    if num_images is None:
        raise ValueError(
            "--num_epochs is not supported with --streaming, because the number of images is not known. Pass --max_train_steps."
        )
    check_number_of_images(optimisation.train_batch_size, num_images, num_processes)
    batches = optimisation.num_epochs * (num_images // (optimisation.train_batch_size * num_processes))
    optimisation.max_train_steps = batches // optimisation.gradient_accumulation_steps
    if not optimisation.max_train_steps:
        raise ValueError(
            f"--num_epochs {optimisation.num_epochs} has only {batches} batches, but a step takes"
            f" {optimisation.gradient_accumulation_steps}. Pass more epochs, or smaller steps."
        )


def check_number_of_images(batch_size: int, num_images: int | None, num_processes: int) -> None:
    """Raises a `ValueError` if there are too few images for one batch per process. A stream has no known number of images."""
    if num_images is not None and num_images < batch_size * num_processes:
        raise ValueError(
            f"--train_batch_size {batch_size} on {num_processes} processes requires at least {batch_size * num_processes} images,"
            f" but got {num_images}. Pass a smaller --train_batch_size, and --total_batch_size."
        )


def warn_of_lost_brightness(model: ModelMixin) -> None:
    """Warns if the last normalisation of a UNet takes away the mean of each channel, and with it the brightness of images."""
    if not isinstance(model, ADMUNet2DModel):
        return
    norm = model.norm_out
    if norm.num_groups == norm.num_channels > 1:
        logger.warning(
            "Each of the UNet's %d channels is a group of the normalisation, so that the UNet hardly learns how bright images are. Pass a"
            " smaller --norm_num_groups, such as %d.",
            norm.num_channels,
            max(1, norm.num_channels // 4),
        )


def model_config(architecture: ArchitectureOptions, format: ImageFormat) -> dict[str, Any]:
    """Returns the entries of a model's config that UNets and classifiers share."""
    return {
        "sample_size": format.resolution,
        "in_channels": format.in_channels,
        "model_channels": architecture.model_channels,
        "channel_mult": architecture.channel_mult,
        "layers_per_block": architecture.layers_per_block,
        "attention_resolutions": architecture.attention_resolutions,
        "attention_head_dim": None if architecture.num_attention_heads else architecture.attention_head_dim,
        "num_attention_heads": architecture.num_attention_heads,
        "norm_num_groups": architecture.norm_num_groups,
        "resnet_time_scale_shift": architecture.resnet_time_scale_shift,
        "downsample_type": architecture.resample_type,
        "output_scale_factor": architecture.output_scale_factor,
        "dropout": architecture.dropout,
        "timestep_scale": architecture.timestep_scale,
    }


def build_unet(
    options: UNetTrainingOptions, num_classes: int | None, low_res_conditioning: bool = False
) -> ADMUNet2DModel:
    """Builds the UNet of the options with random weights."""
    return ADMUNet2DModel(
        out_channels=options.format.in_channels * (2 if options.objective.learn_sigma else 1),
        num_class_embeds=num_classes,
        use_null_class=options.classes.label_dropout > 0,
        low_res_conditioning=low_res_conditioning,
        upsample_type=options.architecture.resample_type,
        preconditioning=options.noise_levels.preconditioning,
        sigma_data=options.noise_levels.sigma_data,
        sigma_min=options.noise_levels.sigma_min,
        sigma_max=options.noise_levels.sigma_max,
        **model_config(options.architecture, options.format),
    )


def prepare_model(model: ModelMixin, options: TrainingOptions, accelerator: Accelerator) -> None:
    """Sets the gradient checkpointing, memory format and attention backend of a model."""
    if options.architecture.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if options.optimisation.channels_last:
        model.to(memory_format=torch.channels_last)
    on_cpu = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16"
    if on_cpu and "DIFFUSERS_ATTN_BACKEND" not in os.environ:
        # The backward pass of torch's fused attention takes four times as long on the CPU in bfloat16.
        # The context restores the backend of all other models, which `set_attention_backend` changes too.
        with attention_backend(), without_warning("Attention backends are an experimental feature"):
            model.set_attention_backend("_native_math")


def build_optimizer(model: torch.nn.Module, options: OptimisationOptions, scaled: bool) -> torch.optim.Optimizer:
    """
    Builds AdamW for a model.

    Args:
        model: Model to train.
        options: Settings of the optimizer.
        scaled: Whether the loss is scaled, which fp16 needs.

    Raises:
        ValueError: If `use_8bit_adam` is set and bitsandbytes is not installed.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = {
        "lr": options.learning_rate,
        "betas": (options.adam_beta1, options.adam_beta2),
        "weight_decay": options.adam_weight_decay,
        "eps": options.adam_epsilon,
    }
    if options.use_8bit_adam:
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise ValueError("--use_8bit_adam requires bitsandbytes. Run: pip install bitsandbytes") from error
        return AdamW8bit(parameters, **settings)
    # With loss scaling, the fused kernel skips steps without reporting it, so averages and learning rate would still move.
    return torch.optim.AdamW(parameters, fused=not scaled, **settings)


def build_lr_scheduler(
    optimizer: torch.optim.Optimizer, options: OptimisationOptions
) -> torch.optim.lr_scheduler.LambdaLR:
    """Builds the learning rate schedule of diffusers. Each begins with `lr_warmup_steps`."""
    # The schedule that diffusers calls constant has no warm-up.
    name = "constant_with_warmup" if options.lr_scheduler == "constant" else options.lr_scheduler
    steps = {"num_warmup_steps": options.lr_warmup_steps, "num_training_steps": options.max_train_steps}
    return get_scheduler(name, optimizer, **steps)


def build_loader(
    images: LabelledImages | StreamedImages, options: TrainingOptions, accelerator: Accelerator
) -> DataLoader:
    """Builds the loader of the training images."""
    streaming = isinstance(images, StreamedImages)
    loader = DataLoader(
        images,
        batch_size=options.optimisation.train_batch_size,
        shuffle=None if streaming else True,
        drop_last=True,
        num_workers=options.selection.dataloader_num_workers,
        worker_init_fn=leave_signals_to_the_trainer,
        pin_memory=accelerator.device.type == "cuda",
        # Each pass draws a seed for the workers. A separate generator keeps the random numbers of the model independent of the
        # number of passes.
        generator=torch.Generator(),
    )
    # A stream is already divided among the processes.
    return loader if streaming else accelerator.prepare(loader)


def build_validation_loader(
    held_out: LabelledImages, options: TrainingOptions, accelerator: Accelerator
) -> DataLoader:
    """Builds the loader of the held-out images."""
    loader = DataLoader(
        held_out,
        batch_size=options.optimisation.train_batch_size,
        num_workers=options.selection.dataloader_num_workers,
        worker_init_fn=leave_signals_to_the_trainer,
        generator=torch.Generator(),
    )
    return accelerator.prepare(loader)
