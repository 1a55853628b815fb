"""Calls whose result has gradients with respect to the images that they begin with."""

from functools import partial

import pytest
import torch
from diffusers import AdaptiveProjectedGuidance, DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler
from peak_memory import PeakMemory
from pipeline_calls import draw, refused, seeded
from tiny_models import SIZE, images, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUpsamplePipeline
from diffusers_adm.diffusion import NoiseSchedule
from diffusers_adm.guidance import ClassifierGuidance, WeightedSum
from diffusers_adm.solvers import SUPPORTED_SCHEDULERS


LABELS = [1, 3]
PROBE = torch.randn(2, 3, SIZE, SIZE, generator=seeded(7))
PICTURES = torch.rand(2, 3, SIZE, SIZE, generator=seeded(5))  # in [0, 1]


def pipeline_with(scheduler_class: type = DDIMScheduler, **changes):
    """A pipeline that does not clip, because clipping has kinks."""
    pipeline = tiny_pipeline(tiny_unet(use_null_class=True), tiny_scheduler(scheduler_class), **changes)
    pipeline.scheduler.register_to_config(clip_sample=False)
    return pipeline


def value_of(pipeline, x: torch.Tensor, **call) -> torch.Tensor:
    """A number that depends on all pixels of a result."""
    if "image" not in call:
        call = {"latents": x, "start": 510, **call}
    arguments = {"num_inference_steps": 6, "guidance_scale": 5.0, "with_gradients": x.requires_grad, **call}
    return (PROBE * draw(pipeline, LABELS, generator=seeded(), **arguments)).sum()


def check_gradient(value, x: torch.Tensor, step: float = 1e-2, precision: float = 1e-2) -> None:
    """Compares the size of a gradient with the change of the value along it."""
    x = x.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(value(x), x)
    size = gradient.norm()
    assert size > 0.1
    x, direction = x.detach(), gradient / size
    change = (value(x + step * direction) - value(x - step * direction)) / (2 * step)
    assert change.item() == pytest.approx(size.item(), rel=precision)


# --- Right ---


def in_float64(network: torch.nn.Module) -> torch.nn.Module:
    """The same network in float64, and its norms too, which would compute in float32."""
    for module in network.double().modules():
        if isinstance(module, torch.nn.GroupNorm):
            module.forward = partial(torch.nn.GroupNorm.forward, module)
    return network


def ddim_in_float64(unet, classifier, x: torch.Tensor, timesteps: list[int], scale: float) -> torch.Tensor:
    """Algorithm 2 of Dhariwal & Nichol 2021, anew."""
    alpha_bar = NoiseSchedule.from_config(tiny_scheduler().config).alpha_bar
    labels = torch.tensor(LABELS)
    for timestep, below in zip(timesteps, [*timesteps[1:], None]):
        t, a = torch.full((2,), timestep), alpha_bar[timestep]
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            log_probability = classifier(leaf, t).logits.log_softmax(1)[torch.arange(2), labels].sum()
            (gradient,) = torch.autograd.grad(log_probability, leaf)
        with torch.no_grad():
            epsilon = unet(x, t, labels).sample[:, :3] - (1 - a).sqrt() * scale * gradient
        x_0 = (x - (1 - a).sqrt() * epsilon) / a.sqrt()
        after = 1 if below is None else alpha_bar[below]
        x = after**0.5 * x_0 + (1 - after) ** 0.5 * epsilon
    return x


@pytest.mark.parametrize("scale", [0.0, 5.0])
def test_gradients_are_finite_differences_in_float64(scale):
    timesteps, call = [600, 400, 200, 0], {"guidance_scale": scale, "num_inference_steps": None}
    x = images().requires_grad_()
    value = value_of(pipeline_with(), x, timesteps=timesteps, start=None, **call)
    (gradient,) = torch.autograd.grad(value, x)
    pipeline, start, step = pipeline_with(), images().double(), 1e-5
    networks = [in_float64(network) for network in (pipeline.unet, pipeline.classifier)]
    for seed in range(3):
        direction = torch.randn(start.shape, generator=seeded(seed), dtype=torch.float64)
        above, below = (
            ddim_in_float64(*networks, start + sign * step * direction, timesteps, scale) for sign in (1, -1)
        )
        expected = (PROBE * (above - below)).sum() / (2 * step)
        assert (gradient * direction).sum().item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("scheduler_class", SUPPORTED_SCHEDULERS)
def test_every_solver_has_gradients_with_guidance(scheduler_class):
    pipeline = pipeline_with(scheduler_class)
    check_gradient(lambda x: value_of(pipeline, x), images())


@pytest.mark.parametrize("scheduler_class", SUPPORTED_SCHEDULERS)
def test_results_are_those_of_a_call_without_gradients(scheduler_class):
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class))
    drawn = [draw(pipeline, latents=images().requires_grad_(on), with_gradients=on) for on in (True, False)]
    assert drawn[0].requires_grad and not drawn[1].requires_grad
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


