"""Presets, configuration files, and options that a resumed run may change."""

import re
from dataclasses import replace

import pytest
import torch
from accelerate.utils import PrecisionType
from diffusers.optimization import SchedulerType
from golden_cases import meta_state_dict

from diffusers_adm import NoisyClassifier
from diffusers_adm.models.blocks import RESAMPLE_TYPES, TIME_SCALE_SHIFTS
from diffusers_adm.openai.flags import parse_flags
from diffusers_adm.openai.released import find_released
from diffusers_adm.options import options_of
from diffusers_adm.training import train_classifier, train_unet, train_upsampler
from diffusers_adm.training.configuration import as_command_line, as_yaml, contradictions
from diffusers_adm.training.objective import build_noise_scheduler
from diffusers_adm.training.options import LR_SCHEDULERS, MIXED_PRECISIONS, UNetTrainingOptions, preset_names
from diffusers_adm.training.setup import build_unet, model_config


REQUIRED = ["--output_dir", "out", "--train_data_dir", "images"]
# Each line has nine times the values of the one before.
ALIASES = "a: &a [x]\n" + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 9)}]\n" for a, b in zip("abcdefgh", "bcdefghi"))
RELEASED = {
    "adm-64": "64x64_diffusion.pt",
    "adm-128": "128x128_diffusion.pt",
    "adm-256": "256x256_diffusion.pt",
    "adm-256-unconditional": "256x256_diffusion_uncond.pt",
    "adm-512": "512x512_diffusion.pt",
    "adm-lsun-bedroom": "lsun_bedroom.pt",
    "adm-lsun-cat": "lsun_cat.pt",
    "adm-lsun-horse": "lsun_horse.pt",
    "edm-64": "edm_imagenet64_ema.pt",
    "edm-lsun": "edm_cat256_ema.pt",
    "upsampler-256": "64_256_upsampler.pt",
    "upsampler-512": "128_512_upsampler.pt",
    "classifier-64": "64x64_classifier.pt",
    "classifier-128": "128x128_classifier.pt",
    "classifier-256": "256x256_classifier.pt",
    "classifier-512": "512x512_classifier.pt",
}


def script_of(preset):
    return {"classifier": train_classifier, "upsampler": train_upsampler}.get(preset.split("-")[0], train_unet)


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
                num_train_timesteps=options.diffusion.num_train_timesteps,
                beta_schedule=build_noise_scheduler(options.diffusion).config.beta_schedule,
                **model_config(options.architecture, options.format),
            )
        else:
            upsampler = script is train_upsampler
            model = build_unet(
                options, 1000 if options.classes.class_conditional else None, low_res_conditioning=upsampler
            )
    row = find_released(RELEASED[preset])
    released = type(model).from_openai(published, row.flags)
    ignored = {"_use_default_values", "_class_name"}
    assert {k: v for k, v in model.config.items() if k not in ignored} == {
        k: v for k, v in released.config.items() if k not in ignored
    }
    flags = parse_flags(row.flags)
    if script is not train_classifier and "training_mode" not in flags:
        assert options.diffusion.noise_schedule == flags["noise_schedule"]
    if script is train_upsampler:
        assert options.upsampler.low_resolution == flags["small_size"]


def test_every_preset_is_of_one_script(capsys):
    for preset in preset_names():
        own = script_of(preset)
        assert own.parse_args([*REQUIRED, "--preset", preset]).optimisation.max_train_steps >= (
            3000 if "cifar" in preset else 30_000
        )
        for other in {train_unet, train_classifier, train_upsampler} - {own}:
            with pytest.raises(SystemExit):
                other.parse_args([*REQUIRED, "--preset", preset])
            assert f"argument --preset: invalid choice: '{preset}'" in capsys.readouterr().err


