"""What a run would be, without running it."""

import argparse

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch.utils.flop_counter import FlopCounterMode


def print_plan(args: argparse.Namespace, accelerator: Accelerator, model: ModelMixin, num_images: int | None) -> None:
    """Prints size, cost and memory of the run that the options describe."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    forward, activations = measure(model)
    processes = accelerator.num_processes
    batch = args.train_batch_size * args.gradient_accumulation_steps * processes
    # Weights, gradients and Adam's two moments (of one byte each if 8 bit), in float32, and each moving average.
    num_averages = 0 if getattr(args, "offload_ema", False) else len(getattr(args, "ema_decay", ()))
    state = parameters * (4 + 4 + (2 if args.use_8bit_adam else 8) + 4 * num_averages)
    half = accelerator.mixed_precision in ("fp16", "bf16")
    kept = activations * args.train_batch_size * (0.5 if half else 1.0)
    seen = args.max_train_steps * batch
    passes = "" if num_images is None else f", {seen / num_images:.1f} passes over the data"
    lines = {
        "images": "a stream of them" if num_images is None else f"{num_images}",
        "parameters": f"{parameters / 1e6:.2f} million",
        "effective batch": f"{batch} = {args.train_batch_size} images x {args.gradient_accumulation_steps} accumulated"
        f" x {processes} processes",
        "steps": f"{args.max_train_steps}, of {seen} images{passes}",
        "cost": f"{forward / 1e9:.2f} GFLOPs an image forward, about {3 * forward * batch / 1e9:.0f} GFLOPs a step",
        "memory": f"about {state / 2**30:.2f} GiB of weights and optimizer, and {kept / 2**30:.2f} GiB of activations, a"
        f" process{' (before gradient checkpointing)' if args.gradient_checkpointing else ''}",
    }
    for name, line in lines.items():
        accelerator.print(f"{name + ':':<17}{line}")


def measure(model: ModelMixin) -> tuple[int, int]:
    """
    Floating point operations of one image's forward pass (two for a multiplication and its addition), and the bytes of
    what its backward pass needs kept, in float32. Nothing is computed: the model is rebuilt on the meta device.
    """
    config = model.config
    with torch.device("meta"):
        twin = type(model).from_config(config).train()
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
