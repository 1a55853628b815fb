"""Conversion of tensors between the names and layouts of this package and those of the original code, in both directions."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch

from diffusers_adm.openai.architecture import PUBLISHED_NORM_GROUPS
from diffusers_adm.openai.flags import PUBLISHED_SIGMA_DATA, PUBLISHED_SIGMA_SCALE


# Modules of this package, and their names in the original code. # is the number of a block, and {next} is the number after it.
_MODULES = [
    (re.compile(ours.replace(".", r"\.").replace("#", r"(\d+)") + r"(?=\.|$)"), published)
    for ours, published in (
        ("time_embedding.mlp.linear_1", "time_embed.0"),
        ("time_embedding.mlp.linear_2", "time_embed.2"),
        ("class_embedding", "label_emb"),
        ("encoder.conv_in", "input_blocks.0.0"),
        ("encoder.down_blocks.#.conv", "input_blocks.{next}.0.op"),
        ("encoder.down_blocks.#.resnet", "input_blocks.{next}.0"),
        ("encoder.down_blocks.#.attention", "input_blocks.{next}.1"),
        ("encoder.mid_blocks.0.resnet", "middle_block.0"),
        ("encoder.mid_blocks.0.attention", "middle_block.1"),
        ("encoder.mid_blocks.1.resnet", "middle_block.2"),
        ("up_blocks.#.resnet", "output_blocks.{number}.0"),
        ("up_blocks.#.attention", "output_blocks.{number}.1"),
        ("up_blocks.#.upsampler", "output_blocks.{number}.{upsampler}"),
        ("norm_out", "out.0"),
        ("conv_out", "out.2"),
        ("pooling.positional_embedding", "out.2.positional_embedding"),
        ("pooling.attn.to_qkv", "out.2.qkv_proj"),
        ("pooling.attn.to_out", "out.2.c_proj"),
        ("pooling.fc", "out.3"),
        ("pooling.fc1", "out.0"),
        ("pooling.norm", "out.1"),
        ("pooling.fc2", "out.{pool_output}"),
    )
]
# Layers of a block, and their names in the original code.
_LAYERS = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
    "attn.to_qkv": "qkv",
    "attn.to_out": "proj_out",
}
# Linear layers that are convolutions with kernels of size 1 in the original code, and the number of the kernel's dimensions.
_KERNEL_DIMS = {"attn.to_qkv.weight": 1, "attn.to_out.weight": 1, "pooling.fc.weight": 2}
_PRECONDITIONED_KERNEL_DIMS = {"attn.to_qkv.weight": 2, "attn.to_out.weight": 2}


def published_names(names: Iterable[str]) -> dict[str, str]:
    """Returns the name of each tensor in the original code, given the names of all tensors of a model."""
    names = set(names)
    published = {}
    for name in sorted(names):
        for pattern, template in _MODULES:
            if match := pattern.match(name):
                number = int(match[1]) if match.lastindex else 0
                prefix = template.format(
                    number=number,
                    next=number + 1,
                    upsampler=2 if f"up_blocks.{number}.attention.norm.weight" in names else 1,
                    pool_output=3 if "pooling.norm.weight" in names else 2,
                )
                layer, _, parameter = name[match.end() :].removeprefix(".").rpartition(".")
                published[name] = ".".join(filter(None, (prefix, _LAYERS.get(layer, layer), parameter)))
                break
    assert len(published) == len(set(published.values())) == len(names)
    return published


def _swap_row_groups(rows: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
    return rows.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2)


def _heads(tensor: torch.Tensor, config: Mapping[str, Any]) -> int:
    return config["num_attention_heads"] or tensor.shape[0] // 3 // config["attention_head_dim"]


def _is_preconditioned(config: Mapping[str, Any]) -> bool:
    return config.get("preconditioning") is not None


def _kernel_dims(name: str, config: Mapping[str, Any]) -> int:
    kernels = _PRECONDITIONED_KERNEL_DIMS if _is_preconditioned(config) else _KERNEL_DIMS
    return next((dims for suffix, dims in kernels.items() if name.endswith(suffix)), 0)


def _is_relaid(name: str, config: Mapping[str, Any], use_new_attention_order: bool) -> bool:
    # The order of this package is (qkv, head, dim), which the original code calls new. The pool and the models of
    # consistency_models, which have preconditioning, always have this order.
    if ".attn.to_qkv." not in name or name.startswith("pooling.") or _is_preconditioned(config):
        return False
    return not use_new_attention_order


def to_published(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any], use_new_attention_order: bool = False
) -> dict[str, torch.Tensor]:
    """
    Converts the tensors of a model to the names and layouts of the original code. The converted tensors are copies.

    Args:
        state_dict: Tensors of a UNet or a classifier of this package.
        config: Config of the same model.
        use_new_attention_order: Value of `--use_new_attention_order` that you will pass to the original code. If true, the rows of
            queries, keys and values are ordered (qkv, head, dim) instead of (head, qkv, dim).

    Raises:
        ValueError: If the original code has no such model.
    """
    options = {"norm_num_groups": PUBLISHED_NORM_GROUPS, "output_scale_factor": 1.0}
    if _is_preconditioned(config):
        options |= {"beta_schedule": None, "sigma_data": PUBLISHED_SIGMA_DATA, "timestep_scale": PUBLISHED_SIGMA_SCALE}
    if "pool" in config:
        options["num_attention_heads"] = None  # the heads of a classifier have a given width
    else:
        options |= {"use_null_class": False, "upsample_type": config["downsample_type"]}
    for option, published in options.items():
        if config.get(option, published) != published:
            raise ValueError(f"`{option}` must be {published}, as in the original code, but got {config[option]}.")
    converted = {}
    for name, published in published_names(state_dict).items():
        tensor = state_dict[name]
        if name.endswith("positional_embedding"):
            tensor = tensor.T
        if _is_relaid(name, config, use_new_attention_order):
            tensor = _swap_row_groups(tensor, 3, _heads(tensor, config))
        tensor = tensor[(...,) + (None,) * _kernel_dims(name, config)]
        shares = tensor.untyped_storage().data_ptr() == state_dict[name].untyped_storage().data_ptr()
        converted[published] = tensor.clone(memory_format=torch.contiguous_format) if shares else tensor
    return converted


def load_published(
    model_class: type[torch.nn.Module],
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    use_new_attention_order: bool = False,
) -> torch.nn.Module:
    """
    Builds a model in eval mode from the tensors of a checkpoint. Tensors are copied only where their layout differs.

    Args:
        model_class: Class of the model.
        config: Arguments of its constructor.
        state_dict: Tensors of the checkpoint.
        use_new_attention_order: Value of the flag of the original code, which decides the layout of tensors, see `to_published`.

    Raises:
        ValueError: If tensors are missing, left over, or have another shape than in the model.
    """
    with torch.device("meta"):
        model = model_class(**config)
    parameters = model.state_dict()
    _check_tensors(state_dict, to_published(parameters, config, use_new_attention_order), model_class.__name__)
    converted = {}
    for name, published in published_names(parameters).items():
        tensor = state_dict[published]
        if name.endswith("positional_embedding"):
            tensor = tensor.T.contiguous()
        if _is_relaid(name, config, use_new_attention_order):
            tensor = _swap_row_groups(tensor, _heads(tensor, config), 3)
        converted[name] = tensor.reshape(parameters[name].shape)
    model.load_state_dict(converted, assign=True)
    return model.eval()


def _check_tensors(
    state_dict: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], class_name: str
) -> None:
    faults = {
        "missing": [name for name in expected if name not in state_dict],
        "left over": [name for name in state_dict if name not in expected],
        "of another shape": [
            f"{name} {tuple(state_dict[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in expected.items()
            if name in state_dict and state_dict[name].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        listing = "; ".join(f"{fault}: {', '.join(names)}" for fault, names in faults.items() if names)
        raise ValueError(f"The checkpoint must fit a {class_name} of the original code, but does not: {listing}.")
