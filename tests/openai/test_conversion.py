"""Published checkpoints: conversion both ways, flags, files, the pipeline around them, the command line."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from golden_cases import RELEASED, draw_weights, load_case, meta_state_dict, published_flags

from diffusers_adm import (
    ADMUNet2DModel,
    ADMUpsamplePipeline,
    ClassifierGuidedPipeline,
    NoisyClassifier,
    default_cascade,
    default_model,
)
from diffusers_adm.cli import build_parser, main
from diffusers_adm.hub.cards import card_name, released_card
from diffusers_adm.openai.flags import parse_flags
from diffusers_adm.openai.released import PRESETS


# The multipliers that the published code takes for an image size; a super-resolution UNet has those of 256 at any.
CHANNEL_MULT = {64: (1, 2, 3, 4), 128: (1, 1, 2, 3, 4), 256: (1, 1, 2, 2, 4, 4), 512: (0.5, 1, 1, 2, 2, 4, 4)}
UNET_CASES = ("unet_class_conditional", "unet_unconditional_plain", "upsampler")
CLASSIFIER_CASES = ("classifier_attention", "classifier_adaptive", "classifier_spatial", "classifier_spatial_v2")


def model_class(case):
    return NoisyClassifier if case in CLASSIFIER_CASES else ADMUNet2DModel


def load(case, *extra_flags):
    description, _ = load_case(case)
    flags = " ".join([published_flags(description), *extra_flags])
    return model_class(case).from_openai(draw_weights(description), flags)


@pytest.fixture
def pipeline_files(tmp_path):
    """Files of a UNet and a classifier, and the flags of both."""
    unet, classifier = load_case("unet_class_conditional")[0], load_case("classifier_attention")[0]
    torch.save(draw_weights(unet), tmp_path / "unet.pt")
    torch.save(draw_weights(classifier), tmp_path / "classifier.pt")
    return tmp_path / "unet.pt", tmp_path / "classifier.pt", f"{published_flags(unet)} {published_flags(classifier)}"


# --- Released checkpoints ---


def test_the_table_lists_all_released_checkpoints_with_their_recorded_flags():
    assert set(PRESETS) == set(RELEASED)
    for file, preset in PRESETS.items():
        flags, recorded = parse_flags(preset.flags), parse_flags(RELEASED[file]["flags"])
        assert recorded.items() <= flags.items()
        assert preset.url.endswith(f"/diffusion/jul-2021/{file}")
        assert (preset.fid is None) == (preset.kind == "classifier")


@pytest.mark.parametrize("file", RELEASED)
def test_released_checkpoint_converts_completely_both_ways(file):
    published = meta_state_dict(file)
    cls = NoisyClassifier if PRESETS[file].kind == "classifier" else ADMUNet2DModel
    model = cls.from_openai(published, RELEASED[file]["flags"])
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not model.training
    assert sum(p.numel() for p in model.parameters()) == sum(tensor.numel() for tensor in published.values())
    back = model.to_openai_state_dict()
    assert {name: tensor.shape for name, tensor in back.items()} == {n: t.shape for n, t in published.items()}


@pytest.mark.parametrize("file", RELEASED)
def test_released_checkpoint_has_the_config_that_its_flags_say(file):
    kind, flags = PRESETS[file].kind, parse_flags(PRESETS[file].flags)
    cls = NoisyClassifier if kind == "classifier" else ADMUNet2DModel
    config = cls.from_openai(meta_state_dict(file), PRESETS[file].flags).config
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
    converted = cls.from_openai(meta_state_dict(file), PRESETS[file].flags)
    hidden = ("_use_default_values",)
    assert {k: v for k, v in converted.config.items() if k not in hidden} == {
        k: v for k, v in default.config.items() if k not in hidden
    }


def test_name_of_a_released_file_needs_no_flags(tmp_path):
    torch.save(meta_state_dict("64x64_classifier.pt"), tmp_path / "64x64_classifier.pt")
    assert NoisyClassifier.from_openai(str(tmp_path / "64x64_classifier.pt")).config.layers_per_block == 4
    with pytest.raises(ValueError, match="classifier_depth 2.*holds 4"):
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


# --- Flags ---


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
        ("--image_size", "image_size lacks a value"),
        ("--image_size --class_cond True", "image_size lacks a value"),
        ("--image_size big", "image_size takes an integer: got 'big'"),
        ("--class_cond maybe", "class_cond takes True or False: got 'maybe'"),
        ("--attention_resolutions 16;8", "attention_resolutions takes integers"),
        ("image_size 64", "'image_size' stands where a flag"),
        ("--model_path 'a", "cannot be read"),
        ("--image_size 0", "image_size must be at least 1"),
        ("--num_head_channels 0", "num_head_channels must be at least 1"),
        ("--num_heads 2 --num_heads_upsample 4", "num_heads_upsample 4 is not supported"),
        ("--rescale_timesteps True --diffusion_steps 4000", "rescale_timesteps True"),
        (["--image_size", "64"], "one string"),
    ],
)
def test_flags_that_cannot_be_used_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        ADMUNet2DModel.from_openai(meta_state_dict("64x64_diffusion.pt"), flags)


@pytest.mark.parametrize(
    "case, flags, message",
    [
        ("unet_class_conditional", "--num_channels 64", "num_channels 64 was given, the checkpoint holds 32"),
        ("unet_class_conditional", "--num_res_blocks 2", "num_res_blocks 2 .* holds 1"),
        ("unet_class_conditional", "--channel_mult 1,2,3", "channel_mult 1,2,3 .* holds 1,2,2"),
        ("unet_class_conditional", "--attention_resolutions 32,8", "attention_resolutions 32,8 .* holds 16,8"),
        ("unet_class_conditional", "--image_size 64", "attention_resolutions 16,8 .* holds 32,16"),
        ("unet_class_conditional", "--class_cond False", "class_cond False .* holds True"),
        ("unet_class_conditional", "--learn_sigma False", "learn_sigma False .* holds True"),
        ("unet_class_conditional", "--use_scale_shift_norm False", "use_scale_shift_norm False .* holds True"),
        ("unet_class_conditional", "--resblock_updown False", "resblock_updown False .* holds True"),
        ("unet_class_conditional", "--small_size 8", "small_size 8 .* no low-resolution input"),
        ("unet_unconditional_plain", "--resblock_updown True", "resblock_updown True .* holds False"),
        ("classifier_attention", "--image_size 64", "image_size 64 .* holds 32"),
        ("classifier_attention", "--classifier_width 64", "classifier_width 64 .* holds 32"),
        ("classifier_attention", "--classifier_depth 2", "classifier_depth 2 .* holds 1"),
        ("classifier_attention", "--classifier_pool spatial", "classifier_pool spatial .* holds attention"),
        ("classifier_attention", "--classifier_out_channels 10", "classifier_out_channels 10 .* holds 30"),
        ("classifier_adaptive", "--channel_mult 1,1,2", "channel_mult 1,1,2 .* holds 1,2,2"),
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


# --- Checkpoints that cannot be used ---


def test_unknown_checkpoint_without_flags_is_refused(pipeline_files):
    unet, classifier, flags = pipeline_files
    for checkpoint in (unet, draw_weights(load_case("unet_class_conditional")[0])):
        with pytest.raises(ValueError, match="flags are missing"):
            ADMUNet2DModel.from_openai(checkpoint)
    with pytest.raises(ValueError, match="flags are missing"):
        ClassifierGuidedPipeline.from_openai(unet, classifier)


def test_missing_released_file_says_where_it_is_to_be_had(tmp_path):
    with pytest.raises(ValueError, match="https://openaipublic.*/jul-2021/256x256_diffusion.pt"):
        ADMUNet2DModel.from_openai(tmp_path / "256x256_diffusion.pt")
    with pytest.raises(ValueError, match="does not exist"):
        ADMUNet2DModel.from_openai(tmp_path / "mine.pt", "--image_size 32")
    with pytest.raises(ValueError, match="does not exist"):
        ADMUNet2DModel.from_openai(tmp_path, "--image_size 32")


@pytest.mark.parametrize("kept", [0, 10, 1000, 0.5, 0.99])
def test_truncated_file_is_refused(pipeline_files, kept):
    unet, _, flags = pipeline_files
    content = unet.read_bytes()
    unet.write_bytes(content[: int(kept * len(content)) if isinstance(kept, float) else kept])
    with pytest.raises(ValueError, match="damaged or incomplete"):
        ADMUNet2DModel.from_openai(unet, flags)


class Malicious:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder):
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("save", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content))])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, save):
    save({"time_embed.0.weight": Malicious(tmp_path / "made")}, tmp_path / "unet.pt")
    with pytest.raises(ValueError, match="holds code"):
        ADMUNet2DModel.from_openai(tmp_path / "unet.pt", "--image_size 32")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        ({"step": 3}, "int under 'step'"),
        ({"state_dict": {"a": torch.zeros(1)}}, "dict under 'state_dict'"),
        ({"a": torch.zeros(1, dtype=torch.int64)}, "torch.int64 under 'a'"),
        (torch.zeros(3), "no state dict"),
        ([torch.zeros(3)], "no state dict"),
        ({}, "no state dict"),
    ],
)
def test_file_of_anything_but_tensors_by_name_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "unet.pt")
    with pytest.raises(ValueError, match=message):
        ADMUNet2DModel.from_openai(tmp_path / "unet.pt", "--image_size 32")


def test_old_torch_format_is_read(tmp_path):
    description, _ = load_case("unet_class_conditional")
    published = draw_weights(description)
    torch.save(published, tmp_path / "unet.pt", _use_new_zipfile_serialization=False)
    model = ADMUNet2DModel.from_openai(tmp_path / "unet.pt", published_flags(description))
    assert torch.equal(model.conv_out.weight, published["out.2.weight"])


@pytest.mark.parametrize("case", ["unet_class_conditional", "classifier_attention"])
def test_missing_tensor_is_named(case):
    description, _ = load_case(case)
    published = draw_weights(description)
    for name in list(published)[::7]:
        incomplete = {other: tensor for other, tensor in published.items() if other != name}
        with pytest.raises(ValueError, match=name):
            model_class(case).from_openai(incomplete, published_flags(description))


def test_left_over_and_misshapen_tensors_are_named():
    description, _ = load_case("unet_class_conditional")
    published, flags = draw_weights(description), published_flags(description)
    with pytest.raises(ValueError, match="left over: extra.weight"):
        ADMUNet2DModel.from_openai(published | {"extra.weight": torch.zeros(1)}, flags)
    with pytest.raises(ValueError, match=r"of another shape: out.0.bias \(31,\) instead of \(32,\)"):
        ADMUNet2DModel.from_openai(published | {"out.0.bias": torch.zeros(31)}, flags)


def test_a_classifier_is_not_a_unet_and_a_unet_not_a_classifier():
    with pytest.raises(ValueError, match="classifier's, not a UNet's"):
        ADMUNet2DModel.from_openai(draw_weights(load_case("classifier_spatial")[0]), "--image_size 32")
    with pytest.raises(ValueError, match="UNet's, not a classifier's"):
        NoisyClassifier.from_openai(draw_weights(load_case("unet_class_conditional")[0]), "--image_size 32")
    with pytest.raises(ValueError, match="lacks the tensor 'time_embed.0.weight'"):
        ADMUNet2DModel.from_openai({"layer1.conv.weight": torch.zeros(3, 3)}, "--image_size 32")


# --- Pipeline ---


@pytest.mark.parametrize(
    "flags, scheduler, expected",
    [
        ("", "DDPMScheduler", {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02, "clip_sample": True}),
        ("", "DDPMScheduler", {"prediction_type": "epsilon", "timestep_spacing": "linspace"}),
        ("--diffusion_steps 4000", "DDPMScheduler", {"num_train_timesteps": 4000, "beta_end": 0.005}),
        ("--noise_schedule cosine", "DDPMScheduler", {"beta_schedule": "squaredcos_cap_v2"}),
        ("--predict_xstart True", "DDPMScheduler", {"prediction_type": "sample"}),
        ("--clip_denoised False", "DDPMScheduler", {"clip_sample": False}),
        ("--use_ddim True", "DDIMScheduler", {"timestep_spacing": "leading", "steps_offset": 0}),
    ],
)
def test_flags_of_the_diffusion_process_become_the_schedulers_config(pipeline_files, flags, scheduler, expected):
    unet, classifier, model_flags = pipeline_files
    pipeline = ClassifierGuidedPipeline.from_openai(unet, classifier, f"{model_flags} {flags}")
    assert type(pipeline.scheduler).__name__ == scheduler
    assert {name: pipeline.scheduler.config[name] for name in expected} == expected


@pytest.mark.parametrize(
    "case, flags, variance_type",
    [
        ("unet_class_conditional", "", "learned_range"),
        ("unet_unconditional_plain", "", "fixed_large"),
        ("unet_unconditional_plain", "--sigma_small True", "fixed_small"),
    ],
)
def test_variance_becomes_the_schedulers_config(case, flags, variance_type):
    description, _ = load_case(case)
    flags = f"{published_flags(description)} {flags}"
    pipeline = ClassifierGuidedPipeline.from_openai(draw_weights(description), flags=flags)
    assert pipeline.scheduler.config.variance_type == variance_type
    assert pipeline.classifier is None


def test_respacing_and_scale_become_the_pipelines_defaults(pipeline_files):
    unet, classifier, flags = pipeline_files
    config = ClassifierGuidedPipeline.from_openai(unet, classifier, flags).config
    assert (config.timestep_respacing, config.guidance_scale, config.id2label) == (None, 1.0, None)
    flags += " --timestep_respacing ddim25 --classifier_scale 2.5"
    config = ClassifierGuidedPipeline.from_openai(unet, classifier, flags).config
    assert (config.timestep_respacing, config.guidance_scale) == ("ddim25", 2.5)


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--timestep_respacing 2000", "2000"),
        ("--noise_schedule quadratic", "noise_schedule quadratic is not one of"),
        ("--diffusion_steps 10", "at least 20"),
    ],
)
def test_flags_of_no_diffusion_process_are_refused(pipeline_files, flags, message):
    unet, classifier, model_flags = pipeline_files
    with pytest.raises(ValueError, match=message):
        ClassifierGuidedPipeline.from_openai(unet, classifier, f"{model_flags} {flags}")


def test_unprefixed_flags_describe_the_unet_alone(tmp_path):
    unet, _ = load_case("unet_class_conditional")
    with torch.device("meta"):
        classifier = NoisyClassifier(
            sample_size=32, model_channels=64, channel_mult=(1, 1, 2), layers_per_block=2, attention_resolutions=(8,)
        )
    flags = f"{published_flags(unet)} --classifier_width 64 --classifier_attention_resolutions 8"
    pipeline = ClassifierGuidedPipeline.from_openai(draw_weights(unet), classifier.to_openai_state_dict(), flags)
    assert pipeline.unet.config.channel_mult == (1, 2, 2)
    assert pipeline.classifier.config.channel_mult == (1, 1, 2)


# --- Command line ---


def test_convert_writes_a_pipeline_that_equals_the_checkpoints(pipeline_files, tmp_path, capsys):
    unet, classifier, flags = pipeline_files
    output = tmp_path / "converted" / "pipeline"
    words = ["convert", "--unet", str(unet), "--classifier", str(classifier), "--flags", flags]
    assert main([*words, "--output", str(output)]) == 0
    assert str(output) in capsys.readouterr().out
    saved = ClassifierGuidedPipeline.from_pretrained(output)
    direct = ClassifierGuidedPipeline.from_openai(unet, classifier, flags)
    sample, timestep, labels = torch.randn(2, 3, 32, 32), torch.tensor([10, 900]), torch.tensor([3, 4])
    with torch.no_grad():
        assert torch.equal(saved.unet(sample, timestep, labels).sample, direct.unet(sample, timestep, labels).sample)
        assert torch.equal(saved.classifier(sample, timestep).logits, direct.classifier(sample, timestep).logits)
    public = {name: value for name, value in direct.scheduler.config.items() if not name.startswith("_")}
    assert public.items() <= dict(saved.scheduler.config).items()
    assert list(output.parent.iterdir()) == [output]  # nothing unfinished is left beside it


def test_convert_casts_and_names_a_variant(pipeline_files, tmp_path):
    unet, classifier, flags = pipeline_files
    before = unet.read_bytes()
    (tmp_path / "out").mkdir()  # a folder that is empty may be there
    words = ["convert", "--unet", str(unet), "--classifier", str(classifier), "--flags", flags]
    assert main([*words, "--output", str(tmp_path / "out"), "--dtype", "float16", "--variant", "fp16"]) == 0
    saved = ClassifierGuidedPipeline.from_pretrained(tmp_path / "out", variant="fp16", dtype=torch.float16)
    expected = ClassifierGuidedPipeline.from_openai(unet, classifier, flags).to(torch.float16)
    for model, other in ((saved.unet, expected.unet), (saved.classifier, expected.classifier)):
        for name, parameter in other.named_parameters():
            assert torch.equal(model.get_parameter(name), parameter), name
    assert unet.read_bytes() == before


@pytest.mark.parametrize(
    "case, option, folder", [("upsampler", "--unet", "unet"), ("classifier_spatial", "--classifier", "")]
)
def test_convert_writes_an_upsampler_or_a_classifier_alone(case, option, folder, tmp_path):
    description, _ = load_case(case)
    torch.save(draw_weights(description), tmp_path / "model.pt")
    flags = published_flags(description) + (" --small_size 8" if case == "upsampler" else "")
    words = ["convert", option, str(tmp_path / "model.pt"), "--flags", flags]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    saved = model_class(case).from_pretrained(tmp_path / "out" / folder).state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in load(case).state_dict().items())
    if case == "upsampler":
        assert ADMUpsamplePipeline.from_pretrained(tmp_path / "out").config.low_res_size == 8


def test_convert_says_in_one_line_what_is_wrong(pipeline_files, tmp_path, capsys):
    unet, classifier, flags = pipeline_files
    full = tmp_path / "full"
    full.mkdir()
    (full / "file").touch()
    for words, message in (
        (["--unet", str(unet), "--output", str(tmp_path / "out")], "flags are missing"),
        (["--unet", str(tmp_path / "64x64_diffusion.pt"), "--output", str(tmp_path / "out")], "to be had at https"),
        (["--unet", str(unet), "--flags", flags, "--output", str(full)], "not an empty folder"),
        (["--output", str(tmp_path / "out")], "Nothing to convert"),
    ):
        assert main(["convert", *words]) == 2
        error = capsys.readouterr().err
        assert message in error
        assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()
    assert [path.name for path in full.iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_convert_needs_little_more_memory_than_the_file_has_bytes(tmp_path, dtype):
    file = tmp_path / "64x64_classifier.pt"
    torch.save({name: torch.zeros(shape) for name, shape in RELEASED[file.name]["parameters"]}, file)
    script = """
