"""Checkpoints of the published implementation (openai/guided-diffusion), to and fro.

A model is described by the shapes of its tensors; the flags of the published command line are checked against them, and
tell only what shapes cannot.
"""

import math
import re
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffusers_adm.openai.flags import Checkpoint, Flags, released_preset, resolve_flags


NORM_NUM_GROUPS = 32  # fixed in the published code


# --- Files ---


def read_state_dict(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """
    The tensors of a checkpoint. Those of a file are mapped into memory, and read when they are used; no code in it is
    run.

    Args:
        checkpoint: Path of a file that `torch.save` wrote, or a state dict.

    Raises:
        ValueError: If the file is missing, damaged, or holds anything but tensors by name.
    """
    if isinstance(checkpoint, Mapping):
        source, content = "The state dict", checkpoint
    else:
        path = Path(checkpoint)
        source = f"The file {str(path)!r}"
        if not path.is_file():
            preset = released_preset(path)
            raise ValueError(f"{source} does not exist." + (f" It is to be had at {preset.url}" if preset else ""))
        try:
            # Only the zip format, which torch has written since 1.6, can be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # a damaged file raises errors of a dozen types
            raise ValueError(
                f"{source} cannot be read as a checkpoint of tensors: it is damaged or incomplete, or holds code or"
                " objects, which are not loaded."
            ) from error
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{source} holds no state dict (tensors by name), but {type(content).__name__}.")
    for name, tensor in content.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{source} holds {kind} under {name!r}; only floating-point tensors by name are allowed.")
    return {name: tensor.detach() for name, tensor in content.items()}


# --- Shapes ---


class _Shapes(dict):
    def size(self, name: str, dim: int) -> int:
        if len(self.get(name, ())) <= dim:
            raise ValueError(f"The checkpoint lacks the tensor {name!r} as every published one has it.")
        return self[name][dim]


def _read_shapes(state_dict: Mapping[str, torch.Tensor], model: str) -> _Shapes:
    shapes = _Shapes((name, tuple(tensor.shape)) for name, tensor in state_dict.items())
    for name in ("time_embed.0.weight", "input_blocks.0.0.weight", "input_blocks.1.0.emb_layers.1.weight"):
        shapes.size(name, 1)  # of what is no published model at all, the first missing tensor says most
    found = "UNet" if any(name.startswith("output_blocks.") for name in shapes) else "classifier"
    if found != model:
        raise ValueError(f"The checkpoint is a {found}'s, not a {model}'s, as its output_blocks or lack of them tell.")
    return shapes


class _EncoderLayout(NamedTuple):
    channels: tuple[int, ...]  # of each level
    layers_per_block: int
    attended: tuple[bool, ...]  # for each level, whether it has attention
    downsample_type: str | None  # None: there is one level only


def _encoder_layouts(shapes: _Shapes) -> list[_EncoderLayout]:
    """
    All divisions of the encoder's blocks into levels that the shapes allow. A residual block that ends a level by
    halving height and width has the shapes of any other; but it is never followed by attention, and channels change
    behind it only.
    """
    blocks = {int(name.split(".")[1]) for name in shapes if re.match(r"input_blocks\.\d+\.", name)}
    convs = {index for index in blocks if f"input_blocks.{index}.0.op.weight" in shapes}
    attended = {int(name.split(".")[1]) for name in shapes if re.match(r"input_blocks\.\d+\.1\.", name)}
    total = max(blocks, default=0) + 1  # with the first convolution; a level takes its blocks and one more
    channels = {}
    for index in range(1, total):
        layer = "op" if index in convs else "out_layers.3"
        channels[index] = shapes.size(f"input_blocks.{index}.0.{layer}.weight", 0)

    layouts = []
    for length in (number for number in range(2, total + 1) if total % number == 0):
        starts = range(0, total, length)
        downs = set(starts[1:])
        widths = [{channels[i] for i in range(start + 1, min(start + length + 1, total))} for start in starts]
        attention = [{i in attended for i in range(start + 1, start + length)} for start in starts]
        uniform = all(len(values) == 1 for values in (*widths, *attention))
        if uniform and not downs & attended and convs in (set(), downs):
            layouts.append(
                _EncoderLayout(
                    channels=tuple(values.pop() for values in widths),
                    layers_per_block=length - 1,
                    attended=tuple(values.pop() for values in attention),
                    downsample_type=("conv" if convs else "resnet") if downs else None,
                )
            )
    if not layouts:
        raise ValueError("The checkpoint's input_blocks do not divide into levels of one width and kind each.")
    return layouts


def _multiplier(channels: int, width: int) -> float:
    multiplier = channels / width
    if int(multiplier * width) < channels:  # models round down, and the quotient may fall just short
        multiplier = math.nextafter(multiplier, math.inf)
    return int(multiplier) if multiplier.is_integer() else multiplier


def _check_flags(flags: Flags, held: dict[str, Any]) -> None:
    def text(value: Any) -> str:
        return ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)

    contradictions = [
        f"--{name} {text(flags[name])} was given, the checkpoint holds {text(value) or 'none'}"
        for name, value in held.items()
        if name in flags and flags[name] != value
    ]
    if contradictions:
        raise ValueError(f"The flags contradict the checkpoint: {'; '.join(contradictions)}.")


