"""Particles draw exact samples of the posterior, on data whose posterior is known."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from guided_calls import LABELS, draw
from tiny_models import SIZE, tiny_pipeline, tiny_scheduler, tiny_unet

from diffusers_adm import ADMUNet2DModel, ADMUpsamplePipeline, ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.diffusion import NoiseSchedule
from diffusers_adm.guidance.particles import Particles
from diffusers_adm.models.noisy_classifier import NoisyClassifierOutput
from diffusers_adm.models.unet_adm import ADMUNet2DOutput
from diffusers_adm.solvers import DDPMSolver, Denoised


SCHEDULE = NoiseSchedule.from_config(DDPMScheduler(beta_schedule="squaredcos_cap_v2").config)
# Three Gaussians of one pixel, and the probability of class 1 for each of them.
MEANS, DEVIATION = torch.tensor([-0.8, 0.1, 0.7]), 0.1
PRIOR, CLASS_1 = torch.tensor([0.5, 0.3, 0.2]), torch.tensor([0.1, 0.6, 0.9])


def responsibilities(x_t: torch.Tensor, timestep: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """log p(component | x_t), `(batch, 3, 1, 1, 1)`, and sqrt(alpha_bar), 1 - alpha_bar and the variance of x_t."""
    alpha_bar = SCHEDULE.alpha_bar.float()[timestep.long()][:, None, None, None, None]
    variance = alpha_bar * DEVIATION**2 + 1 - alpha_bar
    log_density = -((x_t[:, None] - alpha_bar.sqrt() * MEANS[:, None, None, None]) ** 2) / (2 * variance)
    return (PRIOR.log()[:, None, None, None] + log_density).log_softmax(dim=1), alpha_bar, variance


class MixtureUNet(ADMUNet2DModel):
    """Exact noise of the mixture: epsilon = -sqrt(1 - alpha_bar) * grad log p(x_t)."""

    def forward(self, sample, timestep, *arguments, **options):
        log_share, alpha_bar, variance = responsibilities(sample, timestep)
        pull = (sample[:, None] - alpha_bar.sqrt() * MEANS[:, None, None, None]) / variance
        return ADMUNet2DOutput(sample=((1 - alpha_bar).sqrt() * (log_share.exp() * pull)).sum(dim=1))


class MixtureClassifier(NoisyClassifier):
    """Exact log p(class | x_t) of the mixture."""

    def forward(self, sample, timestep, return_dict=True):
        share = responsibilities(sample, timestep)[0][:, :, 0, 0, 0].exp()  # (batch, 3)
        return NoisyClassifierOutput(logits=torch.stack([share @ (1 - CLASS_1), share @ CLASS_1], dim=1).log())


def mixture_pipeline() -> ClassifierGuidedPipeline:
    size = {"sample_size": 1, "in_channels": 1, "model_channels": 4, "channel_mult": (1,), "layers_per_block": 1}
    size |= {"attention_resolutions": (1,), "attention_head_dim": 4, "norm_num_groups": 1}
    unet = MixtureUNet(out_channels=1, num_class_embeds=None, **size).eval()
    classifier = MixtureClassifier(num_classes=2, **size).eval()
    scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", variance_type="fixed_small", clip_sample=False)
    pipeline = ClassifierGuidedPipeline(unet, scheduler, classifier)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def shares(scale: float, particles: int, steps: int) -> torch.Tensor:
    """Share of each component among 4000 images of class 1, with a standard error of at most 0.008."""
    drawn = mixture_pipeline()(
        [1] * 4000,
        guidance_scale=scale,
        particles=particles,
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
    ).images
    nearest = (drawn.flatten()[:, None] - MEANS).abs().argmin(dim=1)
    return nearest.bincount(minlength=3) / len(nearest)


@pytest.mark.parametrize("scale, particles, steps", [(1.0, 16, 30), (3.0, 64, 30)])
def test_many_particles_draw_from_the_posterior(scale, particles, steps):
    """The shares of the unguided run are the prior, because few steps draw the components in slightly wrong shares."""
    posterior = shares(0.0, 1, steps) * CLASS_1**scale
    posterior = posterior / posterior.sum()
    errors = [(shares(scale, number, steps) - posterior).abs().max().item() for number in (1, particles)]
    assert errors[1] < 0.03 < errors[0]


def test_one_particle_is_plain_guidance():
    pipeline = tiny_pipeline()
    assert torch.equal(draw(pipeline, guidance_scale=5.0, particles=1), draw(pipeline, guidance_scale=5.0))


def test_density_ratio_of_a_guided_step():
    scheduler = DDPMScheduler(variance_type="fixed_small")
    solver = DDPMSolver(scheduler, NoiseSchedule.from_config(scheduler.config))
    x_t, x_0, gradient, latents = torch.randn(4, 2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    denoised = Denoised(x_0, solver.log_variance(None, 500, x_t))
    mean, variance = solver.mean(x_0, 500, x_t), torch.tensor(denoised.log_variance).exp()
    latents = mean + variance.sqrt() * latents
    plain, guided = (
        torch.distributions.Normal(centre.double(), variance.double().sqrt()).log_prob(latents.double()).sum((1, 2, 3))
        for centre in (mean, mean + variance * gradient)
    )
    ratio = solver.log_density_ratio(denoised, 500, x_t, gradient, latents)
    torch.testing.assert_close(ratio.double(), plain - guided, rtol=1e-4, atol=1e-4)


def test_particles_are_drawn_by_their_weights():
    particles = Particles(3000, 4, torch.Generator().manual_seed(0), torch.device("cpu"))
    weights = torch.tensor([0.1, 0.2, 0.3, 0.4])
    particles.log_weights = weights.log().expand(3000, 4) + 7.0
    assert torch.allclose(particles.effective_number, torch.tensor(1 / 0.3))
    chosen = particles.draw() - 4 * torch.arange(3000)
    torch.testing.assert_close(chosen.bincount(minlength=4) / 3000, weights, rtol=0, atol=0.03)


def test_particles_are_resampled_only_where_few_bear_the_weight():
    particles = Particles(2, 4, torch.Generator().manual_seed(0), torch.device("cpu"))
    log_psi = torch.tensor([0.0, 0.1, 0.0, 0.1, -50.0, 0.0, -50.0, -50.0])
    assert particles.select(log_psi).tolist() == [0, 1, 2, 3, 5, 5, 5, 5]
    assert torch.equal(particles.log_weights, torch.stack([log_psi[:4], torch.zeros(4)]))
    particles.propose(torch.full((8,), 2.0))
    particles.select(log_psi[[0, 1, 2, 3, 5, 5, 5, 5]] + 1.0)
    # log psi has grown by 1, and the ratio is 2
    assert torch.allclose(particles.log_weights[1], torch.full((4,), 3.0))


def test_a_seeds_image_is_the_same_in_any_batch():
    pipeline = tiny_pipeline()
    call = {"guidance_scale": 5.0, "particles": 3, "num_inference_steps": 4, "output_type": "latent"}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    both = pipeline(LABELS, generator=generators, **call).images
    alone = pipeline(LABELS[1:], generator=[torch.Generator().manual_seed(2)], **call).images
    assert both.shape == (2, 3, SIZE, SIZE)
    torch.testing.assert_close(both[1:], alone, rtol=1e-4, atol=1e-4)


def test_steps_show_particles_and_their_weights():
    call = {"guidance_scale": 5.0, "particles": 3, "num_inference_steps": 2}
    steps = list(tiny_pipeline().steps(LABELS, generator=torch.Generator().manual_seed(0), **call))
    assert [step.latents.shape[0] for step in steps] == [6, 6]
    assert [tuple(step.log_weights.shape) for step in steps] == [(2, 3), (2, 3)]
    assert steps[0].gradient is not None and steps[-1].gradient is None


def test_a_gradient_that_is_reused_is_that_of_the_chosen_particles():
    call = {"guidance_scale": 400.0, "particles": 4, "num_inference_steps": 4, "guidance_options": {"every": 3}}
    pipeline = tiny_pipeline()
    first, second, *_ = pipeline.steps([1], generator=torch.Generator().manual_seed(3), **call)
    assert (first.gradient == first.gradient[:1]).all()  # one particle had all the weight
    assert (second.gradient == second.gradient[:1]).all() and second.gradient.abs().max() > 0
    differentiated = []
    pipeline.classifier.register_forward_hook(
        lambda _, args, output: differentiated.append(output.logits.requires_grad)
    )
    steps = list(pipeline.steps([1], generator=torch.Generator().manual_seed(3), **{**call, "guidance_options": None}))
    assert sum(differentiated) == 3 and [step.gradient is None for step in steps] == [False, False, False, True]
    (alone,) = pipeline.steps([1], **{**call, "guidance_options": None, "num_inference_steps": 1})
    assert alone.gradient is None


def test_functions_upsamplers_and_weaker_predictions_take_part():
    def brighter(x_t, timestep, x_0, class_labels):
        return 10 * x_0.mean(dim=(1, 2, 3))

    pipeline = tiny_pipeline(tiny_unet(use_null_class=True))
    found = draw(pipeline, guidance_fn=brighter, guidance_scale=1.0, particles=4, cfg_weight=[0.5, 1.0])
    assert found.shape[0] == 2 and found.isfinite().all()
    upsampler = ADMUpsamplePipeline(tiny_unet(low_res_conditioning=True), tiny_scheduler(), low_res_size=SIZE // 2)
    upsampler.set_progress_bar_config(disable=True)
    small = torch.rand(2, 3, SIZE // 2, SIZE // 2)
    call = {"guidance_fn": brighter, "guidance_scale": 1.0, "num_inference_steps": 2, "output_type": "latent"}
    assert upsampler(small, LABELS, particles=2, **call).images.shape[0] == 2


def returns_gradient(x_t, timestep, x_0, class_labels):
    return x_t


BAD_CALLS = [
    ({"particles": 0}, "`particles` must be an integer"),
    ({"particles": 1.5}, "`particles` must be an integer"),
    ({"guidance_scale": 0.0}, "`guidance_scale` that is not 0"),
    ({"timesteps": [500, 300, 200, 300, 200, 0]}, "jumps back up"),
    ({"guidance_options": {"gradient_at": "mean"}}, "gradient_at='x_t'"),
    ({"latents": torch.zeros(2, 3, SIZE, SIZE)}, "Leave out `latents`"),
    ({"guider": {"kind": "AdaptiveProjectedMixGuidance"}}, "a `guider` with momentum"),
    ({"callback_on_step_end": lambda *arguments: {}}, "does not go together with callbacks"),
    ({"guidance_fn": returns_gradient}, "must return one log-probability per image with `particles`"),
]


@pytest.mark.parametrize("call, message", BAD_CALLS)
def test_bad_calls(call, message):
    call = {"guidance_scale": 1.0, "particles": 2, **call}
    call |= {"num_inference_steps": None} if "timesteps" in call else {}
    with pytest.raises(ValueError, match=message):
        draw(tiny_pipeline(), **call)


def test_solvers_without_a_density_are_refused():
    with pytest.raises(ValueError, match="requires DDPMScheduler.*DDIMScheduler"):
        draw(tiny_pipeline(scheduler=tiny_scheduler(DDIMScheduler)), guidance_scale=1.0, particles=2)