import resource, sys
from diffusers_adm.cli import main
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert main(sys.argv[1:]) == 0
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
    words = ["convert", "--classifier", str(file), "--output", str(tmp_path / "out"), "--dtype", dtype]
    run = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=True)
    assert int(run.stdout.split()[-1]) < 1.3 * file.stat().st_size


def test_cards_of_released_models_are_those_of_the_table():
    folder = Path(__file__).parents[2] / "model_cards"
    for preset in PRESETS.values():
        card = released_card(preset)
        assert (folder / card_name(preset) / "README.md").read_text() == str(card), "run `make cards`"
        (command,) = [line for line in str(card).splitlines() if line.startswith("diffusers-adm convert")]
        args = build_parser().parse_args(command.split()[1:])
        assert preset.file in (args.unet, args.classifier)
        assert {args.unet, args.classifier} - {None} <= PRESETS.keys()
    shipped = {Path(model).name for model in (default_model(), *default_cascade())}
    assert {path.parent.name for path in folder.glob("*/README.md")} == {*map(card_name, PRESETS.values()), *shipped}


def test_command_of_a_card_converts_and_leaves_the_card(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    preset = PRESETS["64x64_classifier.pt"]
    state_dict = {name: torch.zeros(shape) for name, shape in RELEASED[preset.file]["parameters"]}
    torch.save({name: tensor.half() for name, tensor in state_dict.items()}, preset.file)
    (command,) = [line for line in str(released_card(preset)).splitlines() if line.startswith("diffusers-adm convert")]
    assert main(command.split()[1:]) == 0
    assert (tmp_path / card_name(preset) / "README.md").read_text() == str(released_card(preset))
