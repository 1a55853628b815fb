"""Conversion of published checkpoints both ways, and what their shapes tell."""

import pytest
import torch
from golden_cases import CLASSIFIER_CASES, UNET_CASES, draw_weights, load, load_case, model_class, published_flags
from tiny_models import tiny_classifier

from diffusers_adm import ADMUNet2DModel, ADMUpsamplePipeline, ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.openai.checkpoints import PublishedCheckpoint


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
    assert all(parameter.requires_grad for parameter in model.parameters())
    # As the original code's convert_to_fp16 leaves them.
    mixed = {name: tensor if tensor.ndim == 4 else tensor.float() for name, tensor in published.items()}
    model = ADMUNet2DModel.from_openai(mixed, published_flags(description))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def train(model: torch.nn.Module) -> None:
    """Changes each weight of a model."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("case", UNET_CASES + CLASSIFIER_CASES)
def test_training_a_converted_model_changes_no_other_tensors(case, dtype, tmp_path):
    description, _ = load_case(case)
    published, flags = draw_weights(description), published_flags(description)
    before = {name: tensor.clone() for name, tensor in published.items()}
    model = model_class(case).from_openai(published, flags, dtype=dtype)
    back = model.to_openai_state_dict()
    exported = {name: tensor.clone() for name, tensor in back.items()}
    twin = model_class(case).from_openai(back, flags)
    weights = [weight.clone() for weight in twin.parameters()]
    train(model)
    assert all(torch.equal(published[name], tensor) for name, tensor in before.items())
    assert all(torch.equal(back[name], tensor) for name, tensor in exported.items())
    assert all(torch.equal(weight, other) for weight, other in zip(twin.parameters(), weights))
    assert all(tensor.is_contiguous() for tensor in back.values())

    torch.save(published, tmp_path / "model.pt")
    checkpoint = PublishedCheckpoint(tmp_path / "model.pt", flags)
    models = [model_class(case).from_openai(checkpoint, dtype=dtype) for _ in range(2)]
    weights = [weight.clone() for weight in models[1].parameters()]
    train(models[0])
    assert all(torch.equal(weight, other) for weight, other in zip(models[1].parameters(), weights))


@pytest.mark.parametrize("case", ["unet_class_conditional", "classifier_attention", "upsampler"])
def test_weights_are_cast_and_checkpoint_stays_as_it_is(case):
    description, _ = load_case(case)
    published, flags = draw_weights(description), published_flags(description)
    before = {name: tensor.clone() for name, tensor in published.items()}
    cast = model_class(case).from_openai(published, flags, dtype=torch.bfloat16)
    whole = model_class(case).from_openai(published, flags)
    assert all(torch.equal(published[name], tensor) for name, tensor in before.items())
    for name, parameter in whole.named_parameters():
        assert torch.equal(cast.get_parameter(name), parameter.bfloat16())
    for dtype in ("float16", torch.int8):
        with pytest.raises(ValueError, match="`dtype` must be a floating-point type"):
            model_class(case).from_openai(published, flags, dtype=dtype)


def test_pipelines_are_cast(pipeline_files):
    unet, classifier, flags = pipeline_files
    pipeline = ClassifierGuidedPipeline.from_openai(unet, classifier, flags, dtype=torch.float16)
    assert (pipeline.unet.dtype, pipeline.classifier.dtype) == (torch.float16, torch.float16)
    description, _ = load_case("upsampler")
    upsampler = f"{published_flags(description)} --small_size 8"
    pipeline = ADMUpsamplePipeline.from_openai(draw_weights(description), upsampler, dtype=torch.float16)
    assert pipeline.unet.dtype == torch.float16


@pytest.mark.parametrize(
    "options",
    [
        {"norm_num_groups": 16},
        {"output_scale_factor": 2**0.5},
        {"use_null_class": True, "num_class_embeds": 3},
        {"upsample_type": "conv"},
        {"sigma_data": 0.3, "preconditioning": "edm", "out_channels": 3, "timestep_scale": 1000.0},
        {"timestep_scale": 250.0, "preconditioning": "consistency", "out_channels": 3},
    ],
)
def test_no_way_back_for_what_the_published_code_does_not_know(options):
    model = ADMUNet2DModel(
        sample_size=8, model_channels=32, channel_mult=(1,), attention_resolutions=(), attention_head_dim=32, **options
    )
    with pytest.raises(ValueError, match=next(iter(options))):
        model.to_openai_state_dict()


def test_no_way_back_for_a_classifier_with_a_number_of_heads():
    with pytest.raises(ValueError, match="`num_attention_heads` must be None"):
        tiny_classifier(
            norm_num_groups=32, model_channels=32, attention_head_dim=None, num_attention_heads=2
        ).to_openai_state_dict()


# --- What shapes tell ---


@pytest.mark.parametrize(
    "config",
    [
        {"channel_mult": (0.5, 1, 2), "layers_per_block": 1, "attention_resolutions": (8,)},
        {"channel_mult": (1, 1.5), "layers_per_block": 3, "attention_resolutions": (32, 16)},
        {"channel_mult": (1, 1, 1), "layers_per_block": 2, "attention_resolutions": ()},
        {"channel_mult": (2,), "layers_per_block": 2, "attention_resolutions": (32,)},
        {"channel_mult": (1, 2), "layers_per_block": 1, "downsample_type": "conv", "upsample_type": "conv"},
        {"channel_mult": (1, 2, 2), "layers_per_block": (1, 3, 2), "downsample_type": "conv", "upsample_type": "conv"},
        {"channel_mult": (1, 2), "layers_per_block": (1, 2)},
        {"channel_mult": (1, 1, 1), "layers_per_block": (3, 1, 1), "attention_resolutions": ()},
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
    elif isinstance(config["layers_per_block"], tuple):
        flags += f" --num_res_blocks {','.join(map(str, config['layers_per_block']))}"
    read = ADMUNet2DModel.from_openai(model.to_openai_state_dict(), flags).config
    assert {name: read[name] for name in config} == config


@pytest.mark.parametrize("depths", [None, "2", "1,1", "2,1", "1,2,1", "0,3", "-2,5"])
def test_depths_that_the_levels_do_not_have_are_refused(depths):
    config = {"sample_size": 32, "model_channels": 32, "channel_mult": (1, 2), "layers_per_block": (1, 2)}
    with torch.device("meta"):
        model = ADMUNet2DModel(**config, attention_resolutions=(16,), attention_head_dim=32)
    flags = "--image_size 32 --num_head_channels 32 --resblock_updown True"
    flags += "" if depths is None else f" --num_res_blocks {depths}"
    with pytest.raises(ValueError, match="pass --num_res_blocks with one number per level, such as 1,2"):
        ADMUNet2DModel.from_openai(model.to_openai_state_dict(), flags)


@pytest.mark.parametrize("channels", [2, 6])
def test_flags_tell_images_of_many_channels_from_upsamplers(channels):
    config = {"sample_size": 32, "model_channels": 32, "channel_mult": (1, 2), "layers_per_block": 1}
    config |= {"attention_resolutions": (16,), "attention_head_dim": 32, "num_class_embeds": None}
    shared = "--image_size 32 --num_head_channels 32 --resblock_updown True"
    with torch.device("meta"):
        many = ADMUNet2DModel(in_channels=channels, out_channels=channels, **config).to_openai_state_dict()
        upsampler = ADMUNet2DModel(
            in_channels=channels // 2, out_channels=channels, low_res_conditioning=True, **config
        ).to_openai_state_dict()
    assert {name: tensor.shape for name, tensor in many.items()} == {n: t.shape for n, t in upsampler.items()}

    read = ClassifierGuidedPipeline.from_openai(many, flags=f"{shared} --learn_sigma False").unet.config
    assert (read.in_channels, read.out_channels, read.low_res_conditioning) == (channels, channels, False)
    for flags in ("--learn_sigma True", "--large_size 32", "--small_size 8"):
        read = ADMUNet2DModel.from_openai(upsampler, f"{shared} {flags}").config
        assert (read.in_channels, read.out_channels, read.low_res_conditioning) == (channels // 2, channels, True)
    with pytest.raises(ValueError, match="flags contradict the checkpoint"):
        ADMUNet2DModel.from_openai(many, f"{shared} --learn_sigma False --large_size 32")
    with pytest.raises(ValueError, match="pass --learn_sigma False"):
        ClassifierGuidedPipeline.from_openai(many, flags=shared)


@pytest.mark.parametrize("pool", ["attention", "adaptive", "spatial", "spatial_v2"])
@pytest.mark.parametrize(
    "depth, channel_mult", [(1, (1, 2, 2)), (3, (1, 1, 2, 2)), (2, (0.5, 1)), ((1, 3, 1), (1, 1, 2))]
)
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
    if isinstance(depth, tuple):
        flags += f" --classifier_depth {','.join(map(str, depth))}"
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
    with pytest.raises(ValueError, match="--classifier_depth must be one of .*, but got 4"):
        NoisyClassifier.from_openai(published, f"{flags} --classifier_depth 4")
