"""Inference of the architecture of a model of the original code from the shapes of its tensors.

Most of an architecture follows from the shapes. The flags determine the rest, and are checked against the shapes.
"""

import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from diffusers_adm.choices import BETA_SCHEDULES
from diffusers_adm.openai.flags import Flags, check_timestep_scale, preconditioning_config


PUBLISHED_NORM_GROUPS = 32  # fixed in the original code


class Shapes(dict):
    """Shapes of a checkpoint's tensors by name."""

    def size(self, name: str, dim: int) -> int:
        """
        Returns one dimension of a tensor.

        Raises:
            ValueError: If the tensor or the dimension does not exist.
        """
        if len(self.get(name, ())) <= dim:
            raise ValueError(f"The checkpoint must be of the original code, but it lacks the tensor {name!r}.")
        return self[name][dim]

    @property
    def preconditioned(self) -> bool:
        """Whether the model is of consistency_models. Only its attention layers are convolutions in two dimensions."""
        return len(self.get("middle_block.1.qkv.weight", ())) == 4

    @property
    def network(self) -> str:
        """Kind of network: "UNet" or "classifier". Only a UNet has a decoder."""
        return "UNet" if any(name.startswith("output_blocks.") for name in self) else "classifier"


def read_shapes(state_dict: Mapping[str, torch.Tensor]) -> Shapes:
    """
    Returns the shapes of a model of the original code.

    Raises:
        ValueError: If the tensors are not those of a model of the original code.
    """
    shapes = Shapes((name, tuple(tensor.shape)) for name, tensor in state_dict.items())
    # These are checked first, because the first missing tensor tells most about a file of another model.
    for name in ("time_embed.0.weight", "input_blocks.0.0.weight", "input_blocks.1.0.emb_layers.1.weight"):
        shapes.size(name, 1)
    return shapes


# --- Encoder ---


class _EncoderLayout(NamedTuple):
    channels: tuple[int, ...]  # per level
    layers_per_block: int | tuple[int, ...]
    attended: tuple[bool, ...]  # per level, whether it has attention
    downsample_type: str | None  # None for a single level


def _level_starts(total: int, depths: int | tuple[int, ...]) -> list[list[int]]:
    """
    Returns the possible numbers of the first blocks of all levels, if shapes do not tell where levels end.

    Args:
        total: Number of input blocks.
        depths: Value of the flag. If it is one depth per level and the depths fit, the levels are those of the flag. Otherwise, all
            levels are taken to have the same length.
    """
    if isinstance(depths, tuple) and min(depths) >= 1:
        starts = [0, *itertools.accumulate(depth + 1 for depth in depths)]
        if starts.pop() == total:
            return [starts]
    return [list(range(0, total, length)) for length in range(2, total + 1) if total % length == 0]


def _encoder_layouts(shapes: Shapes, depths: int | tuple[int, ...], depth_flag: str) -> list[_EncoderLayout]:
    """
    Returns all divisions of the encoder's blocks into levels that fit the shapes. A convolution ends a level. A residual block that
    ends a level has the shapes of any other residual block, so `_level_starts` gives the levels. However, no attention follows it, and
    the number of channels changes only after it.
    """
    blocks = {int(name.split(".")[1]) for name in shapes if re.match(r"input_blocks\.\d+\.", name)}
    convs = {index for index in blocks if f"input_blocks.{index}.0.op.weight" in shapes}
    attended = {int(name.split(".")[1]) for name in shapes if re.match(r"input_blocks\.\d+\.1\.", name)}
    total = max(blocks, default=0) + 1  # includes the first convolution, because each level then has the same length
    channels = {}
    for index in range(1, total):
        layer = "op" if index in convs else "out_layers.3"
        channels[index] = shapes.size(f"input_blocks.{index}.0.{layer}.weight", 0)

    layouts = []
    for starts in [[0, *sorted(convs)]] if convs else _level_starts(total, depths):
        ends, downs = [*starts[1:], total], set(starts[1:])
        widths = [{channels[i] for i in range(start + 1, min(end + 1, total))} for start, end in zip(starts, ends)]
        attention = [{i in attended for i in range(start + 1, end)} for start, end in zip(starts, ends)]
        uniform = all(len(values) == 1 for values in (*widths, *attention))
        if uniform and not downs & attended:
            layers = tuple(end - start - 1 for start, end in zip(starts, ends))
            layouts.append(
                _EncoderLayout(
                    channels=tuple(values.pop() for values in widths),
                    layers_per_block=layers[0] if len(set(layers)) == 1 else layers,
                    attended=tuple(values.pop() for values in attention),
                    downsample_type=("conv" if convs else "resnet") if downs else None,
                )
            )
    if not layouts:
        raise ValueError(
            "The checkpoint's input_blocks must form levels with one width and one kind of block each, but they do not. If its levels"
            f" have different depths, pass --{depth_flag} with one number per level, such as 1,2."
        )
    return layouts


