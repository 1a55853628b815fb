"""Rows of Tables 1 to 3 of Dhariwal & Nichol 2021 (arXiv 2105.05233), scaled to the width and the resolutions of a base model.

The paper's base models have 160 channels (Table 1) or 128 channels, images of 128 pixels, and levels of 128, 64, 32, 16 and 8 pixels.
Widths are scaled with `--model_channels`. The paper's attention at 16 pixels becomes attention at the second lowest resolution, and its
attention at 32, 16 and 8 pixels becomes attention at the three lowest resolutions.
"""

from typing import Any

from diffusers_adm.training.options import UNetTrainingOptions


TABLES = ("architecture", "attention_heads", "adagn")  # the paper's Tables 1, 2 and 3
# Options that every row of every table sets. Rows of Table 1 also change the width and the depth.
SET_BY_TABLES = (
    "attention_resolutions",
    "attention_head_dim",
    "num_attention_heads",
    "resnet_time_scale_shift",
    "resample_type",
    "output_scale_factor",
)


def table_variants(table: str, base: UNetTrainingOptions) -> dict[str, dict[str, Any]]:
    """
    Returns the options that each row of a table changes.

    Args:
        table: Name in `TABLES`.
        base: Options of the base model, whose width, depth and resolutions are used.

    Raises:
        ValueError: If the base model has fewer than three resolutions, or its width cannot be scaled as in the paper.
    """
    width, depth = base.architecture.model_channels, base.architecture.layers_per_block
    resolutions = [base.format.resolution // 2**level for level in range(len(base.architecture.channel_mult))]
    if len(resolutions) < 3:
        raise ValueError(
            f"--table {table} requires at least 3 resolutions, but --channel_mult has only {len(resolutions)}"
            " factors. Pass more factors, such as 1,2,2."
        )
    divisor = {"architecture": 5, "attention_heads": 4, "adagn": 2}[table]
    if width % divisor:
        raise ValueError(
            f"--table {table} requires a --model_channels that is a multiple of {divisor}, but got {width}."
        )
    first = {
        "resnet_time_scale_shift": "scale_shift",
        "resample_type": "conv",
        "output_scale_factor": 1.0,
        "num_attention_heads": 1,
        "attention_resolutions": resolutions[-2:-1],
    }
    final = {**first, "resample_type": "resnet", "attention_resolutions": resolutions[-3:]}
    if table == "architecture":
        return _architecture_rows(first, final, width, depth)
    if table == "attention_heads":
        names = {1: "1-head", 2: "2-heads", 4: "4-heads", 8: "8-heads"}
        heads = {name: {**final, "num_attention_heads": number} for number, name in names.items()}
        return heads | {f"{dim}-per-head": final | _head_channels(dim) for dim in (width // 4, width // 2, width)}
    final |= _head_channels(width // 2)
    return {"adagn": final, "addition": {**final, "resnet_time_scale_shift": "default"}}


def _architecture_rows(
    first: dict, final: dict, width: int, depth: int | tuple[int, ...]
) -> dict[str, dict[str, Any]]:
    """Returns the rows of Table 1. Its last row combines the changes that help, except the depth, which takes longer to train."""
    deeper = tuple(2 * layers for layers in depth) if isinstance(depth, tuple) else 2 * depth
    return {
        "base": first,
        "deeper": {**first, "model_channels": width * 4 // 5, "layers_per_block": deeper},
        "4-heads": {**first, "num_attention_heads": 4},
        "multi-resolution": {**first, "attention_resolutions": final["attention_resolutions"]},
        "biggan": {**first, "resample_type": "resnet"},
        "rescaled": {**first, "output_scale_factor": 2**0.5},
        "combined": {**final, "num_attention_heads": 4},
    }


def _head_channels(channels: int) -> dict[str, Any]:
    return {"num_attention_heads": None, "attention_head_dim": channels}
