"""Training-free guidance, held to closed forms on a Gaussian with a quadratic log-probability."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, HeunDiscreteScheduler
from guided_calls import LABELS, calls_of, draw
from tiny_models import SIZE, images, tiny_classifier, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUNet2DModel, ClassifierGuidedPipeline
from diffusers_adm.diffusion import NoiseSchedule, spherical_noise
from diffusers_adm.guidance import ClassifierGuidance, GuidanceOptions, WeightedSum, guidance_gradient
from diffusers_adm.guidance.options import METHODS
from diffusers_adm.guidance.training_free import SmoothedGuidance
from diffusers_adm.models.unet_adm import ADMUNet2DOutput
from diffusers_adm.solvers import SUPPORTED_SCHEDULERS


SCHEDULE = NoiseSchedule.from_config(DDPMScheduler(beta_schedule="squaredcos_cap_v2").config)
MEAN = 0.3  # of the data, whose variance is 1
TARGET, WIDTH = 1.2, 1.1  # log f(x_0) = -(x_0 - TARGET)^2 / (2 WIDTH^2) per pixel


TIMESTEPS = [700, 450, 200]
# alpha_bar of the first two timesteps, and the variance of the step between them.
ALPHA_BAR, BEFORE = (SCHEDULE.alpha_bar[timestep].item() for timestep in TIMESTEPS[:2])
VARIANCE = (1 - ALPHA_BAR / BEFORE) * (1 - BEFORE) / (1 - ALPHA_BAR)


class GaussianUNet(ADMUNet2DModel):
    """Exact noise of data from N(MEAN, 1): epsilon = sqrt(1 - alpha_bar) * (x_t - sqrt(alpha_bar) * MEAN)."""

    def forward(self, sample, timestep, *arguments, **options):
        alpha_bar = SCHEDULE.alpha_bar.float()[timestep.long()][:, None, None, None]
        return ADMUNet2DOutput(sample=(1 - alpha_bar).sqrt() * (sample - alpha_bar.sqrt() * MEAN))


def gaussian_pipeline(scheduler_class: type, size: int = 1, **changes) -> ClassifierGuidedPipeline:
    config = {"sample_size": size, "in_channels": 1, "model_channels": 4, "channel_mult": (1,), "layers_per_block": 1}
    config |= {"attention_resolutions": (), "attention_head_dim": 4, "norm_num_groups": 1, "num_class_embeds": None}
    scheduler = scheduler_class(beta_schedule="squaredcos_cap_v2", clip_sample=False, **changes)
    pipeline = ClassifierGuidedPipeline(GaussianUNet(out_channels=1, **config).eval(), scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def predicted(x_t: torch.Tensor) -> torch.Tensor:
    """Predicted x_0 at the first timestep."""
    return MEAN + ALPHA_BAR**0.5 * (x_t - ALPHA_BAR**0.5 * MEAN)


def near_target(x_t, timestep, x_0, class_labels):
    return -((x_0 - TARGET) ** 2).sum(dim=(1, 2, 3)) / (2 * WIDTH**2)


def first_step(pipeline, scale: float, options: GuidanceOptions | dict | str, **call):
    call = {"batch_size": 4, "timesteps": TIMESTEPS, "generator": torch.Generator().manual_seed(0), **call}
    return next(pipeline.steps(guidance_fn=near_target, guidance_scale=scale, guidance_options=options, **call))


CASES = {
    "dps": ({}, 0.4, 0.0, 1),
    "mpgd": ({}, 0.0, 0.4, 1),
    "ugd": ({"recurrence": 1}, 0.4, 0.4, 4),
    "tfg": ({"smoothing": 0.0, "schedule": "constant"}, 0.4, 0.4, 4),
}


@pytest.mark.parametrize("method", CASES)
@pytest.mark.parametrize("scheduler_class", [DDIMScheduler, DDPMScheduler])
def test_the_guided_step_of_each_method_is_the_closed_form(scheduler_class, method):
    """The gradient through the UNet is taken at the predicted x_0, and N steps move x_0 up its own gradient."""
    changes, rho, mu, iterations = CASES[method]
    pipeline = gaussian_pipeline(scheduler_class, size=2)
    options = {"method": method, "max_x_0_shift": None, **changes}
    step, plain = (first_step(pipeline, scale, options) for scale in (0.4, 0.0))
    assert torch.equal(step.x_t, plain.x_t) and torch.equal(step.x_0, plain.x_0)

    x_t = step.x_t.double()
    x_0 = predicted(x_t)
    torch.testing.assert_close(step.x_0.double(), x_0, rtol=1e-5, atol=1e-5)
    gradient = rho * ALPHA_BAR**0.5 * (TARGET - x_0) / WIDTH**2  # d x_0 / d x_t = sqrt(alpha_bar)
    moved = TARGET + (x_0 - TARGET) * (1 - mu / WIDTH**2) ** iterations
    if scheduler_class is DDIMScheduler:
        guided = moved + (1 - ALPHA_BAR) / ALPHA_BAR**0.5 * gradient
        noise = (x_t - ALPHA_BAR**0.5 * guided) / (1 - ALPHA_BAR) ** 0.5
        expected = BEFORE**0.5 * guided + (1 - BEFORE) ** 0.5 * noise
    else:
        moves = (1 - ALPHA_BAR / BEFORE) * BEFORE**0.5 / (1 - ALPHA_BAR) * (moved - x_0)
        expected = plain.latents.double() + moves + VARIANCE * gradient
    torch.testing.assert_close(step.latents.double(), expected, rtol=1e-5, atol=1e-5)


def test_smoothing_is_the_logarithm_of_the_mean_probability():
    """E exp(f) over noise of deviation r is a Gaussian of variance WIDTH^2 + r^2."""
    x_0 = torch.linspace(-1, 2, 8, dtype=torch.float64)[:, None, None, None]
    function = SmoothedGuidance(near_target, 0.7, 4000, torch.Generator().manual_seed(0))
    gradient = guidance_gradient(function, x_0, torch.zeros(8), x_0, None)
    torch.testing.assert_close(gradient, (TARGET - x_0) / (WIDTH**2 + 0.7**2), rtol=0.05, atol=0.03)


def exactly_near_target(x_t, timestep, x_0, class_labels):
    """log p(y | x_t), where y is x_0 with noise: given x_t, the variance of x_0 is 1 - alpha_bar."""
    variance = 1 - SCHEDULE.alpha_bar.float()[timestep][:, None, None, None]
    return -((x_0 - TARGET) ** 2 / (2 * (WIDTH**2 + variance))).sum(dim=(1, 2, 3))


def test_smoothed_guidance_draws_from_the_posterior():
    """The noise of smoothing 1 has the variance of x_0 given x_t, so that E exp(f) is p(y | x_t)."""
    call = {"batch_size": 3000, "num_inference_steps": 40, "guidance_scale": 1.0, "output_type": "latent"}
    functions = {
        "exact": (exactly_near_target, {"method": "dps", "max_x_0_shift": None}),
        "lgd": (near_target, {"method": "lgd", "smoothing_samples": 16}),
        "dps": (near_target, "dps"),
    }
    mean, deviation = {}, {}
    for name, (function, options) in functions.items():
        pipeline, generator = gaussian_pipeline(DDIMScheduler), torch.Generator().manual_seed(0)
        drawn = pipeline(guidance_fn=function, guidance_options=options, generator=generator, **call).images
        mean[name], deviation[name] = drawn.mean().item(), drawn.std().item()
    assert mean["exact"] == pytest.approx((MEAN * WIDTH**2 + TARGET) / (1 + WIDTH**2), abs=0.03)
    assert deviation["exact"] == pytest.approx(WIDTH / (1 + WIDTH**2) ** 0.5, rel=0.04)
    assert mean["lgd"] == pytest.approx(mean["exact"], abs=0.02)
    assert deviation["lgd"] == pytest.approx(deviation["exact"], rel=0.02)
    assert deviation["dps"] < 0.9 * deviation["exact"]  # as if x_0 were certain


def test_recurrence_keeps_the_marginal():
    """For data of variance 1, steps of DDPM with the variance beta are exact: x_t is from N(sqrt(alpha_bar) MEAN, 1) at each visit."""
    pipeline = gaussian_pipeline(DDPMScheduler, variance_type="fixed_large")
    options = {"recurrence": 3, "step_fractions": (0.0, 0.8)}
    call = {"num_inference_steps": 5, "output_type": "latent", "generator": torch.Generator().manual_seed(0)}
    rows = calls_of(pipeline.unet)
    still = {"guidance_fn": lambda x_t, timestep, x_0, class_labels: torch.zeros_like(x_t), "guidance_scale": 1.0}
    steps = list(pipeline.steps(batch_size=20000, guidance_options=options, **still, **call))
    assert rows == [20000] * 13 and steps[0].num_steps == 13
    for step in steps:
        alpha_bar = 1 / (1 + step.sigma**2)
        assert step.x_t.mean().item() == pytest.approx(alpha_bar**0.5 * MEAN, abs=0.03)
        assert step.x_t.var().item() == pytest.approx(1.0, abs=0.03)
    assert [step.sigma for step in steps[:12:3]] == [step.sigma for step in steps[2:12:3]]
    assert not torch.equal(steps[0].x_t, steps[1].x_t)


def test_run_that_nothing_guides_repeats_no_step():
    pipeline = gaussian_pipeline(DDPMScheduler, variance_type="fixed_large")
    rows = calls_of(pipeline.unet)
    call = {"num_inference_steps": 5, "guidance_options": {"recurrence": 3}, "output_type": "latent"}
    pipeline(batch_size=2, **call)
    assert rows == [2] * 5


@pytest.mark.parametrize("scheduler_class, eta", [(DDPMScheduler, 0.0), (DDIMScheduler, 1.0)])
def test_the_noise_of_a_spherical_step_has_exactly_the_expected_length(scheduler_class, eta):
    pipeline = gaussian_pipeline(scheduler_class, size=8)
    options = {"method": "dsg", "spherical": 0.3}
    steps = [first_step(pipeline, scale, options, eta=eta) for scale in ([1.0, 1.0, 1.0, 0.0], -1.0, 0.0)]
    towards, away, plain = (step.latents.double() for step in steps)
    x_t = steps[0].x_t.double()
    x_0 = predicted(x_t)
    noise = (x_t - ALPHA_BAR**0.5 * x_0) / (1 - ALPHA_BAR) ** 0.5
    mean = BEFORE**0.5 * x_0 + (1 - BEFORE - VARIANCE) ** 0.5 * noise  # of DDPM too
    lengths = (towards - mean).flatten(1).norm(dim=1) / (64 * VARIANCE) ** 0.5
    assert lengths[:3].tolist() == pytest.approx([1.0] * 3, abs=1e-5)
    assert torch.equal(towards[3], plain[3])
    noise, direction = (plain - mean) / VARIANCE**0.5, TARGET - x_0
    mixed = 0.7 * noise + 0.3 * direction / direction.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    mixed = mixed / mixed.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
    torch.testing.assert_close(towards[:3], (mean + VARIANCE**0.5 * mixed)[:3], rtol=1e-4, atol=1e-4)
    error = [(drawn - TARGET).square().mean().item() for drawn in (towards[:3], plain[:3], away[:3])]
    assert error == sorted(error)
    assert steps[0].gradient is not None


def test_the_longest_and_shortest_gradients_give_the_same_noise():
    noise, gradient = torch.randn(2, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0)).double()
    expected = spherical_noise(noise, gradient, 0.5)
    for size in (1e-30, 1e30):
        torch.testing.assert_close(spherical_noise(noise, size * gradient, 0.5), expected)


@pytest.mark.parametrize("scheduler_class", SUPPORTED_SCHEDULERS)
def test_every_solver_takes_training_free_guidance_or_refuses_it_by_name(scheduler_class):
    target = images(seed=5).clamp(-1, 1)

    def near(x_t, timestep, x_0, class_labels):
        return -(x_0 - target).square().sum(dim=(1, 2, 3))

    pipeline = tiny_pipeline(scheduler=tiny_scheduler(scheduler_class), with_classifier=False)
    call = {"guidance_fn": near, "num_inference_steps": 6}
    options = {"method": "tfg", "smoothing_samples": 2, "schedule": "constant"}
    plain, guided = (draw(pipeline, guidance_scale=scale, guidance_options=options, **call) for scale in (0.0, 0.2))
    assert ((guided - plain) * (target - plain)).mean() > 0.01
    if scheduler_class in (DDPMScheduler, DDIMScheduler):
        assert draw(pipeline, guidance_scale=0.2, guidance_options="freedom", **call).isfinite().all()
    else:
        with pytest.raises(ValueError, match=f"`recurrence` requires.*{scheduler_class.__name__}"):
            draw(pipeline, guidance_scale=0.2, guidance_options="freedom", **call)
    if scheduler_class is not DDPMScheduler:
        with pytest.raises(ValueError, match=f"`spherical` requires.*{scheduler_class.__name__}"):
            draw(pipeline, guidance_scale=0.2, guidance_options="dsg", **call)


def test_unets_that_are_given_noise_levels_and_upsampled_batches_take_part():
    unet = tiny_unet(out_channels=3, preconditioning="edm", timestep_scale=1000.0)
    pipeline = tiny_pipeline(unet, HeunDiscreteScheduler(), with_classifier=False)

    def darker(x_t, timestep, x_0, class_labels):
        return -x_0.mean(dim=(1, 2, 3))

    plain, guided = (
        draw(pipeline, guidance_fn=darker, guidance_scale=scale, guidance_options="tfg") for scale in (0.0, 20.0)
    )
    assert (guided.mean(dim=(1, 2, 3)) < plain.mean(dim=(1, 2, 3))).all()


def test_a_seeds_image_is_the_same_in_any_batch():
    def near(x_t, timestep, x_0, class_labels):
        return -x_0.square().sum(dim=(1, 2, 3))

    pipeline = tiny_pipeline(with_classifier=False)
    options = {"method": "tfg", "recurrence": 2, "smoothing": 0.5}
    call = {"guidance_fn": near, "guidance_scale": 0.1, "guidance_options": options}
    call |= {"num_inference_steps": 3, "output_type": "latent"}
    both = pipeline(LABELS, generator=[torch.Generator().manual_seed(seed) for seed in (1, 2)], **call).images
    alone = pipeline(LABELS[1:], generator=[torch.Generator().manual_seed(2)], **call).images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_an_image_that_is_not_guided_draws_no_noise_of_smoothing():
    def near(x_t, timestep, x_0, class_labels):
        return -x_0.square().sum(dim=(1, 2, 3))

    pipeline = tiny_pipeline(with_classifier=False)
    call = {"guidance_fn": near, "guidance_options": {"smoothing": 0.5, "smoothing_samples": 2}}
    call |= {"num_inference_steps": 3, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipeline(LABELS, generator=generators, guidance_scale=[0.1, 0.0], **call).images
    alone = pipeline(LABELS[1:], generator=[torch.Generator().manual_seed(2)], guidance_scale=0.0, **call).images
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_a_sum_moves_x_0_by_its_functions_of_x_0_alone():
    classifier = ClassifierGuidance(tiny_classifier())
    pipeline = tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler))

    def near(x_t, timestep, x_0, class_labels):
        return -x_0.square().sum(dim=(1, 2, 3))

    call = {"guidance_scale": 0.2, "guidance_options": "mpgd"}
    expected = draw(pipeline, guidance_fn=near, **call)
    for through_unet in (False, True):
        near.through_unet = through_unet
        found = draw(pipeline, guidance_fn=WeightedSum(classifier, near), **call)
        torch.testing.assert_close(found, expected)


def test_methods_are_names_for_options():
    for name, options in METHODS.items():
        assert GuidanceOptions.parse(name) == GuidanceOptions(**options)
    changed = GuidanceOptions.parse({"method": "freedom", "recurrence": 5})
    assert changed == GuidanceOptions(through_unet=True, recurrence=5)


def test_schedules_of_training_free_guidance_have_a_mean_of_one():
    sigmas = [10.0, 3.0, 1.0, 0.1]
    rising, falling = (GuidanceOptions(schedule=name).factors(sigmas) for name in ("increase", "decrease"))
    assert sum(rising) / 4 == pytest.approx(1.0) and sum(falling) / 4 == pytest.approx(1.0)
    alphas = [
        10 / 101,
        2 / 10,
        1.01 / 2,
        1 / 1.01,
    ]  # alpha_bar of the level over that of the next lower one, 1 at the end
    assert rising == pytest.approx([4 * alpha / sum(alphas) for alpha in alphas])
    assert falling == pytest.approx([4 * (1 - alpha) / (4 - sum(alphas)) for alpha in alphas])


def pull(x_t, timestep, x_0, class_labels):
    return -x_t


def near_zero(x_t, timestep, x_0, class_labels):
    return -x_0.square().sum(dim=(1, 2, 3))


BAD_CALLS = [
    ({"guidance_options": "dsp"}, "must be one of ('dps', 'lgd'"),
    ({"guidance_options": {"method": ["dps"]}}, "must be one of ('dps', 'lgd'"),
    ({"guidance_options": {"recurrence": 0}}, "`recurrence` must be an integer of at least 1, but got 0"),
    (
        {"guidance_options": {"x_0_iterations": True}},
        "`x_0_iterations` must be an integer of at least 1, but got True",
    ),
    ({"guidance_options": {"x_0_weight": -1.0}}, "`x_0_weight` must be a finite number of at least 0, but got -1.0"),
    (
        {"guidance_options": {"smoothing": float("nan")}},
        "`smoothing` must be a finite number of at least 0, but got nan",
    ),
    ({"guidance_options": {"spherical": 1.5}}, "`spherical` must be a number in (0, 1], or None, but got 1.5"),
    ({"guidance_options": {"through_unet": 1}}, "`through_unet` must be True or False, or None, but got 1"),
    ({"guidance_options": {"x_t_weight": 0.0}}, "x_t_weight=0 does not go together with x_0_weight=0"),
    ({"guidance_options": {"method": "mpgd", "spherical": 0.5}}, "x_t_weight=0 does not go together with `spherical`"),
    ({"guidance_options": {"method": "dsg", "max_size": 0.5}}, "`max_size` does not go together with `spherical`"),
    ({"guidance_options": {"x_0_iterations": 2}}, "`x_0_iterations` does not go together with x_0_weight=0"),
    ({"guidance_options": {"method": "freedom", "every": 2}}, "`every` does not go together with `recurrence`"),
    ({"guidance_options": {"method": "mpgd", "gradient_at": "mean"}}, "gradient_at='mean' does not go together with"),
    ({"guidance_options": {"through_unet": True, "gradient_at": "mean"}}, "gradient_at='mean' is not supported"),
    (
        {"guidance_options": "mpgd", "guidance_fn": None},
        "require a `guidance_fn` that is applied to the predicted x_0",
    ),
    ({"guidance_options": "dps", "guidance_fn": ClassifierGuidance(tiny_classifier())}, "require a `guidance_fn`"),
    ({"guidance_options": "mpgd", "particles": 2}, "`particles` does not go together with x_0_weight"),
    ({"guidance_options": "mpgd", "guidance_fn": pull}, "one log-probability per image with `x_0_weight`"),
    ({"guidance_options": {"smoothing": 1.0}, "guidance_fn": pull}, "one log-probability per image with `smoothing`"),
    (
        {"guidance_options": "mpgd", "guidance_fn": lambda x_t, timestep, x_0, class_labels: x_t.sum(dim=(1, 2, 3))},
        "computes the log-probability from x_0",
    ),
]


@pytest.mark.parametrize("call, message", BAD_CALLS)
def test_what_does_not_fit_is_refused_in_one_line(call, message):
    with pytest.raises(ValueError) as error:
        draw(tiny_pipeline(), **{"guidance_fn": near_zero, "guidance_scale": 1.0, **call})
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_method_that_moves_only_x_0_takes_no_gradient_through_the_unet():
    def check(_, step, timestep, tensors):
        assert tensors["gradient"] is None
        return {}

    call = {"callback_on_step_end": check, "callback_on_step_end_tensor_inputs": ["gradient"]}
    found = draw(tiny_pipeline(), guidance_fn=near_zero, guidance_scale=0.1, guidance_options="mpgd", **call)
    assert found.shape == (2, 3, SIZE, SIZE)
