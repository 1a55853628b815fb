"""Training of UNets that are given the noise level."""

import json

import pytest
import torch
from diffusers import HeunDiscreteScheduler
from tiny_models import draw_parameters
from training_runs import checkpoint_tensors, unet_args, upsampler_args, without_times

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline
from diffusers_adm.models import ADMUNet2DModel
from diffusers_adm.training import train_unet, train_upsampler
from diffusers_adm.training.objective import NoiseLevelObjective, sampling_defaults
from diffusers_adm.training.setup import build_unet


EDM = "--preconditioning edm --no-learn_sigma --timestep_scale 1000".split()


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_noise_levels_and_loss_are_those_of_the_paper(dataset, tmp_path):
    more = "--sigma_data", "0.25", "--no-class_conditional", "--label_dropout", "0"
    options = unet_args(dataset, tmp_path, 1, *EDM, *more)
    unet, told = build_unet(options, num_classes=None), []
    unet.register_forward_pre_hook(lambda module, inputs: told.append(inputs[1]))
    objective = NoiseLevelObjective(options, conditions=lambda batch: {})
    torch.manual_seed(0)
    with torch.no_grad():
        terms = objective(unet, {"image": 0.25 * torch.randn(1000, 1, 16, 16)})
    log_sigma = told[0].log()
    assert log_sigma.mean() == pytest.approx(-1.2, abs=0.12) and log_sigma.std() == pytest.approx(1.2, abs=0.1)
    # A new UNet returns the best guess for noise as an image, whose loss is 1 at every noise level.
    torch.testing.assert_close(terms.loss.mean(), torch.tensor(1.0), rtol=0, atol=0.01)
    order = told[0].argsort()
    for quarter in terms.loss[order].split(250):
        torch.testing.assert_close(quarter.mean(), torch.tensor(1.0), rtol=0, atol=0.02)
    # Metrics are divided into quarters by the rank of the noise level.
    assert terms.timestep[order].diff().min() >= 0
    counts = torch.bincount(terms.timestep * 4 // 1000)
    assert len(counts) == 4 and counts.min() > 200


def test_run_resumes_exactly_and_its_pipeline_draws(dataset, tmp_path):
    more = *EDM, "--validation_split", "train", "--validation_steps", "3"
    train_unet.main(unet_args(dataset, tmp_path / "once", 4, *more))
    train_unet.main(unet_args(dataset, tmp_path / "twice", 3, *more))
    train_unet.main(unet_args(dataset, tmp_path / "twice", 4, *more, "--resume_from_checkpoint", "latest"))
    once, twice = (checkpoint_tensors(tmp_path / name / "checkpoint-4") for name in ("once", "twice"))
    assert all(torch.equal(once[name][key], twice[name][key]) for name in once for key in once[name])
    logged = without_times(metrics(tmp_path / "once"))
    assert logged[-1].keys() >= {"validation_loss", "validation_loss_quarter_1"}
    # The fresh UNet's loss is near 1, the error of a network that returns zeros.
    assert 0.1 < logged[0]["loss"] < 5

    pipeline = ClassifierGuidedPipeline.from_pretrained(tmp_path / "once" / "pipeline")
    assert isinstance(pipeline.scheduler, HeunDiscreteScheduler) and pipeline.config.num_inference_steps == 40
    assert pipeline.unet.config.preconditioning == "edm"
    assert pipeline(["left", "right"], num_inference_steps=2).images[0].size == (16, 16)
    assert (tmp_path / "once" / "samples" / "step-4.png").exists()
    card = (tmp_path / "once" / "pipeline" / "README.md").read_text()
    assert "--preconditioning edm" in card and "--log_sigma_mean=-1.2" in card


def test_upsampler_is_trained_too(dataset, tmp_path):
    train_upsampler.main(upsampler_args(dataset, tmp_path, 1, *EDM))
    pipeline = ADMUpsamplePipeline.from_pretrained(tmp_path / "pipeline")
    drawn = pipeline(torch.rand(1, 1, 4, 4), class_labels=[0], num_inference_steps=2).images[0]
    assert drawn.size == (16, 16)


@pytest.mark.parametrize("preconditioning", ["edm", "consistency"])
def test_run_starts_from_a_trained_model(preconditioning, dataset, tmp_path, caplog):
    options = unet_args(dataset, tmp_path, 1, *EDM)
    config = {**build_unet(options, num_classes=2).config, "preconditioning": preconditioning}
    start = draw_parameters(ADMUNet2DModel.from_config(config))
    ClassifierGuidedPipeline(start, **sampling_defaults(options)).save_pretrained(tmp_path / "start")
    more = "--pretrained_model_name_or_path", str(tmp_path / "start"), "--learning_rate", "0"
    train_unet.main(unet_args(dataset, tmp_path / "run", 1, *EDM, *more))
    trained = checkpoint_tensors(tmp_path / "run" / "checkpoint-1")["model.safetensors"]
    assert all(torch.equal(tensor, trained[key]) for key, tensor in start.state_dict().items())
    assert ("is a consistency model" in caplog.text) == (preconditioning == "consistency")
    with pytest.raises(ValueError, match=f"preconditioning {preconditioning} instead of None"):
        train_unet.main(unet_args(dataset, tmp_path / "other", 1, *more))


@pytest.mark.parametrize(
    "more, message",
    [
        (["--preconditioning", "edm"], "requires --no-learn_sigma"),
        ([*EDM, "--loss", "vlb"], "--loss has no effect with --preconditioning edm. Leave out --loss vlb."),
        ([*EDM, "--schedule_sampler", "loss-second-moment"], "--schedule_sampler has no effect"),
        ([*EDM, "--sigma_min", "90"], "`sigma_min` must be the smaller one, but got 90.0"),
        (["--log_sigma_std", "2"], "--log_sigma_std requires a UNet with --preconditioning"),
    ],
)
def test_options_that_do_not_fit_are_refused(more, message, dataset, tmp_path):
    with pytest.raises(ValueError, match=message):
        train_unet.main(unet_args(dataset, tmp_path, 1, *more))