def test_a_sum_draws_the_same_with_gradients():
    pipeline = pipeline_with(DDPMScheduler)
    options = {"x_t_weight": 0.0, "through_unet": False, "x_0_weight": 1.0}
    call = {"guidance_fn": WeightedSum(dark_through_the_unet, x_0_is_dark), "guidance_options": options}
    drawn = [draw(pipeline, guidance_scale=0.1, with_gradients=on, **call) for on in (True, False)]
    torch.testing.assert_close(*drawn, rtol=1e-4, atol=1e-4)


def x_0_is_dark(x_t, timestep, x_0, class_labels):
    return -x_0.square().sum(dim=(1, 2, 3))


def x_0_is_like_x_t(x_t, timestep, x_0, class_labels):
    return -(x_0 - x_t).square().sum(dim=(1, 2, 3))


def pulled(x_t, timestep, x_0, class_labels):
    return -x_t * x_0


def dark_through_the_unet(x_t, timestep, x_0, class_labels):
    return x_0_is_dark(x_t, timestep, x_0, class_labels)


dark_through_the_unet.through_unet = True
GUIDANCE = {
    "null class": {"cfg_weight": 1.0},
    "random class": {"cfg_weight": 1.0, "weaker": "random_class"},
    "perturbed attention": {"cfg_weight": 1.0, "weaker": "perturbed_attention"},
    "another function": {"cfg_weight": 1.0, "weaker": lambda x_t, timestep, labels: x_t.sin()},
    "guider": {"guider": AdaptiveProjectedGuidance(2.0)},
    "epsilon scale": {"epsilon_scale": 1.1},
    "function of x_0": {"guidance_fn": x_0_is_dark, "guidance_scale": 0.1},
    "gradient": {"guidance_fn": pulled, "guidance_scale": 0.1},
    "gradient in a sum": {"guidance_fn": WeightedSum(x_0_is_dark, pulled), "guidance_scale": 0.1},
    "sum that could guide through the UNet": {
        "guidance_fn": WeightedSum(dark_through_the_unet, x_0_is_dark),
        "guidance_options": {"through_unet": False},
        "guidance_scale": 0.1,
    },
    "one of the images": {"guidance_scale": [5.0, 0.0]},
    "normalized": {"guidance_options": {"normalize": True}, "guidance_scale": [1.0, 0.0]},
    "every second step": {"guidance_options": {"every": 2}},
    "limited": {"guidance_options": {"max_x_0_shift": 0.1}, "guidance_scale": [50.0, 0.0]},
    "function of the prediction": {"x_0_fn": lambda x_0, timestep: x_0.sin()},
    "callback": {
        "callback_on_step_start": lambda pipe, step, timestep, tensors: {"latents": tensors["latents"].sin()}
    },
}


@pytest.mark.parametrize("name", GUIDANCE)
def test_gradients_go_through_guidance_of_every_kind(name):
    pipeline = pipeline_with()
    check_gradient(lambda x: value_of(pipeline, x, **GUIDANCE[name]), images())


OF_DDPM = {
    "gradient at the mean": {"guidance_options": {"gradient_at": "mean"}},
    "noise that is turned": {"guidance_options": {"spherical": 0.2}, "guidance_scale": [1.0, 0.0]},
    "steps that are taken again": {"guidance_options": {"recurrence": 2}},
    "x_0 that is moved towards x_t": {
        "guidance_fn": x_0_is_like_x_t,
        "guidance_options": {"x_t_weight": 0.0, "x_0_weight": 0.1},
    },
    "x_0 that is moved": {
        "guidance_fn": x_0_is_dark,
        "guidance_options": {"x_t_weight": 0.0, "x_0_weight": 0.1, "x_0_iterations": 2},
    },
}


@pytest.mark.parametrize("name", OF_DDPM)
def test_gradients_go_through_guidance_of_the_steps_of_ddpm(name):
    pipeline = pipeline_with(DDPMScheduler)
    check_gradient(lambda x: value_of(pipeline, x, **{"guidance_scale": 1.0, **OF_DDPM[name]}), images())


def test_gradients_with_respect_to_an_image_that_is_purified():
    pipeline, call = pipeline_with(DDPMScheduler), {"strength": 0.5, "output_type": "pt"}
    inner = 0.25 + PICTURES / 2  # results beyond [0, 1] are clamped
    check_gradient(lambda x: value_of(pipeline, x, image=x, guidance_scale=0.0, **call), inner, step=3e-3)
    image = PICTURES.clone().requires_grad_()
    draw(pipeline, LABELS, image=list(image), with_gradients=True, **call).sum().backward()
    assert image.grad.abs().amin(dim=(1, 2, 3)).max() > 0


def test_gradients_through_noise_levels():
    unet = tiny_unet(out_channels=3, preconditioning="edm", timestep_scale=1000.0)
    pipeline = tiny_pipeline(unet, HeunDiscreteScheduler(clip_sample=False), with_classifier=False)
    check_gradient(lambda x: value_of(pipeline, x, start=2.0, guidance_scale=0.0), images())


