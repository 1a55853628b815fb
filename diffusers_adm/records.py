"""Records of what a run used: values as JSON, and hashes of weights."""

import hashlib
import json
import math

import torch
from diffusers import ConfigMixin


def weights_digest(modules: dict[str, torch.nn.Module | None]) -> str:
    """Returns a hash of all weights, and of the configs of models, because a config too decides what a model computes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in sorted(modules.items()):
        if isinstance(module, torch.nn.Module):
            if isinstance(module, ConfigMixin):
                config = {key: value for key, value in module.config.items() if not key.startswith("_")}
                digest.update(json.dumps(as_record(config), sort_keys=True).encode())
            for key, tensor in module.state_dict().items():
                digest.update(f"{name}.{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def as_record(value):
    """Converts a value to types of JSON. Numbers that are not finite become strings, because JSON does not support them."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {key: as_record(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_record(entry) for entry in value]
    if value is None or isinstance(value, (bool, int, str)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    return str(value)
