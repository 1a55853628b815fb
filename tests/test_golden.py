"""The package computes what the published implementation computes: networks, gradients and whole sampling runs."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from golden_cases import draw_weights, load_case, published_flags

from diffusers_adm import ADMUNet2DModel, ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.guidance import classifier_gradient


UNETS = ("unet_class_conditional", "unet_unconditional_plain", "upsampler", "difface_unet")
CLASSIFIERS = ("classifier_attention", "classifier_adaptive", "classifier_spatial", "classifier_spatial_v2")
RUNS = (
    "sampling_guided_ddpm",
    "sampling_guided_ddpm_cosine_scale10",
    "sampling_guided_ddim",
    "sampling_unguided_ddim_eta",
)


def relative_error(ours: torch.Tensor, recorded: torch.Tensor) -> float:
    return ((ours - recorded).norm() / recorded.norm()).item()


def load_network(model_class: type, name: str) -> torch.nn.Module:
    case, _ = load_case(name)
    flags = published_flags(case)
    if case["kind"] == "upsampler":
        flags += f" --small_size {case['small_size']} --large_size {case['large_size']}"
    return model_class.from_openai(draw_weights(case), flags)


@pytest.mark.parametrize("name", UNETS)
def test_unet_output_equals_the_published_one(name):
    _, io = load_case(name)
    unet = load_network(ADMUNet2DModel, name)
    labels = io["class_labels"] if unet.config.num_class_embeds is not None else None
    with torch.no_grad():
        sample = unet(io["sample"], io["timestep"], labels, io.get("low_res")).sample
    assert relative_error(sample, io["output"]) < 2e-5


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_logits_and_guiding_gradient_equal_the_published_ones(name):
    _, io = load_case(name)
    classifier = load_network(NoisyClassifier, name)
    with torch.no_grad():
        logits = classifier(io["sample"], io["timestep"]).logits
    assert relative_error(logits, io["logits"]) < 2e-5
    gradient = classifier_gradient(classifier, io["sample"], io["timestep"], io["class_labels"])
    assert relative_error(gradient, io["gradient"]) < 2e-5


@pytest.mark.filterwarnings("ignore:The UNet has 1000 classes and the classifier has 30")
@pytest.mark.parametrize("name", RUNS)
def test_a_seed_gives_the_published_samples_at_every_step(name):
    case, io = load_case(name)
    beta_schedule = {"linear": "linear", "cosine": "squaredcos_cap_v2"}[case["noise_schedule"]]
    if case["ddim"]:
        scheduler = DDIMScheduler(beta_schedule=beta_schedule)
    else:
        scheduler = DDPMScheduler(beta_schedule=beta_schedule, variance_type="learned_range")
    pipeline = ClassifierGuidedPipeline(
        unet=load_network(ADMUNet2DModel, case["unet"]),
        scheduler=scheduler,
        classifier=load_network(NoisyClassifier, case["classifier"]),
    )
    pipeline.set_progress_bar_config(disable=True)
    steps, timesteps = [], []

    def record(pipeline, step, timestep, tensors):
        steps.append(tensors["latents"])
        timesteps.append(timestep.item())
        return tensors

    x_0 = pipeline(
        class_labels=case["class_labels"],
        guidance_scale=case["scale"],
        timestep_respacing=case["timestep_respacing"],
        eta=case["eta"],
        generator=torch.Generator().manual_seed(case["seed"]),
        output_type="latent",
        callback_on_step_end=record,
    ).images

    assert timesteps == io["timesteps"].tolist()
    torch.testing.assert_close(torch.stack(steps), io["samples"], rtol=0, atol=2e-4)
    images = ((x_0 + 1) * 127.5).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1)
    difference = (images.int() - io["images"].int()).abs()
    assert difference.max() <= 1
    assert (difference > 0).sum() <= 5
