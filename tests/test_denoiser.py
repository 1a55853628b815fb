"""`Denoiser`: D(x; sigma) for toolboxes with samplers of their own."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny_models import SIZE, images, tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUpsamplePipeline, default_cascade
from diffusers_adm.denoiser import Denoiser, x_0_variance
from diffusers_adm.diffusion import NoiseSchedule
from diffusers_adm.guidance import classifier_gradient
from diffusers_adm.respacing import respaced_timesteps


SCHEDULE = NoiseSchedule.from_config(tiny_scheduler().config)
LABELS = [1, 2]


def at_level(timestep: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """x_t, the same images as x_0 + sigma * epsilon, and sigma."""
    sigma = SCHEDULE.sigma[timestep].item()
    x_t = images()
    return x_t, x_t * (1 + sigma**2) ** 0.5, sigma


@pytest.mark.parametrize("timestep", [0, 7, 500, 999])
def test_denoised_images_are_the_predicted_x_0_of_the_same_noise_level(timestep):
    pipe = tiny_pipeline()
    x_t, x, sigma = at_level(timestep)
    denoised = Denoiser(pipe, LABELS)(x, sigma)
    expected = pipe.predict(x_t, timestep, LABELS).x_0
    torch.testing.assert_close(denoised, expected, rtol=1e-4, atol=1e-4 * max(sigma, 1))


def test_a_level_between_two_timesteps_has_a_timestep_in_between():
    pipe = tiny_pipeline()
    x_t, sigma = images(), (SCHEDULE.sigma[500] * SCHEDULE.sigma[501]).sqrt().item()
    x = x_t * (1 + sigma**2) ** 0.5
    epsilon = pipe.unet(x_t, torch.tensor([500.5, 500.5]), torch.tensor(LABELS)).sample[:, :3]
    torch.testing.assert_close(Denoiser(pipe, LABELS)(x, sigma), x - sigma * epsilon, rtol=1e-4, atol=1e-3)


def test_without_noise_images_stay():
    x = images()
    assert torch.equal(Denoiser(tiny_pipeline(), LABELS)(x, 0.0), x)
    for options in ({}, {"beta_schedule": "linear"}):
        unet = tiny_unet(out_channels=3, preconditioning="edm", timestep_scale=1000.0, **options)
        assert torch.equal(Denoiser(unet, LABELS)(x, 0.0), x)


def test_one_level_an_image_in_every_shape_that_samplers_use():
    denoiser = Denoiser(tiny_pipeline(), LABELS)
    x = images()
    levels = torch.tensor([0.5, 20.0])
    single = torch.cat(
        [Denoiser(tiny_pipeline(), label)(x[row : row + 1], levels[row]) for row, label in enumerate(LABELS)]
    )
    for given in (levels, levels.double(), levels[:, None, None, None], levels.tolist()):
        torch.testing.assert_close(denoiser(x, given), single, rtol=1e-4, atol=1e-4)


def test_images_keep_their_dtype():
    assert Denoiser(tiny_pipeline(), LABELS)(images().double(), torch.tensor(2.0)).dtype == torch.float64


def test_gradients_are_those_of_the_function():
    """Guidance is part of the function: its gradient is that of the second derivative of log p(y | x) too."""
    denoiser = Denoiser(tiny_pipeline(), LABELS, guidance_scale=10.0, max_x_0_shift=None)
    x = images().double().requires_grad_()
    direction = images(seed=5).double()
    (gradient,) = torch.autograd.grad(denoiser(x, 2.0).square().sum(), x)
    with torch.no_grad():
        above, below = (denoiser(x + step * direction, 2.0).square().sum() for step in (1e-2, -1e-2))
    torch.testing.assert_close((gradient * direction).sum(), (above - below) / 2e-2, rtol=5e-3, atol=0)


def test_gradients_under_transformations_of_torch_func():
    denoiser = Denoiser(tiny_pipeline(), LABELS, guidance_scale=3.0)
    x = images()
    _, pullback = torch.func.vjp(lambda z: denoiser(z, 2.0), x)
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(denoiser(leaf, 2.0).sum(), leaf)
    torch.testing.assert_close(pullback(torch.ones_like(x))[0], expected)


def test_classifier_guidance_adds_its_gradient_to_the_score():
    pipe = tiny_pipeline()
    x_t, x, sigma = at_level(300)
    gradient = classifier_gradient(pipe.classifier, x_t, 300, LABELS) / (1 + sigma**2) ** 0.5  # with respect to x
    plain, guided = Denoiser(pipe, LABELS)(x, sigma), Denoiser(pipe, LABELS, 2.0, max_x_0_shift=None)(x, sigma)
    torch.testing.assert_close((guided - plain) / sigma**2, 2.0 * gradient, rtol=1e-3, atol=1e-6)


def test_guidance_moves_no_image_further_than_it_may():
    pipe = tiny_pipeline()
    x, sigma = 100 * images(), 100.0
    shift = Denoiser(pipe, LABELS, 1000.0, max_x_0_shift=0.25)(x, sigma) - Denoiser(pipe, LABELS)(x, sigma)
    torch.testing.assert_close(shift.square().mean(dim=(1, 2, 3)).sqrt(), torch.full((2,), 0.25), rtol=1e-3, atol=0)


def test_float16_classifiers_keep_their_small_gradients():
    pipe = tiny_pipeline()
    x_t, x, sigma = at_level(300)
    single = Denoiser(pipe, LABELS, 2.0)(x, sigma) - Denoiser(pipe, LABELS)(x, sigma)
    pipe.classifier.half()
    half = Denoiser(pipe, LABELS, 2.0)(x, sigma) - Denoiser(pipe, LABELS)(x, sigma)
    torch.testing.assert_close(half, single, rtol=0.05, atol=1e-3)


def test_classifier_free_guidance():
    pipe = tiny_pipeline(tiny_unet(use_null_class=True))
    x, sigma = images(), 1.5
    given, null = Denoiser(pipe, LABELS)(x, sigma), Denoiser(pipe)(x, sigma)
    torch.testing.assert_close(
        Denoiser(pipe, LABELS, cfg_weight=2.0)(x, sigma), 3 * given - 2 * null, rtol=1e-4, atol=1e-4
    )


def test_the_unit_range_is_the_same_denoiser():
    pipe = tiny_pipeline()
    plain, unit = Denoiser(pipe, LABELS), Denoiser(pipe, LABELS, unit_range=True)
    x = images()
    torch.testing.assert_close(unit((x + 1) / 2, 0.4), (plain(x, 0.8) + 1) / 2)
    assert (unit.sigma_min, unit.sigma_max) == (plain.sigma_min / 2, plain.sigma_max / 2)
    mean, variance = plain.mean_and_variance(x, 0.8)
    unit_mean, unit_variance = unit.mean_and_variance((x + 1) / 2, 0.4)
    torch.testing.assert_close(unit_mean, (mean + 1) / 2)
    torch.testing.assert_close(unit_variance, variance / 4)


def test_what_samplers_read():
    denoiser = Denoiser(tiny_pipeline())
    assert (denoiser.img_channels, denoiser.img_resolution) == (3, SIZE)
    assert (denoiser.sigma_min, denoiser.sigma_max) == tuple(SCHEDULE.sigma[[0, -1]].tolist())
    assert denoiser.round_sigma(3.25) == 3.25


def test_a_unet_alone():
    unet = tiny_unet()
    x, sigma = images(), 2.0
    assert torch.equal(
        Denoiser(unet, LABELS, scheduler=tiny_scheduler())(x, sigma), Denoiser(tiny_pipeline(unet), LABELS)(x, sigma)
    )


def test_a_unet_with_preconditioning_is_the_denoiser():
    unet = tiny_unet(out_channels=3, preconditioning="edm", timestep_scale=1000.0)
    denoiser, x, sigma = Denoiser(unet, LABELS), images(), torch.tensor([0.5, 20.0])
    assert torch.equal(denoiser(x, sigma), unet(x, sigma, torch.tensor(LABELS)).sample)
    assert (denoiser.sigma_min, denoiser.sigma_max) == (unet.config.sigma_min, unet.config.sigma_max)


@pytest.mark.parametrize("guidance_scale", [0.0, 2.0])
def test_eulers_method_in_sigma_is_ddim(guidance_scale):
    """x / sigma changes by D (1 / sigma' - 1 / sigma) in each step of DDIM (Song et al. 2021, eq. 13)."""
    pipe = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler, clip_sample=False))
    x_t = images()
    expected = pipe(
        LABELS, guidance_scale=guidance_scale, timestep_respacing="ddim10", latents=x_t, output_type="latent"
    ).images
    denoiser = Denoiser(pipe, LABELS, guidance_scale, max_x_0_shift=None)
    levels = [SCHEDULE.sigma[timestep].item() for timestep in reversed(respaced_timesteps("ddim10", 1000))] + [0.0]
    x = x_t.double() * (1 + levels[0] ** 2) ** 0.5
    with torch.no_grad():
        for sigma, lower in zip(levels, levels[1:]):
            denoised = denoiser(x, sigma)
            x = denoised + lower / sigma * (x - denoised)
    torch.testing.assert_close(x.float(), expected, rtol=1e-3, atol=1e-3)


