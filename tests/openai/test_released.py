"""Released checkpoints: their table, their conversion and the pipelines around them."""

import pytest
import torch
from golden_cases import RELEASED, meta_state_dict

from diffusers_adm import ADMUNet2DModel, ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.openai.flags import parse_flags
from diffusers_adm.openai.released import RELEASED_CHECKPOINTS


# The multipliers that the published code takes for an image size; a super-resolution UNet has those of 256 at any.
CHANNEL_MULT = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}


def test_the_table_lists_all_released_checkpoints_with_their_recorded_flags():
    assert set(RELEASED_CHECKPOINTS) == set(RELEASED)
    for file, preset in RELEASED_CHECKPOINTS.items():
        flags, recorded = parse_flags(preset.flags), parse_flags(RELEASED[file]["flags"])
        assert recorded.items() <= flags.items()
        assert preset.url.endswith(f"/diffusion/jul-2021/{file}")
        assert (preset.fid is None) == (preset.kind == "classifier")


@pytest.mark.parametrize("file", RELEASED)
def test_released_checkpoint_converts_completely_both_ways(file):
    published = meta_state_dict(file)
    cls = NoisyClassifier if RELEASED_CHECKPOINTS[file].kind == "classifier" else ADMUNet2DModel
    model = cls.from_openai(published, RELEASED[file]["flags"])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in published.values())
    back = model.to_openai_state_dict()
    assert {name: tensor.shape for name, tensor in back.items()} == {n: t.shape for n, t in published.items()}


@pytest.mark.parametrize("file", RELEASED)
def test_released_checkpoint_has_the_config_that_its_flags_say(file):
    kind, flags = RELEASED_CHECKPOINTS[file].kind, parse_flags(RELEASED_CHECKPOINTS[file].flags)
    cls = NoisyClassifier if kind == "classifier" else ADMUNet2DModel
    config = cls.from_openai(meta_state_dict(file), RELEASED_CHECKPOINTS[file].flags).config
    size = flags["large_size"] if kind == "upsampler" else flags["image_size"]
    assert config.sample_size == size
    assert config.channel_mult == CHANNEL_MULT[256 if kind == "upsampler" else size]
    assert config.resnet_time_scale_shift == "scale_shift"
    assert config.downsample_type == "resnet"
    if kind == "classifier":
        assert config.model_channels == flags["classifier_width"]
        assert config.layers_per_block == flags["classifier_depth"]
        assert config.attention_resolutions == flags["classifier_attention_resolutions"]
        assert (config.attention_head_dim, config.pool, config.num_classes) == (64, "attention", 1000)
    else:
        assert config.model_channels == flags["num_channels"]
        assert config.layers_per_block == flags["num_res_blocks"]
        assert config.attention_resolutions == flags["attention_resolutions"]
        assert config.num_class_embeds == (1000 if flags["class_cond"] else None)
        assert (config.in_channels, config.out_channels, config.upsample_type) == (3, 6, "resnet")
        assert config.low_res_conditioning == (kind == "upsampler")
        assert config.dropout == flags["dropout"]
        heads = (64, None) if "num_head_channels" in flags else (None, 4)
        assert (config.attention_head_dim, config.num_attention_heads) == heads


@pytest.mark.parametrize(
    "cls, file", [(ADMUNet2DModel, "64x64_diffusion.pt"), (NoisyClassifier, "64x64_classifier.pt")]
)
def test_defaults_are_the_released_64x64_model(cls, file):
    with torch.device("meta"):
        default = cls()
    converted = cls.from_openai(meta_state_dict(file), RELEASED_CHECKPOINTS[file].flags)
    hidden = ("_use_default_values", "num_train_timesteps", "beta_schedule")  # a new model was trained with none
    assert {k: v for k, v in converted.config.items() if k not in hidden} == {
        k: v for k, v in default.config.items() if k not in hidden
    }


def test_name_of_a_released_file_needs_no_flags(tmp_path):
    torch.save(meta_state_dict("64x64_classifier.pt"), tmp_path / "64x64_classifier.pt")
    assert NoisyClassifier.from_openai(str(tmp_path / "64x64_classifier.pt")).config.layers_per_block == 4
    with pytest.raises(ValueError, match="--classifier_depth is 2, but the checkpoint has 4"):
        NoisyClassifier.from_openai(tmp_path / "64x64_classifier.pt", "--classifier_depth 2")


@pytest.mark.parametrize(
    "unet, classifier, scale, respacing, beta_schedule, labels",
    [
        ("64x64_diffusion.pt", "64x64_classifier.pt", 1.0, None, "squaredcos_cap_v2", 1000),
        ("128x128_diffusion.pt", "128x128_classifier.pt", 0.5, None, "linear", 1000),
        ("256x256_diffusion_uncond.pt", "256x256_classifier.pt", 10.0, None, "linear", 1000),
        ("512x512_diffusion.pt", None, 4.0, None, "linear", 1000),
        ("lsun_cat.pt", None, 1.0, "1000", "linear", 0),
    ],
)
def test_released_pipeline_takes_its_defaults_from_the_table(
    tmp_path, unet, classifier, scale, respacing, beta_schedule, labels
):
    for file in filter(None, (unet, classifier)):
        torch.save(meta_state_dict(file), tmp_path / file)
    pipeline = ClassifierGuidedPipeline.from_openai(tmp_path / unet, classifier and tmp_path / classifier)
    assert pipeline.config.guidance_scale == scale
    assert pipeline.config.timestep_respacing == respacing
    assert pipeline.scheduler.config.beta_schedule == beta_schedule
    assert pipeline.scheduler.config.variance_type == "learned_range"
    assert len(pipeline.config.id2label or {}) == labels
    if labels:
        assert pipeline.class_ids(["goldfish"]) == [1]
