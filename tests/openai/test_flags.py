"""Flags of the original command line."""

import pytest
from golden_cases import draw_weights, load, load_case, meta_state_dict

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.openai.flags import parse_flags


def test_flags_are_read_in_every_published_spelling():
    flags = parse_flags(
        "--image_size=32 --num_head_channels -1 --class_cond yes --learn_sigma 0 --channel_mult 0.5,1,2"
        " --attention_resolutions '16,8' --classifier_scale=-2.5 --timestep_respacing '' --use_fp16 True"
        " --model_path models/a.pt --batch_size 4 --data_dir /data"
    )
    assert flags == {
        "image_size": 32,
        "num_head_channels": -1,
        "class_cond": True,
        "learn_sigma": False,
        "channel_mult": (0.5, 1.0, 2.0),
        "attention_resolutions": (16, 8),
        "classifier_scale": -2.5,
        "timestep_respacing": "",
    }
    assert flags["num_heads"] == 4  # not given: the published default


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--num_chanels 64", "num_chanels.*num_channels"),
        ("--image_size", "image_size requires a value"),
        ("--image_size --class_cond True", "image_size requires a value"),
        ("--image_size big", "image_size must be an integer, but got 'big'"),
        ("--class_cond maybe", "class_cond must be True or False, but got 'maybe'"),
        ("--attention_resolutions 16;8", "attention_resolutions must be integers"),
        ("image_size 64", "got 'image_size' in place of a name"),
        ("--model_path 'a", "cannot be read"),
        ("--image_size 0", "image_size must be at least 1"),
        ("--num_head_channels 0", "num_head_channels must be at least 1"),
        ("--num_heads 2 --num_heads_upsample 4", "--num_heads_upsample must equal --num_heads, which is 2, but got 4"),
        ("--diffusion_steps 0", "diffusion_steps must be at least 1"),
        (["--image_size", "64"], "one string"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        ADMUNet2DModel.from_openai(meta_state_dict("64x64_diffusion.pt"), flags)


@pytest.mark.parametrize(
    "case, flags, message",
    [
        ("unet_class_conditional", "--num_channels 64", "num_channels is 64, but the checkpoint has 32"),
        ("unet_class_conditional", "--num_res_blocks 2", "num_res_blocks is 2, but the checkpoint has 1"),
        ("unet_class_conditional", "--channel_mult 1,2,3", "channel_mult is 1,2,3, but the checkpoint has 1,2,2"),
        (
            "unet_class_conditional",
            "--attention_resolutions 32,8",
            "attention_resolutions is 32,8, but the checkpoint has 16,8",
        ),
        ("unet_class_conditional", "--image_size 64", "attention_resolutions is 16,8, but the checkpoint has 32,16"),
        ("unet_class_conditional", "--class_cond False", "class_cond is False, but the checkpoint has True"),
        ("unet_class_conditional", "--learn_sigma False", "learn_sigma is False, but the checkpoint has True"),
        (
            "unet_class_conditional",
            "--use_scale_shift_norm False",
            "use_scale_shift_norm is False, but the checkpoint has True",
        ),
        ("unet_class_conditional", "--resblock_updown False", "resblock_updown is False, but the checkpoint has True"),
        (
            "unet_class_conditional",
            "--small_size 8",
            "small_size is 8, but the checkpoint has no low-resolution input",
        ),
        (
            "unet_unconditional_plain",
            "--resblock_updown True",
            "resblock_updown is True, but the checkpoint has False",
        ),
        ("classifier_attention", "--image_size 64", "image_size is 64, but the checkpoint has 32"),
        ("classifier_attention", "--classifier_width 64", "classifier_width is 64, but the checkpoint has 32"),
        ("classifier_attention", "--classifier_depth 2", "classifier_depth is 2, but the checkpoint has 1"),
        (
            "classifier_attention",
            "--classifier_pool spatial",
            "classifier_pool is spatial, but the checkpoint has attention",
        ),
        (
            "classifier_attention",
            "--classifier_out_channels 10",
            "classifier_out_channels is 10, but the checkpoint has 30",
        ),
        ("classifier_adaptive", "--channel_mult 1,1,2", "channel_mult is 1,1,2, but the checkpoint has 1,2,2"),
    ],
)
def test_flags_that_contradict_the_checkpoint_are_refused(case, flags, message):
    with pytest.raises(ValueError, match=message):
        load(case, flags)


def test_what_nobody_gave_takes_the_published_default():
    description, _ = load_case("unet_class_conditional")
    config = ADMUNet2DModel.from_openai(draw_weights(description), "").config
    assert (config.sample_size, config.dropout) == (64, 0.0)
    assert (config.attention_head_dim, config.num_attention_heads) == (None, 4)


def test_attention_resolutions_that_no_level_has_are_without_effect():
    assert load("unet_class_conditional", "--attention_resolutions 16,8,4").config.attention_resolutions == (16, 8)