def test_variance_of_x_0_that_a_gaussian_has():
    """For data N(0, 0.5^2), the step's variance, the posterior variance of x_0 and the interpolation are known."""
    index = torch.tensor([1, 10, 300, 999])
    data = 0.5**2
    sigma, beta, posterior = (table[index] for table in (SCHEDULE.sigma, SCHEDULE.beta, SCHEDULE.posterior_variance))
    variance = sigma**2 * data / (sigma**2 + data)
    step = posterior + SCHEDULE.posterior_mean_x0[index] ** 2 * variance
    v = 2 * (step / posterior).log() / (beta / posterior).log() - 1
    found = x_0_variance(SCHEDULE, index, v.float()[:, None, None, None])
    # A step's noise hides all but 1e-6 of the variance at the highest level, which float32 resolves to some percent.
    torch.testing.assert_close(found.flatten().double(), variance, rtol=2e-2, atol=0)


def test_the_first_step_explains_its_whole_variance():
    found = x_0_variance(SCHEDULE, torch.tensor([0]), torch.ones(1, 1, 1, 1))
    torch.testing.assert_close(found.item(), SCHEDULE.beta[0].item(), rtol=1e-4, atol=0)


BAD_ARGUMENTS = [
    ({"class_labels": [7]}, r"must be in \[0, 4\], but got \[7\]"),
    ({"guidance_scale": "2"}, "`guidance_scale` must be a number"),
    ({"max_x_0_shift": 0.0}, "`max_x_0_shift` must be above 0"),
    ({"cfg_weight": 1.0}, "null class"),
    ({"cfg_weight": float("nan")}, "`cfg_weight` must be a number"),
    ({"cfg_weight": float("inf")}, "`cfg_weight` must be finite"),
    ({"scheduler": tiny_scheduler()}, "`scheduler` must be None for a pipeline"),
    ({"model": tiny_unet()}, "`scheduler` is required"),
    ({"model": "folder"}, "`unet` must be an instance of ADMUNet2DModel"),
]