def _multiplier(channels: int, width: int) -> float:
    multiplier = channels / width
    if int(multiplier * width) < channels:  # models round down, and the quotient may be slightly too small
        multiplier = math.nextafter(multiplier, math.inf)
    return int(multiplier) if multiplier.is_integer() else multiplier


class _FlagNames(NamedTuple):
    width: str
    depth: str
    attention: str
    scale_shift: str
    updown: str


_UNET_FLAGS = _FlagNames(
    width="num_channels",
    depth="num_res_blocks",
    attention="attention_resolutions",
    scale_shift="use_scale_shift_norm",
    updown="resblock_updown",
)
_CLASSIFIER_FLAGS = _FlagNames(
    width="classifier_width",
    depth="classifier_depth",
    attention="classifier_attention_resolutions",
    scale_shift="classifier_use_scale_shift_norm",
    updown="classifier_resblock_updown",
)


def _encoder_config(
    shapes: Shapes, flags: Flags, layout: _EncoderLayout, sample_size: int, names: _FlagNames
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the common part of a UNet's and a classifier's config, and the flag values that the checkpoint implies."""
    width = shapes.size("time_embed.0.weight", 1)
    scale_shift = shapes.size("input_blocks.1.0.emb_layers.1.weight", 0) == 2 * layout.channels[0]
    downsample_type = layout.downsample_type or ("resnet" if flags[names.updown] else "conv")
    config = {
        "sample_size": sample_size,
        "model_channels": width,
        "channel_mult": tuple(_multiplier(channels, width) for channels in layout.channels),
        "layers_per_block": layout.layers_per_block,
        "attention_resolutions": tuple(sample_size >> level for level, has in enumerate(layout.attended) if has),
        "norm_num_groups": PUBLISHED_NORM_GROUPS,
        "resnet_time_scale_shift": "scale_shift" if scale_shift else "default",
        "downsample_type": downsample_type,
        "timestep_scale": flags.timestep_scale,
    }
    held = {
        names.width: width,
        names.depth: layout.layers_per_block,
        names.scale_shift: scale_shift,
        names.updown: downsample_type == "resnet",
    }
    # Flags are compared by effect, because other multipliers may round to the same widths, and unused resolutions have no effect.
    if tuple(int(mult * width) for mult in flags["channel_mult"]) not in ((), layout.channels):
        held["channel_mult"] = config["channel_mult"]
    rates = [sample_size // resolution if resolution > 0 else 0 for resolution in flags[names.attention]]
    if tuple(2**level in rates for level in range(len(layout.attended))) != layout.attended:
        held[names.attention] = config["attention_resolutions"]
    return config, held


def _check_flags_against(held: dict[str, Any], flags: Flags) -> None:
    def text(value: Any) -> str:
        return ",".join(f"{part:g}" for part in value) if isinstance(value, tuple) else str(value)

    contradictions = [
        f"--{name} is {text(flags[name])}, but the checkpoint has {text(value) or 'none'}"
        for name, value in held.items()
        if name in flags and flags[name] != value
    ]
    if contradictions:
        raise ValueError(f"The flags contradict the checkpoint: {'; '.join(contradictions)}.")


# --- UNet ---


def _unet_layout(shapes: Shapes, levels: int, depths: int | tuple[int, ...]) -> _EncoderLayout:
    layouts = _encoder_layouts(shapes, depths, _UNET_FLAGS.depth)
    layouts = [layout for layout in layouts if len(layout.channels) == levels]
    if not layouts:
        raise ValueError(
            f"The checkpoint's input_blocks must have {levels} levels, as its output_blocks have, but do not. If its levels have"
            f" different depths, pass --{_UNET_FLAGS.depth} with one number per level, such as 1,2."
        )
    return layouts[0]


def _unet_channels(shapes: Shapes, flags: Flags) -> tuple[int, int, bool]:
    """
    Returns the channels of the image, the channels of the output, and whether there is a low-resolution input. If the shapes allow
    several answers, the given flags decide.
    """
    encoder_channels, out_channels = shapes.size("input_blocks.0.0.weight", 1), shapes.size("out.2.weight", 0)
    # The input of the encoder is the image, or the image and a low-resolution image.
    inputs = [(encoder_channels, False)]
    if encoder_channels % 2 == 0:
        inputs.append((encoder_channels // 2, True))
    inputs = [(channels, low_res) for channels, low_res in inputs if out_channels in (channels, 2 * channels)]
    if not inputs:
        raise ValueError(
            "The input and output channels of the checkpoint must be those of a UNet of the original code, but got"
            f" {encoder_channels} and {out_channels}."
        )

    def likelihood(channels_low_res: tuple[int, bool]) -> tuple[int, bool]:
        channels, low_res = channels_low_res
        agreeing = int("learn_sigma" in flags and flags["learn_sigma"] == (out_channels == 2 * channels))
        agreeing += low_res and ("large_size" in flags or "small_size" in flags)
        return agreeing, channels in (1, 3)  # most images have one channel or three

    in_channels, low_res = max(inputs, key=likelihood)
    return in_channels, out_channels, low_res


def unet_config(shapes: Shapes, flags: Flags) -> dict[str, Any]:
    """
    Returns the config of a UNet of the original code. Entries that do not follow from the shapes are taken from the flags.

    Raises:
        ValueError: If the shapes are not those of a UNet of the original code, the flags contradict the shapes, or the flags do not
            say whether timesteps are rescaled.
    """
    check_timestep_scale(flags)
    upsamplers = {
        match[1]: "conv" if match[2] == "conv" else "resnet"
        for name in shapes
        if (match := re.match(r"output_blocks\.(\d+)\.[12]\.(conv|in_layers)\.", name))
    }
    layout = _unet_layout(shapes, levels=1 + len(upsamplers), depths=flags[_UNET_FLAGS.depth])
    in_channels, out_channels, low_res = _unet_channels(shapes, flags)
    size_flag = "large_size" if low_res and ("large_size" in flags or "image_size" not in flags) else "image_size"
    config, held = _encoder_config(shapes, flags, layout, flags[size_flag], _UNET_FLAGS)
    num_classes = shapes.size("label_emb.weight", 0) if "label_emb.weight" in shapes else None
    held |= {"class_cond": num_classes is not None, "learn_sigma": out_channels == 2 * in_channels}
    if not shapes.preconditioned:
        held |= {"training_mode": "attention layers of another code"}
    if not low_res:
        held |= {"large_size": "no low-resolution input", "small_size": "no low-resolution input"}
    _check_flags_against(held, flags)

    by_width = flags["num_head_channels"] != -1
    config |= preconditioning_config(flags) if shapes.preconditioned else {}
    return config | {
        "in_channels": in_channels,
        "out_channels": out_channels,
        "attention_head_dim": flags["num_head_channels"] if by_width else None,
        "num_attention_heads": None if by_width else flags["num_heads"],
        "num_class_embeds": num_classes,
        "low_res_conditioning": low_res,
        "dropout": flags["dropout"],
        "upsample_type": next(iter(upsamplers.values()), config["downsample_type"]),
    }


# --- Classifier ---


def _classifier_pool(shapes: Shapes) -> tuple[str, str]:
    """Returns the kind of pooling, and the name of its last layer."""
    if "out.2.qkv_proj.weight" in shapes or "out.2.positional_embedding" in shapes:
        return "attention", "out.2.c_proj"
    if shapes.size("out.0.weight", 0) and len(shapes["out.0.weight"]) == 1:
        return "adaptive", "out.3"
    return ("spatial_v2", "out.3") if "out.1.weight" in shapes else ("spatial", "out.2")


def _classifier_layout(layouts: list[_EncoderLayout], flags: Flags, pool_size: int | None) -> _EncoderLayout:
    """Chooses a division into levels: first by the number of levels in the flags, then by the depth in the flags."""

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
                f"--classifier_depth must be one of {depths}, which fit the checkpoint, but got {flags['classifier_depth']}."
            )
    return layouts[0]


def classifier_config(shapes: Shapes, flags: Flags) -> dict[str, Any]:
    """
    Returns the config of a classifier of the original code. Entries that do not follow from the shapes are taken from the flags.

    Raises:
        ValueError: If the shapes are not those of a classifier of the original code, or the flags contradict the shapes.
    """
    layouts = _encoder_layouts(shapes, flags[_CLASSIFIER_FLAGS.depth], _CLASSIFIER_FLAGS.depth)
    pool, last_layer = _classifier_pool(shapes)
    pool_size = math.isqrt(shapes.size("out.2.positional_embedding", 1) - 1) if pool == "attention" else None
    layout = _classifier_layout(layouts, flags, pool_size)
    sample_size = flags["image_size"] if pool_size is None else pool_size * 2 ** (len(layout.channels) - 1)
    config, held = _encoder_config(shapes, flags, layout, sample_size, _CLASSIFIER_FLAGS)
    num_classes = shapes.size(f"{last_layer}.weight", 0)
    held |= {"image_size": sample_size, "classifier_pool": pool, "classifier_out_channels": num_classes}
    _check_flags_against(held, flags)
    return config | {
        "in_channels": shapes.size("input_blocks.0.0.weight", 1),
        "num_classes": num_classes,
        "pool": pool,
        "attention_head_dim": flags["classifier_num_head_channels"],
        "num_attention_heads": None,
        "dropout": 0.0,
        "num_train_timesteps": flags["diffusion_steps"],
        "beta_schedule": BETA_SCHEDULES.get(flags["noise_schedule"]) if "noise_schedule" in flags else None,
    }
