"""Conversion of published checkpoints both ways, and what their shapes tell."""

import pytest
import torch
from golden_cases import CLASSIFIER_CASES, UNET_CASES, draw_weights, load, load_case, published_flags

from diffusers_adm import ADMUNet2DModel, NoisyClassifier


# --- Reference cases ---


@pytest.mark.parametrize("case", UNET_CASES + CLASSIFIER_CASES)
def test_converted_model_computes_the_recorded_output(case):
    _, recorded = load_case(case)
    model = load(case)
    with torch.no_grad():
        if case in CLASSIFIER_CASES:
            output, expected = model(recorded["sample"], recorded["timestep"]).logits, recorded["logits"]
        else:
            labels = recorded["class_labels"] if model.config.num_class_embeds else None
            output = model(recorded["sample"], recorded["timestep"], labels, recorded.get("low_res")).sample
            expected = recorded["output"]
    assert (output - expected).norm() / expected.norm() < 2e-5


@pytest.mark.parametrize("use_new_attention_order", [True, False])
@pytest.mark.parametrize("case", UNET_CASES)
def test_unet_round_trips_bit_for_bit(case, use_new_attention_order):
    published = draw_weights(load_case(case)[0])
    back = load(case, f"--use_new_attention_order {use_new_attention_order}").to_openai_state_dict(
        use_new_attention_order
    )
    assert published.keys() == back.keys()
    assert all(torch.equal(published[name], back[name]) for name in published)


@pytest.mark.parametrize("case", CLASSIFIER_CASES)
def test_classifier_round_trips_bit_for_bit(case):
    published, back = draw_weights(load_case(case)[0]), load(case).to_openai_state_dict()
    assert published.keys() == back.keys()
    assert all(torch.equal(published[name], back[name]) for name in published)


def test_weights_keep_dtype_and_state_dict_stays_as_it_is():
    description, _ = load_case("unet_class_conditional")
    published = {name: tensor.half() for name, tensor in draw_weights(description).items()}
    names = list(published)
    model = ADMUNet2DModel.from_openai(published, published_flags(description))
    assert model.dtype == torch.float16
    assert list(published) == names
    assert model.conv_out.weight.data_ptr() == published["out.2.weight"].data_ptr()
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("options", [{"norm_num_groups": 16}, {"output_scale_factor": 2**0.5}])
def test_no_way_back_for_what_the_published_code_does_not_know(options):
    model = ADMUNet2DModel(
        sample_size=8, model_channels=32, channel_mult=(1,), attention_resolutions=(), attention_head_dim=32, **options
    )
    with pytest.raises(ValueError, match=next(iter(options))):
        model.to_openai_state_dict()


# --- What shapes tell ---


@pytest.mark.parametrize(
    "config",
    [
        {"channel_mult": (0.5, 1, 2), "layers_per_block": 1, "attention_resolutions": (8,)},
        {"channel_mult": (1, 1.5), "layers_per_block": 3, "attention_resolutions": (32, 16)},
        {"channel_mult": (1, 1, 1), "layers_per_block": 2, "attention_resolutions": ()},
        {"channel_mult": (2,), "layers_per_block": 2, "attention_resolutions": (32,)},
        {"channel_mult": (1, 2), "layers_per_block": 1, "downsample_type": "conv", "upsample_type": "conv"},
        {"in_channels": 1, "out_channels": 2, "num_class_embeds": 10},
        {"in_channels": 1, "out_channels": 1, "num_class_embeds": None, "resnet_time_scale_shift": "default"},
        {"in_channels": 1, "out_channels": 2, "low_res_conditioning": True},
        {"in_channels": 3, "out_channels": 3, "low_res_conditioning": True},
    ],
)
def test_unet_config_is_read_from_shapes(config):
    config = {
        "sample_size": 32,
        "model_channels": 64,
        "channel_mult": (1, 2),
        "layers_per_block": 1,
        "attention_resolutions": (16,),
        "attention_head_dim": 32,
        "dropout": 0.0,
    } | config
    with torch.device("meta"):
        model = ADMUNet2DModel(**config)
    flags = "--image_size 32 --num_head_channels 32 --resblock_updown True"
    if config.get("downsample_type") == "conv":
        flags = flags.replace("True", "False")
    read = ADMUNet2DModel.from_openai(model.to_openai_state_dict(), flags).config
    assert {name: read[name] for name in config} == config


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
@pytest.mark.parametrize("depth, channel_mult", [(1, (1, 2, 2)), (3, (1, 1, 2, 2)), (2, (0.5, 1))])
def test_classifier_config_is_read_from_shapes(pool, depth, channel_mult):
    config = {
        "sample_size": 32,
        "num_classes": 7,
        "pool": pool,
        "model_channels": 64,
        "channel_mult": channel_mult,
        "layers_per_block": depth,
        "attention_resolutions": (16,),
        "attention_head_dim": 32,
    }
    with torch.device("meta"):
        model = NoisyClassifier(**config)
    flags = "--image_size 32 --classifier_num_head_channels 32"
    read = NoisyClassifier.from_openai(model.to_openai_state_dict(), flags).config
    assert {name: read[name] for name in config} == config


def test_depth_that_shapes_leave_open_comes_from_the_flag():
    # 12 blocks of one width without attention: 2, 3, 4 or 6 levels.
    with torch.device("meta"):
        model = NoisyClassifier(
            sample_size=32,
            model_channels=32,
            channel_mult=(1, 1, 1),
            layers_per_block=3,
            attention_resolutions=(),
            attention_head_dim=32,
            pool="adaptive",
        )
    published, flags = model.to_openai_state_dict(), "--image_size 32 --classifier_num_head_channels 32"
    read = NoisyClassifier.from_openai(published, f"{flags} --classifier_depth 3").config
    assert (read.layers_per_block, read.channel_mult) == (3, (1, 1, 1))
    assert NoisyClassifier.from_openai(published, flags).config.layers_per_block == 2  # the published default
    assert NoisyClassifier.from_openai(published, f"{flags} --channel_mult 1,1,1").config.layers_per_block == 3
    with pytest.raises(ValueError, match="classifier_depth 4"):
        NoisyClassifier.from_openai(published, f"{flags} --classifier_depth 4")