def test_command_line_wins_over_config_and_config_over_preset(tmp_path):
    config = tmp_path / "mine.yaml"
    config.write_text("max_train_steps: 7\nchannel_mult: [0.5, 1]\nrandom_flip: false\nlearning_rate: 2e-5\nseed: 3\n")
    options = train_unet.parse_args([*REQUIRED, "--preset", "small-32", "--config", str(config), "--seed", "9"])
    optimisation = options.optimisation
    assert (optimisation.max_train_steps, options.architecture.channel_mult) == (7, (0.5, 1.0))
    assert (optimisation.learning_rate, optimisation.seed, options.selection.random_flip) == (2e-5, 9, False)
    assert (options.classes.label_dropout, options.averages.ema_decay) == (0.1, (0.9999, 0.999))
    config.write_text("gradient_checkpointing: false\ntotal_batch_size: null\n")
    options = train_upsampler.parse_args([*REQUIRED, "--preset", "upsampler-512", "--config", str(config)])
    assert not options.architecture.gradient_checkpointing and options.optimisation.total_batch_size is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: 3", "no option 'layers'"),
        ("- 1", "not a table"),
        (None, "no such file"),
        ("mixed_precision: no", "mixed_precision takes a value"),
        ("keep_every: 0", "--keep_every 0"),
        ("seed: [1", "not a table of options and values: expected .* in line 1"),
        ("seed:\n\t- 1", "not a table of options and values: found character .* in line 2"),
        ("seed: 1\n---\nseed: 2", "not a table of options and values: but found another document in line 2"),
        ("seed: 2026-13-45", "not a table of options and values: month must be in 1..12"),
        (ALIASES, "not a table of options and values: found an alias in place of a value in line 2"),
    ],
)
def test_bad_configuration_files_are_refused(text, message, tmp_path):
    if text is not None:
        (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        train_unet.parse_args([*REQUIRED, "--max_train_steps", "1", "--config", str(tmp_path / "mine.yaml")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--max_grad_norm -1", "--max_grad_norm -1.0 must be above 0."),
        ("--max_grad_norm 0", "--max_grad_norm 0.0 must be above 0."),
        ("--max_grad_norm nan", "--max_grad_norm nan must be finite."),
        ("--learning_rate inf", "--learning_rate inf must be finite."),
        ("--learning_rate -1", "--learning_rate -1.0 must be at least 0."),
        ("--lr_warmup_steps -1", "--lr_warmup_steps -1 must be at least 0."),
        ("--output_scale_factor 0", "--output_scale_factor 0.0 must be above 0."),
        ("--channel_mult 1,nan", "--channel_mult 1.0,nan must be finite."),
        ("--channel_mult 1,0", "--channel_mult 1.0,0.0 must be one or more factors above 0."),
        ("--adam_beta2 1", "--adam_beta2 1.0 must be in [0, 1)."),
        ("--noise_offset nan", "--noise_offset nan must be finite."),
    ],
)
def test_numbers_that_mean_nothing_are_refused(words, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train_unet.parse_args([*REQUIRED, "--max_train_steps", "1", *words.split()])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--no-learn_sigma --vlb_weight 5", "--vlb_weight 5.0 requires the hybrid loss and a learned variance. Leave it out."),
        ("--loss vlb --vlb_weight 5", "--vlb_weight 5.0 requires the hybrid loss and a learned variance. Leave it out."),
        ("--ema_power 0.1", "--ema_power 0.1 has no effect without --use_ema_warmup. Leave it out."),
    ],
)  # fmt: skip
def test_options_without_effect_are_refused(words, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        train_unet.parse_args([*REQUIRED, "--max_train_steps", "1", *words.split()])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--preset nonsense", "argument --preset: invalid choice: 'nonsense'"),
        ("--pretrained_model_name_or_path", "argument --pretrained_model_name_or_path: expected one argument"),
        ("--config", "argument --config: expected one argument"),
    ],
)
def test_mistakes_that_are_met_before_the_options_are_parsed_are_told_in_one_line(words, message, capsys):
    with pytest.raises(SystemExit):
        train_unet.parse_args([*REQUIRED, *words.split()])
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line and line.endswith("--help)")


def test_options_of_a_checkpoint_do_not_resume_what_it_resumed():
    words = ["--max_train_steps", "1", "--resume_from_checkpoint", "latest"]
    assert "resume_from_checkpoint" not in as_yaml(train_unet.parse_args([*REQUIRED, *words]))


def test_choices_of_schedules_are_listed(capsys):
    with pytest.raises(SystemExit):
        train_unet.parse_args([*REQUIRED, "--max_train_steps", "1", "--lr_scheduler", "foo"])
    assert "constant_with_warmup" in capsys.readouterr().err.splitlines()[-1]


def test_choices_are_those_of_the_code_that_is_given_them():
    # Options are declared without imports of these libraries, so that help comes at once.
    # The others need arguments of their own.
    others = {"piecewise_constant", "cosine_with_restarts", "polynomial"}
    assert set(LR_SCHEDULERS) == {schedule.value for schedule in SchedulerType} - others
    assert set(MIXED_PRECISIONS) == {precision.value for precision in PrecisionType} - {"fp8"}
    known = options_of(UNetTrainingOptions)
    assert set(known["resnet_time_scale_shift"].choices) == set(TIME_SCALE_SHIFTS)
    assert set(known["resample_type"].choices) == set(RESAMPLE_TYPES)


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


@pytest.mark.parametrize(
    ("before", "after", "differing"),
    [
        ("", "--learning_rate 1e-5 --output_dir elsewhere --num_validation_images 3 --compile", []),
        ("", "--seed 1 --channel_mult 1,2", ["--channel_mult [1.0, 2.0] (was [1, 2, 3, 4])", "--seed 1 (was 0)"]),
        ("", "--train_batch_size 32", ["--train_batch_size 32 (was 64)"]),
        ("--total_batch_size 64", "--total_batch_size 64 --train_batch_size 32", []),
        ("", "--dataloader_num_workers 2", []),
        ("--streaming", "--streaming --dataloader_num_workers 2", ["--dataloader_num_workers 2 (was 0)"]),
    ],
)
def test_resumed_run_may_change_what_does_not_decide_what_is_trained(before, after, differing):
    before, after = (
        train_unet.parse_args([*REQUIRED, "--max_train_steps", "1", *words.split()]) for words in (before, after)
    )
    assert contradictions(after, as_yaml(before)) == differing


def test_an_equal_run_may_change_less_than_a_resumed_run():
    before, after = (
        train_unet.parse_args([*REQUIRED, "--max_train_steps", "1", *words.split()])
        for words in ("", "--learning_rate 1e-5 --mixed_precision bf16 --output_dir elsewhere --compile")
    )
    differing = ["--learning_rate 1e-05 (was 0.0001)", "--mixed_precision bf16 (was None)"]
    assert contradictions(after, as_yaml(before), exact=True) == differing


def test_checkpoints_of_other_versions_may_lack_options_or_have_more():
    options = train_unet.parse_args([*REQUIRED, "--max_train_steps", "1"])
    lines = [line for line in as_yaml(options).splitlines() if not line.startswith("noise_offset:")]
    assert contradictions(options, "\n".join([*lines, "an_option_that_is_gone: 3"])) == []
