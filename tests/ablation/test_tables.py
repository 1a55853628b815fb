"""Rows of the paper's Tables 1 to 3, at the paper's size and in small."""

import pytest
import torch

from diffusers_adm.ablation.plan import variant_costs
from diffusers_adm.ablation.runs import AblationSamples, check_runs, plan_runs
from diffusers_adm.ablation.tables import TABLES, table_variants
from diffusers_adm.models.blocks import ADMAttention
from diffusers_adm.training.train_unet import parse_args


PAPER = "--resolution 128 --channel_mult 1,1,2,3,4 --output_dir new --max_train_steps 1".split()
SMALL = "--resolution 32 --in_channels 1 --channel_mult 1,2,2 --norm_num_groups 4 --output_dir new --max_train_steps 1".split()


def unets_of(table, tmp_path, *words):
    base = parse_args(list(words))
    runs = plan_runs(base, table_variants(table, base), (0,), tmp_path)
    return check_runs(runs, 1, [str(number) for number in range(10)], AblationSamples(1, 1, "random", None, {}))


def attention_sizes(unet) -> set[tuple[int, int]]:
    """Returns the numbers of heads and of channels per head of all attention layers."""
    layers = [module for module in unet.modules() if isinstance(module, ADMAttention)]
    return {(layer.heads, layer.to_out.in_features // layer.heads) for layer in layers}


def test_table_1_at_the_size_of_the_paper(tmp_path):
    unets = unets_of("architecture", tmp_path, *PAPER, "--model_channels", "160")
    expected = {  # channels, depth, heads, attention resolutions, resampling and divisor of residual sums, as in the paper
        "base": (160, 2, 1, (16,), "conv", 1),
        "deeper": (128, 4, 1, (16,), "conv", 1),
        "4-heads": (160, 2, 4, (16,), "conv", 1),
        "multi-resolution": (160, 2, 1, (32, 16, 8), "conv", 1),
        "biggan": (160, 2, 1, (16,), "resnet", 1),
        "rescaled": (160, 2, 1, (16,), "conv", 2**0.5),
        "combined": (160, 2, 4, (32, 16, 8), "resnet", 1),
    }
    names = (
        "model_channels layers_per_block num_attention_heads attention_resolutions downsample_type output_scale_factor"
    )
    found = {name: tuple(unet.config[key] for key in names.split()) for name, unet in unets.items()}
    assert found == expected
    assert all(unet.config.upsample_type == unet.config.downsample_type for unet in unets.values())
    assert all(unet.device == torch.device("meta") for unet in unets.values())


def test_table_2_at_the_size_of_the_paper(tmp_path):
    unets = unets_of("attention_heads", tmp_path, *PAPER, "--model_channels", "128", "--num_attention_heads", "2")
    assert list(unets) == ["1-head", "2-heads", "4-heads", "8-heads", "32-per-head", "64-per-head", "128-per-head"]
    for heads in (1, 2, 4, 8):
        assert {found for found, _ in attention_sizes(unets["1-head" if heads == 1 else f"{heads}-heads"])} == {heads}
    for channels in (32, 64, 128):
        assert {found for _, found in attention_sizes(unets[f"{channels}-per-head"])} == {channels}
    assert {unet.config.attention_resolutions for unet in unets.values()} == {(32, 16, 8)}
    assert len({unet.num_parameters() for unet in unets.values()}) == 1


def test_table_3_at_the_size_of_the_paper(tmp_path):
    unets = unets_of("adagn", tmp_path, *PAPER, "--model_channels", "128")
    assert {name: unet.config.resnet_time_scale_shift for name, unet in unets.items()} == {
        "adagn": "scale_shift",
        "addition": "default",
    }
    assert {channels for _, channels in attention_sizes(unets["adagn"])} == {64}
    costs = variant_costs(unets)
    assert costs["adagn"]["parameters"] > costs["addition"]["parameters"]


@pytest.mark.parametrize("table", TABLES)
def test_tables_in_small(table, tmp_path):
    """Levels of 32, 16 and 8 pixels. Twice the depth or the other resampling changes the size, and the number of heads does not."""
    width = "20" if table == "architecture" else "16"
    costs = variant_costs(unets_of(table, tmp_path, *SMALL, "--model_channels", width))
    assert all(cost["parameters"] > 0 and cost["macs"] > 0 for cost in costs.values())
    if table == "architecture":
        base, combined = costs["base"], costs["combined"]
        assert base == costs["rescaled"] == costs["4-heads"]
        assert base["parameters"] < costs["biggan"]["parameters"] < combined["parameters"]
        assert base["macs"] < costs["multi-resolution"]["macs"] < combined["macs"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--channel_mult", "1,2"), "requires at least 3 resolutions, but --channel_mult has only 2"),
        (("--model_channels", "32"), "requires a --model_channels that is a multiple of 5, but got 32"),
    ],
)
def test_models_that_the_paper_cannot_be_scaled_to_are_refused(words, message):
    with pytest.raises(ValueError, match=message):
        table_variants("architecture", parse_args([*SMALL, "--model_channels", "20", *words]))
