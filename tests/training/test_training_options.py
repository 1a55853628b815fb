"""Presets, configuration files, dry runs, and options that do not fit."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from golden_cases import meta_state_dict
from PIL import Image as PILImage
from tiny_models import tiny_unet

from diffusers_adm import ADMUNet2DModel, NoisyClassifier
from diffusers_adm.openai.flags import parse_flags
from diffusers_adm.openai.released import RELEASED_CHECKPOINTS
from diffusers_adm.training import train_classifier, train_unet, train_upsampler
from diffusers_adm.training.configuration import as_command_line, as_yaml
from diffusers_adm.training.options import preset_names
from diffusers_adm.training.plan import forward_cost
from diffusers_adm.training.setup import build_unet, model_config, set_up_accelerator


REQUIRED = ["--output_dir", "out", "--train_data_dir", "images"]
RELEASED = {
    "adm-64": "64x64_diffusion.pt",
    "adm-128": "128x128_diffusion.pt",
    "adm-256": "256x256_diffusion.pt",
    "adm-256-unconditional": "256x256_diffusion_uncond.pt",
    "adm-512": "512x512_diffusion.pt",
    "adm-lsun-bedroom": "lsun_bedroom.pt",
    "adm-lsun-cat": "lsun_cat.pt",
    "adm-lsun-horse": "lsun_horse.pt",
    "upsampler-256": "64_256_upsampler.pt",
    "upsampler-512": "128_512_upsampler.pt",
    "classifier-64": "64x64_classifier.pt",
    "classifier-128": "128x128_classifier.pt",
    "classifier-256": "256x256_classifier.pt",
    "classifier-512": "512x512_classifier.pt",
}


def script_of(preset):
    return {"classifier": train_classifier, "upsampler": train_upsampler}.get(preset.split("-")[0], train_unet)


@pytest.fixture
def folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.full((16, 16, 3), 40 * i, dtype=np.uint8)
            PILImage.fromarray(pixels).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.mark.parametrize("preset", RELEASED)
def test_presets_of_released_models_build_those_models(preset):
    script = script_of(preset)
    options = script.parse_args([*REQUIRED, "--preset", preset])
    published = meta_state_dict(RELEASED[preset])
    with torch.device("meta"):
        if script is train_classifier:
            model = NoisyClassifier(
                num_classes=1000,
                pool=options.classifier.pool,
                **model_config(options.architecture, options.format),
            )
        else:
            upsampler = script is train_upsampler
            model = build_unet(
                options, 1000 if options.classes.class_conditional else None, low_res_conditioning=upsampler
            )
    released = type(model).from_openai(published, RELEASED_CHECKPOINTS[RELEASED[preset]].flags)
    ignored = {"_use_default_values", "_class_name"}
    assert {k: v for k, v in model.config.items() if k not in ignored} == {
        k: v for k, v in released.config.items() if k not in ignored
    }
    flags = parse_flags(RELEASED_CHECKPOINTS[RELEASED[preset]].flags)
    if script is not train_classifier:
        assert options.diffusion.noise_schedule == flags["noise_schedule"]
    if script is train_upsampler:
        assert options.upsampler.low_resolution == flags["small_size"]


def test_every_preset_is_of_a_script():
    for preset in preset_names():
        assert script_of(preset).parse_args([*REQUIRED, "--preset", preset]).optimisation.max_train_steps >= 30_000


def test_command_line_wins_over_config_and_config_over_preset(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("max_train_steps: 7\nchannel_mult: [0.5, 1]\nrandom_flip: false\nlearning_rate: 2e-5\nseed: 3\n")
    options = train_unet.parse_args([*REQUIRED, "--preset", "small-32", "--config", str(config), "--seed", "9"])
    optimisation = options.optimisation
    assert (optimisation.max_train_steps, options.architecture.channel_mult) == (7, (0.5, 1.0))
    assert (optimisation.learning_rate, optimisation.seed, options.selection.random_flip) == (2e-5, 9, False)
    assert (options.classes.label_dropout, options.averages.ema_decay) == (0.1, (0.9999, 0.999))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: 3", "no option 'layers'"),
        ("- 1", "not a table"),
        (None, "no such file"),
        ("mixed_precision: no", "mixed_precision takes a value"),
        ("keep_every: 0", "--keep_every 0"),
    ],
)
def test_bad_configuration_files_are_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        train_unet.parse_args([*REQUIRED, "--max_train_steps", "1", "--config", str(tmp_path / "mine.yaml")])


def test_configuration_file_may_name_a_preset(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("preset: small-64\nseed: 3\nmixed_precision: 'no'\n")
    options = train_unet.parse_args([*REQUIRED, "--config", str(config)])
    optimisation = options.optimisation
    assert (optimisation.max_train_steps, optimisation.seed, optimisation.mixed_precision) == (150_000, 3, "no")
    assert options.format.resolution == 64


def test_options_on_a_card_are_a_command_line():
    given = "--max_train_steps 9 --no-random_flip --streaming --ema_decay 0.9,0.5 --no-learn_sigma --use_ema_warmup"
    options = train_unet.parse_args([*REQUIRED, *given.split()])
    words = [part for word in as_command_line(options) for part in word.split(" ")]
    again = train_unet.parse_args([*REQUIRED, *words])
    assert again == options
    assert "--no-use_8bit_adam" not in words


@pytest.mark.parametrize("distributed_type", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_launchers_that_divide_the_weights_are_refused(distributed_type, monkeypatch):
    monkeypatch.setattr(Accelerator, "distributed_type", distributed_type)
    with pytest.raises(ValueError, match=f"do not run under {distributed_type.value}"):
        set_up_accelerator(train_unet.parse_args([*REQUIRED, "--max_train_steps", "1"]))


def test_later_of_epochs_and_steps_wins():
    options = train_unet.parse_args([*REQUIRED, "--preset", "small-32", "--num_epochs", "3"])
    assert options.optimisation.num_epochs == 3
    options = train_unet.parse_args([*REQUIRED, "--num_epochs", "3", "--max_train_steps=7"])
    assert (options.optimisation.num_epochs, options.optimisation.max_train_steps) == (None, 7)


def test_steps_must_be_given(capsys):
    with pytest.raises(SystemExit):
        train_unet.parse_args(REQUIRED)
    assert "--max_train_steps" in capsys.readouterr().err


def test_saved_options_are_a_configuration_file(tmp_path):
    options = train_unet.parse_args([*REQUIRED, "--preset", "adm-512"])
    (tmp_path / "saved.yaml").write_text(as_yaml(options))
    again = train_unet.parse_args(["--config", str(tmp_path / "saved.yaml")])
    assert replace(again, config=None) == options


def test_dry_run_prints_the_plan_and_leaves_nothing(folder, tmp_path, capsys):
    options = f"--output_dir {tmp_path / 'out'} --train_data_dir {folder} --preset small-32 --dry_run".split()
    train_unet.main(
        train_unet.parse_args([*options, *"--train_batch_size 32 --total_batch_size 64 --mixed_precision no".split()])
    )
    out = capsys.readouterr().out
    assert "64 = 32 images x 2 accumulated x 1 processes" in out
    assert "GFLOPs" in out and "GiB" in out and "million" in out
    assert not (tmp_path / "out").exists()


def test_cost_is_that_of_the_network():
    with torch.device("meta"):
        released = ADMUNet2DModel.from_openai(
            meta_state_dict("256x256_diffusion.pt"), RELEASED_CHECKPOINTS["256x256_diffusion.pt"].flags
        )
    operations, _ = forward_cost(released)
    # 1120 GFLOPs in the text of the DiT paper (arXiv 2212.09748), which counts a multiplication and its addition as one.
    assert operations / 2 == pytest.approx(1120e9, rel=0.02)


def test_activations_are_what_a_backward_pass_keeps():
    model = tiny_unet()
    _, kept = forward_cost(model)
    storages, weights = {}, {parameter.data_ptr() for parameter in model.parameters()}

    def keep(tensor):
        if tensor.data_ptr() not in weights:
            storages[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = model(torch.randn(1, 3, 8, 8), torch.tensor([5]), torch.tensor([1])).sample
    assert output.requires_grad
    assert kept == pytest.approx(sum(tensor.untyped_storage().nbytes() for tensor in storages.values()), rel=0.1)


def test_total_batch_must_be_divisible(folder, tmp_path):
    options = f"--output_dir {tmp_path / 'out'} --train_data_dir {folder} --preset small-32 --dry_run".split()
    with pytest.raises(ValueError, match="--total_batch_size 64 is not a multiple of 48"):
        train_unet.main(
            train_unet.parse_args(
                [*options, *"--train_batch_size 48 --total_batch_size 64 --mixed_precision no".split()]
            )
        )
