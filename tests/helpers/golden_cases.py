"""Recorded values of the original code (openai/guided-diffusion at 22e0df8) on small random models.

`golden/<case>/case.json` holds its flags and seeds, `io.npz` the recorded numbers. Weights are drawn anew from the seed.
"""

import gzip
import json
from pathlib import Path

import numpy as np
import torch

from diffusers_adm import ADMUNet2DModel, NoisyClassifier


GOLDEN = Path(__file__).parent.parent / "golden"
# Each released checkpoint's flags and tensors, recorded from the published code.
RELEASED = json.loads(gzip.decompress((GOLDEN / "released.json.gz").read_bytes()))
# And those of other repositories of the family.
FAMILY = json.loads(gzip.decompress((GOLDEN / "family.json.gz").read_bytes()))


def meta_state_dict(file: str) -> dict[str, torch.Tensor]:
    """Returns the tensors of a released checkpoint without their values."""
    return {name: torch.empty(shape, device="meta") for name, shape in (RELEASED | FAMILY)[file]["parameters"]}


def load_case(name: str) -> tuple[dict, dict[str, torch.Tensor]]:
    """Returns the description of a case, and its recorded tensors."""
    case = json.loads((GOLDEN / name / "case.json").read_text())
    with np.load(GOLDEN / name / "io.npz") as arrays:
        return case, {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def draw_weights(case: dict) -> dict[str, torch.Tensor]:
    """Returns the published state dict of a case. The seed gives weights of unit gain, norms near 1 and biases near 0."""
    generator = torch.Generator().manual_seed(case["weights_seed"])
    state_dict = {}
    for name, shape in case["parameters"]:
        value = torch.randn(shape, generator=generator)
        if value.ndim >= 2:
            value = value / value[0].numel() ** 0.5
        elif name.endswith("weight"):
            value = 1 + 0.1 * value
        else:
            value = 0.1 * value
        state_dict[name] = value
    total = sum(value.double().sum().item() for value in state_dict.values())
    assert abs(total - case["weights_sum"]) < 1e-6, "the weights were not drawn as recorded"
    return state_dict


def published_flags(case: dict) -> str:
    """Returns the flags of a case as one command line."""
    return " ".join(f"--{name} {value}" for name, value in case["flags"].items())


UNET_CASES = ("unet_class_conditional", "unet_unconditional_plain", "upsampler", "difface_unet")
CLASSIFIER_CASES = ("classifier_attention", "classifier_adaptive", "classifier_spatial", "classifier_spatial_v2")


def model_class(case):
    return NoisyClassifier if case in CLASSIFIER_CASES else ADMUNet2DModel


def load(case, *extra_flags):
    description, _ = load_case(case)
    flags = " ".join([published_flags(description), *extra_flags])
    return model_class(case).from_openai(draw_weights(description), flags)