def _encoder_config(
    shapes: _Shapes, flags: Flags, layout: _EncoderLayout, sample_size: int, flag_names: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The part of the config that UNet and classifier share, and what the checkpoint holds of the flags behind it."""
    width_flag, depth_flag, attention_flag, norm_flag, updown_flag = flag_names
    width = shapes.size("time_embed.0.weight", 1)
    scale_shift = shapes.size("input_blocks.1.0.emb_layers.1.weight", 0) == 2 * layout.channels[0]
    downsample_type = layout.downsample_type or ("resnet" if flags[updown_flag] else "conv")
    config = {
        "sample_size": sample_size,
        "model_channels": width,
        "channel_mult": tuple(_multiplier(channels, width) for channels in layout.channels),
        "layers_per_block": layout.layers_per_block,
        "attention_resolutions": tuple(sample_size >> level for level, has in enumerate(layout.attended) if has),
        "norm_num_groups": NORM_NUM_GROUPS,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "downsample_type": downsample_type,
    }
    held = {
        width_flag: width,
        depth_flag: layout.layers_per_block,
        norm_flag: scale_shift,
        updown_flag: downsample_type == "resnet",
    }
    # Other multipliers may round to the same widths, and resolutions that no level has are without effect.
    if tuple(int(mult * width) for mult in flags["channel_mult"]) not in ((), layout.channels):
        held["channel_mult"] = config["channel_mult"]
    rates = [sample_size // resolution if resolution > 0 else 0 for resolution in flags[attention_flag]]
    if tuple(2**level in rates for level in range(len(layout.attended))) != layout.attended:
        held[attention_flag] = config["attention_resolutions"]
    return config, held


def unet_config(state_dict: Mapping[str, torch.Tensor], flags: Flags) -> dict[str, Any]:
    """
    The config of a published UNet: from its shapes where they tell it, else from flags.

    Raises:
        ValueError: If the tensors are not a published UNet's, or contradict the flags that are given.
    """
    shapes = _read_shapes(state_dict, "UNet")
    upsamplers = {
        match[1]: "conv" if match[2] == "conv" else "resnet"
        for name in shapes
        if (match := re.match(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers)\.", name))
    }
    levels = 1 + len(upsamplers)
    layouts = [layout for layout in _encoder_layouts(shapes) if len(layout.channels) == levels]
    if not layouts:
        raise ValueError(f"The checkpoint's output_blocks have {levels} levels, which its input_blocks cannot have.")

    # An encoder's input is an image alone, or with a low-resolution one beside it; images have one channel or three.
    encoder_channels, out_channels = shapes.size("input_blocks.0.0.weight", 1), shapes.size("out.2.weight", 0)
    inputs = [(encoder_channels, False)]
    if encoder_channels % 2 == 0:
        inputs.append((encoder_channels // 2, True))
    inputs = [(channels, low_res) for channels, low_res in inputs if out_channels in (channels, 2 * channels)]
    if not inputs:
        raise ValueError(f"The checkpoint turns {encoder_channels} channels into {out_channels}, as no UNet does.")
    in_channels, low_res = max(inputs, key=lambda channels_low_res: channels_low_res[0] in (1, 3))

    size_flag = "large_size" if low_res and ("large_size" in flags or "image_size" not in flags) else "image_size"
    config, held = _encoder_config(
        shapes,
        flags,
        layouts[0],
        flags[size_flag],
        ("num_channels", "num_res_blocks", "attention_resolutions", "use_scale_shift_norm", "resblock_updown"),
    )
    classes = shapes.size("label_emb.weight", 0) if "label_emb.weight" in shapes else None
    held |= {"class_cond": classes is not None, "learn_sigma": out_channels == 2 * in_channels}
    if not low_res:
        held |= {"large_size": "no low-resolution input", "small_size": "no low-resolution input"}
    _check_flags(flags, held)
    by_width = flags["num_head_channels"] != -1
    return config | {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "attention_head_dim": flags["num_head_channels"] if by_width else None,
        "num_attention_heads": None if by_width else flags["num_heads"],
        "num_class_embeds": classes,
        "low_res_conditioning": low_res,
        "dropout": flags["dropout"],
        "upsample_type": next(iter(upsamplers.values()), config["downsample_type"]),
    }


def is_upsampler(checkpoint: Checkpoint, flags: str | None) -> bool:
    """
    Whether a published UNet takes a low-resolution image.

    Raises:
        ValueError: If the checkpoint is not a published UNet's, or the flags contradict it.
    """
    return unet_config(read_state_dict(checkpoint), resolve_flags(checkpoint, flags))["low_res_conditioning"]


def classifier_config(state_dict: Mapping[str, torch.Tensor], flags: Flags) -> dict[str, Any]:
    """
    The config of a published classifier: from its shapes where they tell it, else from flags.

    Raises:
        ValueError: If the tensors are not a published classifier's, or contradict the flags that are given.
    """
    shapes = _read_shapes(state_dict, "classifier")
    layouts = _encoder_layouts(shapes)
    pool_size = None
    if "out.2.qkv_proj.weight" in shapes or "out.2.positional_embedding" in shapes:
        pool, last_layer = "attention", "out.2.c_proj"
        pool_size = math.isqrt(shapes.size("out.2.positional_embedding", 1) - 1)
    elif shapes.size("out.0.weight", 0) and len(shapes["out.0.weight"]) == 1:
        pool, last_layer = "adaptive", "out.3"
    elif "out.1.weight" in shapes:
        pool, last_layer = "spatial_v2", "out.3"
    else:
        pool, last_layer = "spatial", "out.2"

    # Where shapes allow several divisions into levels, the flags decide: the number of levels, then their depth.
    def agrees(layout: _EncoderLayout) -> bool:
        levels = len(layout.channels)
        return len(flags["channel_mult"]) in (0, levels) and (
            pool_size is None or "image_size" not in flags or flags["image_size"] == pool_size * 2 ** (levels - 1)
        )

    layouts = [layout for layout in layouts if agrees(layout)] or layouts
    if len(layouts) > 1:
        depths = [layout.layers_per_block for layout in layouts]
        layouts = [layout for layout in layouts if layout.layers_per_block == flags["classifier_depth"]]
        if not layouts:
            raise ValueError(
                f"--classifier_depth {flags['classifier_depth']} does not fit the checkpoint, whose shapes allow"
                f" {depths}: give one of these."
            )
    layout = layouts[0]

    sample_size = flags["image_size"] if pool_size is None else pool_size * 2 ** (len(layout.channels) - 1)
    config, held = _encoder_config(
        shapes,
        flags,
        layout,
        sample_size,
        (
            "classifier_width",
            "classifier_depth",
            "classifier_attention_resolutions",
            "classifier_use_scale_shift_norm",
            "classifier_resblock_updown",
        ),
    )
    num_classes = shapes.size(f"{last_layer}.weight", 0)
    _check_flags(
        flags,
        held | {"image_size": sample_size, "classifier_pool": pool, "classifier_out_channels": num_classes},
    )
    return config | {
        "in_channels": shapes.size("input_blocks.0.0.weight", 1),
        "num_classes": num_classes,
        "pool": pool,
        "attention_head_dim": flags["classifier_num_head_channels"],
        "num_attention_heads": None,
        "dropout": 0.0,
    }


# --- Names and layouts of tensors ---

# Our modules and the published ones; # is a block's number, {next} the number behind it.
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
# Inside a block.
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
# Linear layers of ours that are published as convolutions with a kernel of one, and its dimensions.
_KERNEL_DIMS = {"attn.to_qkv.weight": 1, "attn.to_out.weight": 1, "pooling.fc.weight": 2}


def published_names(names: Iterable[str]) -> dict[str, str]:
    """The published name of every tensor of a model of ours, given the names of all."""
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


def _kernel_dims(name: str) -> int:
    return next((dims for suffix, dims in _KERNEL_DIMS.items() if name.endswith(suffix)), 0)


def _is_relaid(name: str, use_new_attention_order: bool) -> bool:
    # Ours is (qkv, head, dim), which the published code calls the new order; only the pool always has it.
    return ".attn.to_qkv." in name and not name.startswith("pooling.") and not use_new_attention_order


def to_published(
    state_dict: Mapping[str, torch.Tensor], config: Mapping[str, Any], use_new_attention_order: bool = False
) -> dict[str, torch.Tensor]:
    """
    A model's tensors under their published names and in their published layout.

    Args:
        state_dict: Of a UNet or a classifier of ours.
        config: Of the same model.
        use_new_attention_order: The flag that the tensors are meant for: whether the rows of queries, keys and values
            are ordered (qkv, head, dim) instead of (head, qkv, dim).

    Raises:
        ValueError: If the published code has no such model.
    """
    for option, published in (("norm_num_groups", NORM_NUM_GROUPS), ("output_scale_factor", 1.0)):
        if config.get(option, published) != published:
            raise ValueError(f"{option}={config[option]}: the published code knows {published} alone.")
    converted = {}
    for name, published in published_names(state_dict).items():
        tensor = state_dict[name]
        if name.endswith("positional_embedding"):
            tensor = tensor.T.contiguous()
        if _is_relaid(name, use_new_attention_order):
            tensor = _swap_row_groups(tensor, 3, _heads(tensor, config))
        converted[published] = tensor[(...,) + (None,) * _kernel_dims(name)]
    return converted


def load_published(
    model_class: type[torch.nn.Module],
    config: Mapping[str, Any],
    state_dict: Mapping[str, torch.Tensor],
    use_new_attention_order: bool = False,
) -> torch.nn.Module:
    """
    Builds a model around published tensors, which are taken over without a copy wherever their layout is ours.

    Args:
        model_class: Class of the model.
        config: Its arguments.
        state_dict: The published tensors.
        use_new_attention_order: As in `to_published`.

    Raises:
        ValueError: If tensors are missing, left over, or of another shape than the model's.
    """
    with torch.device("meta"):
        model = model_class(**config)
    parameters = model.state_dict()
    expected = to_published(parameters, config, use_new_attention_order)
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
        raise ValueError(f"The checkpoint is not that of a published {model_class.__name__}: {listing}.")

    converted = {}
    for name, published in published_names(parameters).items():
        tensor = state_dict[published]
        if name.endswith("positional_embedding"):
            tensor = tensor.T.contiguous()
        if _is_relaid(name, use_new_attention_order):
            tensor = _swap_row_groups(tensor, _heads(tensor, config), 3)
        converted[name] = tensor.reshape(parameters[name].shape)
    model.load_state_dict(converted, assign=True)
    return model.eval()