@pytest.mark.parametrize("change, message", BAD_ARGUMENTS)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        Denoiser(**{"model": tiny_pipeline(), "class_labels": LABELS, **change})


def test_replaced_schedulers_that_do_not_fit_are_refused():
    for change, message in (
        ({"prediction_type": "v_prediction"}, "v_prediction"),
        ({"beta_schedule": "scaled_linear"}, "trained"),
    ):
        pipeline = tiny_pipeline(classifier=tiny_classifier(beta_schedule="linear"))
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **change)
        with pytest.raises(ValueError, match=message):
            Denoiser(pipeline, LABELS, guidance_scale=1.0)


def test_guidance_without_a_classifier():
    with pytest.raises(ValueError, match="requires a pipeline with a classifier"):
        Denoiser(tiny_pipeline(with_classifier=False), LABELS, guidance_scale=1.0)


def test_upsamplers_are_refused():
    with pytest.raises(ValueError, match="must not be an upsampler"):
        Denoiser(ADMUpsamplePipeline.from_pretrained(default_cascade()[1]))


@pytest.mark.parametrize("sigma", [-1.0, float("nan"), float("inf"), [1.0, 2.0, 3.0]])
def test_bad_levels(sigma):
    with pytest.raises(ValueError, match="`sigma` must be"):
        Denoiser(tiny_pipeline(), LABELS)(images(), sigma)


@pytest.mark.parametrize("change", [{}, {"guidance_scale": 1.0}])
def test_classes_that_are_missing(change):
    pipe = tiny_pipeline(tiny_unet(num_class_embeds=None) if change else None, classifier=tiny_classifier())
    with pytest.raises(ValueError, match="`class_labels` must be given"):
        Denoiser(pipe, **change)(images(), 1.0)


def test_tensors_on_an_accelerator_are_not_read():
    denoiser = Denoiser(tiny_pipeline(), guidance_scale=2.0).to("meta")  # no tensor on this device has values
    x, sigma, labels = images().to("meta"), torch.ones(2, device="meta"), torch.tensor(LABELS, device="meta")
    assert denoiser(x, sigma, labels).shape == x.shape


def test_labels_of_another_number_of_images():
    with pytest.raises(ValueError, match="`class_labels` must be one number for all images or one per image"):
        Denoiser(tiny_pipeline(), [1, 2, 3])(images(), 1.0)


def test_fixed_variance_has_no_variance():
    unet = tiny_unet(out_channels=3)
    denoiser = Denoiser(tiny_pipeline(unet, tiny_scheduler(variance_type="fixed_large")), LABELS)
    with pytest.raises(ValueError, match="requires a UNet with learned variance"):
        denoiser.mean_and_variance(images(), 1.0)


def test_a_classifier_alone_can_have_classes():
    denoiser = Denoiser(tiny_pipeline(tiny_unet(num_class_embeds=None), classifier=tiny_classifier()), LABELS, 1.0)
    assert denoiser(images(), 1.0).isfinite().all()
