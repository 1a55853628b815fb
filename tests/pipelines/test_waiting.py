"""Copies and waits of a step. On an accelerator, each copy from the CPU and each value that is read back waits.

Models on the meta device stand for an accelerator: a value cannot be read from it at all, and copies to it are counted.
"""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from tiny_models import SIZE, tiny_pipeline, tiny_scheduler, tiny_unet
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


STEPS = 4


class Copies(TorchDispatchMode):
    """Counts the operations that move a tensor from the CPU to the meta device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        sources = [argument for argument in args if isinstance(argument, torch.Tensor) and argument.numel() > 1]
        if isinstance(result, torch.Tensor) and result.is_meta and any(not source.is_meta for source in sources):
            self.count += 1
        return result


class Constructions(TorchFunctionMode):
    """Counts the tensors that are made on the meta device from Python numbers, which is a copy too."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in (torch.tensor, torch.as_tensor, torch.Tensor.new_tensor) and result.is_meta:
            self.count += not isinstance(args[-1], torch.Tensor)
        return result


class EndOfRun(Exception):
    """Raised after the last step, because the images are read next."""


def copies_per_step(pipeline, **call) -> list[int]:
    """Returns how many copies each step has made."""
    copies, constructions, counts = Copies(), Constructions(), []

    def count(called, step, timestep, tensors):
        counts.append(copies.count + constructions.count)
        if step + 1 == STEPS:
            raise EndOfRun
        return tensors

    with copies, constructions, pytest.raises(EndOfRun):
        pipeline([1, 3], num_inference_steps=STEPS, callback_on_step_end=count, **call)
    return [after - before for before, after in zip([counts[0], *counts], counts)]


def on_meta(scheduler_class: type):
    unet = tiny_unet(use_null_class=True)
    pipeline = tiny_pipeline(unet, tiny_scheduler(scheduler_class)).to("meta")
    assert pipeline._execution_device.type == "meta"
    return pipeline


@pytest.mark.parametrize("scheduler_class", [DDPMScheduler, DDIMScheduler])
@pytest.mark.parametrize(
    "call",
    [
        {"guidance_scale": 0.0},
        {"guidance_scale": 2.0},
        {"guidance_scale": [0.0, 2.0]},
        {"guidance_scale": torch.tensor([1.0, 2.0]), "cfg_weight": [0.5, 1.5]},
        {"guidance_scale": 1.0, "guidance_options": {"every": 2, "normalize": True, "max_size": 1.0}},
        {"guidance_scale": 1.0, "guidance_fn": lambda x_t, timestep, x_0, labels: -x_0.square().sum(dim=(1, 2, 3))},
    ],
    ids=["unguided", "guided", "one guided", "per image", "options", "function"],
)
def test_step_copies_nothing_and_reads_nothing_back(scheduler_class, call):
    assert copies_per_step(on_meta(scheduler_class), **call) == [0] * STEPS


def test_copies_are_counted():
    """The noise of a generator on the CPU, which makes a seed an image on every device, is one copy per step."""
    generator = torch.Generator().manual_seed(0)
    assert copies_per_step(on_meta(DDPMScheduler), guidance_scale=0.0, generator=generator) == [0, 1, 1, 0]
    latents = torch.zeros(2, 3, SIZE, SIZE)
    hooks = {"callback_on_step_start": lambda *_: {"latents": latents.to("meta")}}
    assert copies_per_step(on_meta(DDIMScheduler), guidance_scale=0.0, **hooks) == [0, 1, 1, 1]


def test_inversion_copies_nothing_and_reads_nothing_back_in_a_step():
    pipeline, copies, counts = on_meta(DDIMScheduler), Copies(), []
    pipeline.unet.register_forward_pre_hook(lambda *_: counts.append(copies.count))
    with copies, pytest.raises(NotImplementedError, match="meta"):  # the result is read at the end
        pipeline.invert(torch.zeros(2, 3, SIZE, SIZE), [1, 3], num_inference_steps=STEPS)
    assert len(counts) == STEPS and counts == counts[:1] * STEPS
