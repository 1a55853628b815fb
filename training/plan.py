"""Size, cost and memory of a run, estimated before it begins."""

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch.utils.flop_counter import FlopCounterMode

from diffusers_adm.data.datasets import LabelledImages
from diffusers_adm.data.streams import StreamedImages
from diffusers_adm.training.options import OptimisationOptions, TrainingOptions
from diffusers_adm.training.pretrained import add_adapter


def describe_run(
    options: TrainingOptions, accelerator: Accelerator, model: torch.nn.Module, images: LabelledImages | StreamedImages
) -> str:
    """Returns a sentence about a run that begins: its model, images, device and length."""
    optimisation = options.optimisation
    parameters = sum(parameter.numel() for parameter in model.parameters())
    classes = "no classes" if images.class_names is None else f"{len(images.class_names)} classes"
    number = "a stream of images" if images.num_images is None else f"{images.num_images} images"
    batch = images_per_step(optimisation, accelerator)
    length = f"{optimisation.max_train_steps} steps of {batch} images"
    if images.num_images is not None:
        length += f", {optimisation.max_train_steps * batch / images.num_images:.1f} passes over the data"
    return (
        f"Training {type(model).__name__} ({parameters / 1e6:.2f} million parameters) on {number} of {classes}: {length}, on"
        f" {accelerator.num_processes} x {device_name(accelerator)}, precision {accelerator.mixed_precision}."
    )


def images_per_step(optimisation: OptimisationOptions, accelerator: Accelerator) -> int:
    """Returns the number of images per optimizer step of all processes."""
    return optimisation.train_batch_size * optimisation.gradient_accumulation_steps * accelerator.num_processes


def device_name(accelerator: Accelerator) -> str:
    """Returns the name of the device that a process trains on."""
    is_cuda = accelerator.device.type == "cuda"
    return torch.cuda.get_device_name() if is_cuda else accelerator.device.type.upper()


def print_plan(
    options: TrainingOptions,
    accelerator: Accelerator,
    model: ModelMixin,
    num_images: int | None,
    num_averages: int = 0,
    num_evaluations: int = 1,
) -> None:
    """
    Prints size, cost and memory of a run.

    Args:
        options: Options of the run.
        accelerator: Accelerator of the run.
        model: Model to train.
        num_images: Number of training images, or `None` for a stream.
        num_averages: Number of moving averages in the memory of the device.
        num_evaluations: Number of evaluations per image and step that gradients flow through.
    """
    optimisation = options.optimisation
    flops, activations = forward_cost(model)
    twin = twin_of(model)  # the trainer adds the adapter to the model itself
    add_adapter(twin, options.architecture.lora_rank)
    parameters = sum(parameter.numel() for parameter in twin.parameters())
    trained = sum(parameter.numel() for parameter in twin.parameters() if parameter.requires_grad)
    batch_size, accumulated = optimisation.train_batch_size, optimisation.gradient_accumulation_steps
    batch = images_per_step(optimisation, accelerator)
    # Weights are float32. Trained weights also have gradients, Adam's two moments and all moving averages. 8-bit moments take one
    # byte per value.
    state = 4 * parameters + trained * (4 + (2 if optimisation.use_8bit_adam else 8) + 4 * num_averages)
    half = accelerator.mixed_precision in ("fp16", "bf16")
    kept = activations * batch_size * num_evaluations * (0.5 if half else 1.0)
    seen = optimisation.max_train_steps * batch
    passes = "" if num_images is None else f", {seen / num_images:.1f} passes over the data"
    remark = " (before gradient checkpointing)" if options.architecture.gradient_checkpointing else ""
    lines = {
        "images": "a stream" if num_images is None else f"{num_images}",
        "parameters": f"{parameters / 1e6:.2f} million"
        + (f", of which {trained / 1e6:.2f} million are trained" if trained < parameters else ""),
        "effective batch": f"{batch} = {batch_size} images x {accumulated} accumulated x {accelerator.num_processes}"
        " processes",
        "steps": f"{optimisation.max_train_steps}, {seen} images in total{passes}",
        "cost": f"{flops / 1e9:.2f} GFLOPs per image forward, about {3 * flops * batch * num_evaluations / 1e9:.0f} GFLOPs per step",
        "memory": f"about {state / 2**30:.2f} GiB of weights and optimizer, and {kept / 2**30:.2f} GiB of activations,"
        f" per process{remark}",
    }
    for name, line in lines.items():
        accelerator.print(f"{name + ':':<17}{line}")


def twin_of(model: ModelMixin) -> ModelMixin:
    """Returns a copy of a model on the meta device, which stores no weights and computes nothing."""
    with torch.device("meta"):
        return type(model).from_config(model.config).train()


def forward_cost(model: ModelMixin) -> tuple[int, int]:
    """
    Returns the cost of the forward pass per image. It is counted on a copy of the model that computes nothing.

    Returns:
        Number of floating-point operations, and number of bytes of the float32 activations that the backward pass needs. A
        multiplication and an addition count as two operations.
    """
    config, twin = model.config, twin_of(model)
    with torch.device("meta"):
        size = (1, config.in_channels, config.sample_size, config.sample_size)
        arguments = [torch.empty(size), torch.zeros(1, dtype=torch.long)]
        if config.get("num_class_embeds") is not None:
            arguments.append(torch.zeros(1, dtype=torch.long))
        options = {"low_res": torch.empty(size)} if config.get("low_res_conditioning") else {}
    weights = {parameter.untyped_storage()._cdata for parameter in twin.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage
        return tensor

    counter = FlopCounterMode(display=False)
    with counter, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        twin(*arguments, **options)
    return counter.get_total_flops(), sum(storage.nbytes() for storage in kept.values())
