"""Options of training that follow from the model that training starts from."""

import pytest
import torch
from golden_cases import draw_weights, load_case, published_flags
from training_runs import unet_args

from diffusers_adm import ClassifierGuidedPipeline, default_consistency_model, default_model
from diffusers_adm.models import NoisyClassifier
from diffusers_adm.training import train_classifier, train_unet
from diffusers_adm.training.objective import build_noise_scheduler
from diffusers_adm.training.pretrained_options import FOLLOWING, options_of_pretrained, warn_of_another_schedule
from diffusers_adm.training.setup import build_unet


RUN = "--max_train_steps 1 --train_batch_size 2 --ema_decay 0.5 --num_validation_images 1 --learning_rate 0".split()
COSINE = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}


@pytest.fixture
def start(dataset, tmp_path):
    """Command line of a run that starts from a model which differs in most options from the defaults."""
    words = "--timestep_scale 0.25 --num_train_timesteps 50 --layers_per_block 1,2 --no-learn_sigma".split()
    options = unet_args(dataset, tmp_path, 1, *words)
    scheduler = build_noise_scheduler(options.diffusion, learn_sigma=False)
    ClassifierGuidedPipeline(build_unet(options, num_classes=2), scheduler).save_pretrained(tmp_path / "start")
    words = ["--dataset_name", str(dataset), "--in_channels", "1", "--label_dropout", "0.3", *RUN]
    return ["--pretrained_model_name_or_path", str(tmp_path / "start"), *words]


def test_run_takes_architecture_and_schedule_from_the_model(start, tmp_path):
    train_unet.main(train_unet.parse_args([*start, "--output_dir", str(tmp_path / "run")]))
    first, tuned = (ClassifierGuidedPipeline.from_pretrained(tmp_path / name) for name in ("start", "run/pipeline"))
    assert tuned.unet.config.timestep_scale == 0.25
    assert COSINE.items() <= tuned.scheduler.config.items()
    expected = first.unet.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tuned.unet.state_dict().items())
    # A run that goes on has the options of its own, and does not need the model.
    (tmp_path / "start").rename(tmp_path / "gone")
    resume = ["--max_train_steps", "2", "--output_dir", str(tmp_path / "run"), "--resume_from_checkpoint", "latest"]
    train_unet.main(train_unet.parse_args([*start, *resume]))
    assert (tmp_path / "run" / "checkpoint-2").exists()
    with pytest.raises(ValueError, match="--resume_from_checkpoint must be the folder of a checkpoint, but .*nowhere"):
        train_unet.parse_args([*start, *resume[:-1], str(tmp_path / "nowhere")])
    config = tmp_path / "run" / "checkpoint-1" / "options.yaml"
    assert train_unet.parse_args(["--config", str(config)]).architecture.layers_per_block == (1, 2)


@pytest.mark.parametrize("kind", ["unet", "classifier", "consistency"])
def test_a_resumed_run_takes_all_options_that_the_model_gave(kind):
    folder = default_model()
    assert set(options_of_pretrained(kind, folder)) <= set(FOLLOWING)
    if kind == "consistency":
        assert set(options_of_pretrained(kind, default_consistency_model())) <= set(FOLLOWING)


def test_given_options_take_precedence_and_another_resolution_keeps_the_layers(start, tmp_path):
    options = train_unet.parse_args(
        [*start, "--resolution", "32", "--noise_schedule", "linear", "--output_dir", "run"]
    )
    assert options.format.resolution == 32
    assert options.architecture.attention_resolutions == (16,)
    assert options.diffusion.noise_schedule == "linear"
    assert options.diffusion.num_train_timesteps == 50
    preset = train_unet.parse_args([*start, "--preset", "small-32", "--output_dir", "run"])
    assert preset.architecture.timestep_scale == 1


def test_another_noise_schedule_is_said(start, tmp_path, caplog):
    options = train_unet.parse_args([*start, "--noise_schedule", "linear", "--output_dir", "run"])
    warn_of_another_schedule(build_unet(options, num_classes=2), options)
    assert "was trained with --noise_schedule cosine, but this run has linear" in caplog.text
    assert "--num_train_timesteps" not in caplog.text


@pytest.mark.parametrize(
    "case, more, preconditioning",
    [("unet_class_conditional", "", None), ("consistency_unet", " --training_mode edm", "edm")],
)
def test_file_of_the_original_code_tells_its_options(case, more, preconditioning, tmp_path):
    description = load_case(case)[0]
    torch.save(draw_weights(description), tmp_path / "model.pt")
    words = ["--pretrained_model_name_or_path", str(tmp_path / "model.pt"), "--output_dir", "run", *RUN]
    flags = published_flags(description) + more
    options = train_unet.parse_args([*words, "--train_data_dir", "a", "--pretrained_flags", flags])
    assert options.noise_levels.preconditioning == preconditioning
    assert options.objective.learn_sigma == (preconditioning is None)
    assert options.architecture.model_channels == 32


def test_classifier_takes_them_too(tmp_path):
    config = {
        "pool": "spatial",
        "model_channels": 32,
        "num_classes": 2,
        "sample_size": 16,
        "attention_resolutions": (8,),
    }
    NoisyClassifier(**config, channel_mult=(1, 2), **COSINE).save_pretrained(tmp_path)
    words = ["--pretrained_model_name_or_path", str(tmp_path), "--train_data_dir", "a", "--output_dir", "run"]
    options = train_classifier.parse_args([*words, "--max_train_steps", "1"])
    assert (options.classifier.pool, options.architecture.channel_mult) == ("spatial", (1, 2))
    assert (options.diffusion.noise_schedule, options.diffusion.num_train_timesteps) == ("cosine", 50)


def test_shipped_pipeline_is_known_by_its_name():
    words = ["--pretrained_model_name_or_path", "shipped:adm-cifar-32", "--train_data_dir", "a", "--output_dir", "run"]
    unet, classifier = (
        script.parse_args([*words, "--max_train_steps", "1"]) for script in (train_unet, train_classifier)
    )
    assert (unet.architecture.model_channels, unet.diffusion.noise_schedule) == (64, "cosine")
    assert (classifier.architecture.model_channels, classifier.classifier.pool) == (32, "attention")


def test_model_that_is_not_there_is_named(tmp_path):
    with pytest.raises(ValueError, match="There is no folder '.*nowhere/at/all'"):
        train_unet.parse_args(
            ["--pretrained_model_name_or_path", str(tmp_path / "nowhere/at/all"), "--output_dir", "run", *RUN]
        )
