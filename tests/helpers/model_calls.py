"""Calls that are the same for both models."""

import copy
from collections import Counter

import pytest
import torch
from tiny_models import images, tiny_classifier, tiny_unet

from diffusers_adm.models.blocks import (
    ADMBlock,
)
from diffusers_adm.models.noisy_classifier import POOLS


KINDS = ("unet", *POOLS)
TIMESTEPS = torch.tensor([998, 17])
LABELS = torch.tensor([3, 1])
CPU = torch.device("cpu")
every_model = pytest.mark.parametrize("kind", KINDS)
every_pool = pytest.mark.parametrize("pool", POOLS)


def tiny_model(kind: str, **changes) -> torch.nn.Module:
    """A UNet, or a classifier with the pooling that `kind` names."""
    return tiny_unet(**changes) if kind == "unet" else tiny_classifier(kind, **changes)


def run(model: torch.nn.Module, sample: torch.Tensor, timestep=TIMESTEPS, labels: torch.Tensor = LABELS):
    """The output tensor of either model."""
    if hasattr(model, "class_embedding"):
        return model(sample, timestep, labels).sample
    return model(sample, timestep).logits


@torch.no_grad()
def predict(model: torch.nn.Module, sample: torch.Tensor | None = None, **kwargs) -> torch.Tensor:
    return run(model, images() if sample is None else sample, **kwargs)


def relative_error(value: torch.Tensor, expected: torch.Tensor) -> float:
    return ((value.float() - expected.float()).norm() / expected.float().norm()).item()


def float8_rounded(model: torch.nn.Module) -> torch.nn.Module:
    """Returns a copy whose convolutions and linear layers, except those of embeddings, have values that float8 can represent."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in model.named_modules():
            if isinstance(module, (torch.nn.Conv2d, torch.nn.Linear)) and "embedding" not in name:
                for parameter in module.parameters():
                    parameter.copy_(parameter.to(torch.float8_e4m3fn).float())
    return model


def block_calls(model: torch.nn.Module) -> Counter:
    """A counter that follows how often each block runs."""
    calls = Counter()
    for name, module in model.named_modules():
        if isinstance(module, ADMBlock):
            calls[name] = 0
            # Before the block: a recomputation stops as soon as it has what it needs.
            module.register_forward_pre_hook(lambda *_, name=name: calls.update([name]))
    return calls


OFFLOADS = {
    "block": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "two blocks": {"offload_type": "block_level", "num_blocks_per_group": 2},
    "leaf": {"offload_type": "leaf_level"},
}
