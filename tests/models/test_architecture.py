"""Options of the architecture: each has its documented effect, and a config that describes no model is refused."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from model_calls import LABELS, TIMESTEPS, every_model, every_pool, predict, relative_error, tiny_model
from tiny_models import NUM_CLASSES, SIZE, draw_parameters, images, tiny_classifier, tiny_unet

from diffusers_adm.models.blocks import (
    ADMAttentionBlock,
    ADMDownsample2D,
    ADMResnetBlock2D,
    ADMUpBlock,
    ADMUpsample2D,
)


def resnet_block(**changes) -> ADMResnetBlock2D:
    config = {
        "in_channels": 8,
        "out_channels": 16,
        "emb_channels": 32,
        "norm_num_groups": 4,
        "dropout": 0.0,
        "time_scale_shift": "scale_shift",
        "output_scale_factor": 1.0,
    }
    return draw_parameters(ADMResnetBlock2D(**{**config, **changes}))


@every_model
def test_output_scale_factor_divides_every_residual_sum(kind):
    factor = 2**0.5
    hidden_states, emb = images(channels=8), torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        plain, rescaled = resnet_block(), resnet_block(output_scale_factor=factor)
        torch.testing.assert_close(rescaled(hidden_states, emb) * factor, plain(hidden_states, emb))
        plain, rescaled = (draw_parameters(ADMAttentionBlock(8, 2, 4, scale)) for scale in (1.0, factor))
        torch.testing.assert_close(rescaled(hidden_states) * factor, plain(hidden_states))

    model = tiny_model(kind, output_scale_factor=factor)
    blocks = [module for module in model.modules() if isinstance(module, (ADMResnetBlock2D, ADMAttentionBlock))]
    assert blocks and {block.output_scale_factor for block in blocks} == {factor}
    assert relative_error(predict(model), predict(tiny_model(kind))) > 1e-2


@every_model
def test_downsample_type_conv_halves_by_strided_convolutions(kind):
    model = tiny_model(kind, downsample_type="conv")
    resamplers = [module for module in model.encoder.modules() if isinstance(module, ADMDownsample2D)]
    assert [module.conv.stride for module in resamplers] == [(2, 2)]
    assert not any(getattr(module, "resample", None) == "down" for module in model.modules())
    assert predict(model).isfinite().all()
    plain = tiny_model(kind)
    assert [module.resample for module in plain.modules() if getattr(module, "resample", None) == "down"] == ["down"]


def test_upsample_type_conv_doubles_by_a_convolution():
    model = tiny_unet(upsample_type="conv")
    assert sum(isinstance(module, ADMUpsample2D) for module in model.up_blocks.modules()) == 1
    assert not any(getattr(module, "resample", None) == "up" for module in model.modules())
    assert predict(model).shape == (2, 6, SIZE, SIZE)
    assert sum(getattr(module, "resample", None) == "up" for module in tiny_unet().modules()) == 1


def test_residual_block_resamples_both_of_its_paths():
    hidden_states, emb = images(channels=8), torch.zeros(2, 32)
    for resample, size in (("down", 4), ("up", 16), (None, 8)):
        block = resnet_block(resample=resample)
        with torch.no_grad():
            assert block(hidden_states, emb).shape == (2, 16, size, size)
            block.conv2.weight.zero_(), block.conv2.bias.zero_()  # leaves the shortcut alone
            if resample == "down":
                expected = block.conv_shortcut(F.avg_pool2d(hidden_states, 2))
            elif resample == "up":
                expected = block.conv_shortcut(hidden_states).repeat_interleave(2, 2).repeat_interleave(2, 3)
            else:
                expected = block.conv_shortcut(hidden_states)
            torch.testing.assert_close(block(hidden_states, emb), expected)


def test_adaptive_group_norm_scales_after_normalisation_and_addition_adds_before():
    hidden_states, emb = images(channels=8), torch.zeros(2, 32)
    adaptive, added = resnet_block(), resnet_block(time_scale_shift="default")
    assert adaptive.time_emb_proj.out_features == 2 * added.time_emb_proj.out_features == 32
    with torch.no_grad():
        # What is added alike to all channels of a group is gone after normalisation.
        added.time_emb_proj.bias.fill_(0.0)
        expected = added(hidden_states, emb)
        added.time_emb_proj.bias.fill_(3.0)
        torch.testing.assert_close(added(hidden_states, emb), expected, rtol=1e-3, atol=1e-4)
        added.time_emb_proj.bias.copy_(torch.arange(16))
        assert relative_error(added(hidden_states, emb), expected) > 1e-2

        # A scale of -1 leaves nothing of the features: the branch is the shift's image alone.
        adaptive.time_emb_proj.bias.copy_(torch.cat([-torch.ones(16), torch.full((16,), 0.7)]))
        shift = adaptive.conv2(adaptive.act(torch.full((2, 16, SIZE, SIZE), 0.7)))
        torch.testing.assert_close(adaptive(hidden_states, emb), adaptive.conv_shortcut(hidden_states) + shift)


@every_model
def test_addition_runs_and_differs(kind):
    model = tiny_model(kind, resnet_time_scale_shift="default")
    blocks = [module for module in model.modules() if isinstance(module, ADMResnetBlock2D)]
    assert all(block.time_emb_proj.out_features == block.conv1.out_channels for block in blocks)
    assert relative_error(predict(model, timestep=10), predict(model, timestep=900)) > 1e-3


@every_model
def test_heads_are_counted_by_width_or_by_number(kind):
    def heads(model):
        return {
            (module.to_qkv.in_features, module.heads)
            for module in model.modules()
            if isinstance(module, AttentionModuleMixin)
        }

    both_levels = {"attention_resolutions": (8, 4)}
    by_width = tiny_model(kind, attention_head_dim=4, **both_levels)
    by_number = tiny_model(kind, attention_head_dim=None, num_attention_heads=2, **both_levels)
    assert heads(by_width) == {(8, 2), (16, 4)}
    assert heads(by_number) == {(8, 2), (16, 2)}
    assert relative_error(predict(by_width), predict(by_number)) > 1e-4


def test_attention_stands_at_the_resolutions_asked_for_and_in_the_middle():
    def levels(model):
        return [block.attention is not None for block in model.encoder.down_blocks]

    # Two blocks, one that halves; two blocks, one that halves; two blocks. A halving block has no attention.
    layout = {"channel_mult": (1, 1, 2), "layers_per_block": 2, "attention_head_dim": 4}
    unet = tiny_unet(**layout, attention_resolutions=(4,))
    assert levels(unet) == [False] * 3 + [True, True, False] + [False] * 2
    assert [block.attention is not None for block in unet.up_blocks] == [False] * 3 + [True] * 3 + [False] * 3
    assert [block.attention is not None for block in unet.encoder.mid_blocks] == [True, False]
    assert levels(tiny_unet(**layout, attention_resolutions=())) == [False] * 8


@every_model
def test_fractional_multipliers_set_the_widths(kind):
    model = tiny_model(kind, channel_mult=(0.5, 1, 1.5), norm_num_groups=2, attention_head_dim=4)
    widths = {module.conv1.out_channels for module in model.encoder.modules() if isinstance(module, ADMResnetBlock2D)}
    assert model.encoder.conv_in.out_channels == 4 and widths == {4, 8, 12}
    assert predict(model).isfinite().all()


def test_null_class_is_an_extra_row_that_stands_for_no_label():
    model = tiny_unet(use_null_class=True)
    assert model.null_class == NUM_CLASSES and model.class_embedding.num_embeddings == NUM_CLASSES + 1
    null = predict(model, labels=torch.full((2,), NUM_CLASSES))
    assert torch.equal(predict(model, labels=None), null)
    assert relative_error(predict(model), null) > 1e-2


def test_label_changes_a_conditional_model_and_is_refused_by_an_unconditional_one():
    conditional, unconditional = tiny_unet(), tiny_unet(num_class_embeds=None)
    assert conditional.null_class is None and unconditional.null_class is None
    assert relative_error(predict(conditional, labels=LABELS - 1), predict(conditional)) > 1e-2
    assert predict(unconditional, labels=None).isfinite().all()
    with pytest.raises(ValueError, match="`class_labels` are required"):
        predict(conditional, labels=None)
    with pytest.raises(ValueError, match="unconditional"):
        predict(unconditional)


def test_low_resolution_image_conditions_an_upsampler():
    model = tiny_unet(low_res_conditioning=True)
    assert model.encoder.conv_in.in_channels == 6
    sample = images()

    @torch.no_grad()
    def upsample(low_res):
        return model(sample, TIMESTEPS, LABELS, low_res=low_res).sample

    small = images(height=4, width=4, seed=5)
    assert upsample(small).shape == (2, 6, SIZE, SIZE)
    assert relative_error(upsample(-small), upsample(small)) > 1e-2
    # It is resized bilinearly, so that a flat image is the same at any size.
    torch.testing.assert_close(upsample(torch.full((2, 3, 4, 2), 0.3)), upsample(torch.full((2, 3, 8, 8), 0.3)))
    with pytest.raises(ValueError, match="`low_res` is required"):
        upsample(None)
    with pytest.raises(ValueError, match="`low_res` requires an upsampler"):
        tiny_unet()(sample, TIMESTEPS, LABELS, low_res=small)


def test_learned_variance_doubles_the_output():
    assert tiny_unet().learns_variance
    assert not tiny_unet(out_channels=3).learns_variance
    assert predict(tiny_unet(out_channels=3)).shape == (2, 3, SIZE, SIZE)
    assert predict(tiny_unet(in_channels=1, out_channels=2), images(channels=1)).shape == (2, 2, SIZE, SIZE)


@every_pool
def test_pool_reads_what_it_says(pool):
    classifier = tiny_classifier(pool)
    # The spatial pools read every block's features, the others the last alone.
    means = sum(classifier.encoder.skip_channels) + 16
    if pool in ("spatial", "spatial_v2"):
        assert classifier.pooling.fc1.in_features == means == 8 + 8 + 8 + 16 + 16
        assert isinstance(classifier.pooling.norm, torch.nn.GroupNorm) == (pool == "spatial_v2")
    elif pool == "adaptive":
        assert classifier.pooling.fc.in_features == 16
    else:
        assert classifier.pooling.positional_embedding.shape == (4 * 4 + 1, 16)


BAD_CONFIGS = {
    "heads given twice": ({"attention_head_dim": 8, "num_attention_heads": 2}, "Exactly one of .* but got 8 and 2"),
    "heads not given": ({"attention_head_dim": None}, "Exactly one of .* but got None and None"),
    "heads that do not divide": ({"attention_head_dim": 5}, "16 channels cannot be divided"),
    "number of heads that does not divide": (
        {"attention_head_dim": None, "num_attention_heads": 3},
        "num_attention_heads=3",
    ),
    "size that cannot be halved": ({"sample_size": 9, "attention_resolutions": ()}, "sample_size=9"),
    "attention where no level is": ({"attention_resolutions": (4, 3)}, r"among \[8, 4\].*but got \[3\]"),
    "groups that do not divide": (
        {"norm_num_groups": 3},
        "`norm_num_groups` must divide the channels of each level, but got 3",
    ),
    "multiplier that leaves nothing": ({"channel_mult": (0.1, 1)}, "0 channels"),
    "multiplier that is infinite": ({"channel_mult": (float("inf"), 2)}, "`channel_mult` must be positive and finite"),
    "conditioning": ({"resnet_time_scale_shift": "ada"}, "but got 'ada'"),
    "downsampling": ({"downsample_type": "pool"}, "but got 'pool'"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
@pytest.mark.parametrize("kind", ["unet", "attention"])
def test_config_that_describes_no_model_is_refused(kind, name):
    changes, message = BAD_CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        tiny_model(kind, **changes)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"out_channels": 4}, "out_channels=4"),
        ({"num_class_embeds": None, "use_null_class": True}, "use_null_class"),
        ({"upsample_type": "bilinear"}, "but got 'bilinear'"),
    ],
)
def test_unet_config_that_describes_no_model_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_unet(**changes)


def test_unknown_pool_is_refused():
    with pytest.raises(ValueError, match="but got 'max'"):
        tiny_classifier("max")


def test_up_blocks_hold_the_skip_connections():
    model = tiny_unet()
    widths = [block.resnet.conv1.in_channels for block in model.up_blocks]
    assert all(isinstance(block, ADMUpBlock) for block in model.up_blocks)
    assert widths == [16 + 16, 16 + 8, 16 + 8, 8 + 8]