@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_an_upsampler_has_gradients_with_respect_to_the_small_image(scale):
    pipeline = ADMUpsamplePipeline(tiny_unet(low_res_conditioning=True), tiny_scheduler(DDIMScheduler), low_res_size=4)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler.register_to_config(clip_sample=False)

    def value(small: torch.Tensor) -> torch.Tensor:
        call = {"generator": seeded(), "num_inference_steps": 3, "output_type": "latent"}
        call |= {
            "guidance_fn": lambda x_t, timestep, x_0, labels: (x_t * x_0).sum(dim=(1, 2, 3)),
            "guidance_scale": scale,
        }
        drawn = pipeline(small, LABELS, with_gradients=small.requires_grad, latents=images(), start=400, **call)
        return (PROBE * drawn.images).sum()

    check_gradient(value, 0.25 + torch.rand(2, 3, 4, 4, generator=seeded()) / 2)


def test_the_small_image_of_an_upsampler_may_be_on_another_device():
    """The meta device stands for an accelerator."""
    pipeline = ADMUpsamplePipeline(tiny_unet(low_res_conditioning=True), tiny_scheduler(DDIMScheduler), low_res_size=4)
    pipeline.set_progress_bar_config(disable=True)
    for parameter in pipeline.unet.parameters():
        parameter.requires_grad_(False)
    small = torch.rand(2, 3, 4, 4, requires_grad=True)
    call = {"num_inference_steps": 2, "guidance_scale": 0.0, "with_gradients": True, "output_type": "latent"}
    first = next(pipeline.to("meta").steps(small, LABELS, **call))
    assert first.latents.requires_grad


@pytest.mark.parametrize("name", ["unet", "weaker", "classifier"])
def test_weights_that_are_moved_in_each_layer_are_refused(name):
    """The steps are computed again in the backward pass, when the weights are elsewhere."""
    pipeline, weaker = tiny_pipeline(tiny_unet(use_null_class=True)), tiny_unet(use_null_class=True)
    network = weaker if name == "weaker" else getattr(pipeline, name)
    network.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    call = {"weaker": weaker, "cfg_weight": 1.0, "with_gradients": True, "output_type": "latent"}
    refused(pipeline, f"weights that stay in place, but those of the {name} are", **call)


def test_steps_have_gradients_too():
    x = images().requires_grad_()
    steps = list(
        pipeline_with().steps(LABELS, latents=x, num_inference_steps=3, with_gradients=True, output_type="latent")
    )
    assert torch.autograd.grad(steps[1].latents.sum(), x)[0].abs().sum() > 0


# --- Memory ---


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_memory_does_not_grow_with_the_activations_of_the_steps(scale):
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler))
    peaks = []
    for steps in (2, 6):
        x = images().requires_grad_()
        with PeakMemory() as memory:
            call = {"guidance_scale": scale, "num_inference_steps": steps, "with_gradients": True}
            torch.autograd.grad(draw(pipeline, latents=x, **call).sum(), x)
        peaks.append(memory.peak)
    # Activations of one evaluation take about 200 images. A step leaves some images of its own.
    assert peaks[1] - peaks[0] < 4 * 8 * x.nbytes, peaks
    with PeakMemory() as memory:
        activations = pipeline.predict(x, 5, LABELS)
    assert memory.peak > 150 * x.nbytes and activations.x_0.requires_grad


# --- Refused ---


def through_unet(x_t, timestep, x_0, class_labels):
    return x_0_is_dark(x_t, timestep, x_0, class_labels)


through_unet.through_unet = True


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"output_type": "pil"}, "`with_gradients` requires output_type='pt' or 'latent', but got 'pil'"),
        ({"output_type": "np"}, "but got 'np'"),
        ({"particles": 4}, "one particle per image"),
        ({"guidance_fn": through_unet}, "through_unet=True"),
        ({"guidance_fn": x_0_is_dark, "guidance_options": {"through_unet": True}}, "through_unet=True"),
        ({"guidance_fn": x_0_is_dark, "guidance_options": {"smoothing": 0.1}}, "`smoothing`"),
        ({"guidance_options": {"entropy_scaling": True}}, "`entropy_scaling`"),
        ({"with_gradients": "yes"}, "`with_gradients` must be True or False"),
    ],
)
def test_runs_without_gradients_are_refused(call, message):
    refused(tiny_pipeline(), message, **{"with_gradients": True, **call})


def test_a_classifier_with_gradient_checkpointing_is_refused():
    pipeline = tiny_pipeline()
    pipeline.classifier.enable_gradient_checkpointing()
    refused(pipeline, "does not support gradient checkpointing of the classifier", with_gradients=True)
    guide = ClassifierGuidance(pipeline.classifier)
    refused(pipeline, "checkpointing of the network 1 (NoisyClassifier)", with_gradients=True, guidance_fn=guide)
    assert (
        draw(pipeline, LABELS, latents=images(), num_inference_steps=2, guidance_scale=0, with_gradients=True)
        .isfinite()
        .all()
    )
