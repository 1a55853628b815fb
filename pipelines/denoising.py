"""Loop over the steps of a run: Algorithms 1 and 2 of Dhariwal & Nichol 2021 (arXiv 2105.05233)."""

from collections.abc import Callable, Generator
from dataclasses import replace

import torch
from diffusers import ImagePipelineOutput

from diffusers_adm.guidance import Guider, RunDenoiser
from diffusers_adm.guidance.gradient import gradients
from diffusers_adm.guidance.particles import Particles
from diffusers_adm.pipelines.checks import check_finite
from diffusers_adm.pipelines.options import SamplingOptions, per_image
from diffusers_adm.pipelines.runs import RunStateMixin
from diffusers_adm.pipelines.sampling_steps import SamplingStep, SamplingSteps
from diffusers_adm.pipelines.step_hooks import StepHooks
from diffusers_adm.solvers import Solver


Generators = torch.Generator | list[torch.Generator] | None


class DenoisingMixin(RunStateMixin):
    """Loop of a `DiffusionPipeline` over the steps of a run."""

    def _denoise(
        self,
        x_t: torch.Tensor,
        options: SamplingOptions,
        solver: Solver,
        denoiser: RunDenoiser,
        guider: Guider,
        hooks: StepHooks,
        generator: Generators,
        make_images: Callable,
        particles: Particles | None = None,
    ) -> Generator[SamplingStep, None, torch.Tensor]:
        """
        Yields the steps of a run, and returns x_0, `(batch, channels, height, width)`.

        Args:
            x_t: Images of the first step, `(batch, channels, height, width)`, float32.
            options: Resolved options of the run.
            solver: Run of the scheduler.
            denoiser: Denoiser of the run.
            guider: Guidance of the run.
            hooks: Hooks of the caller.
            generator: Generator of the noise, one for all images or one per image.
            make_images: Function from latents to images.
            particles: Weights of the particles, of which one is returned per image. `None` if each row is an image.
        """
        batch_size, visits = len(x_t), solver.visits
        timesteps = solver.schedule.timesteps.to(x_t.device)  # (steps,), least noisy first
        with (
            self._runs.running(options.guidance_scale, len(visits)) as run,
            self.progress_bar(total=len(visits)) as progress_bar,
        ):
            for step, index in enumerate(visits):
                # Both contexts end before the yield, because the code of the caller runs there.
                with self._runs.step_of(run), gradients(options.with_gradients):
                    x_t = solver.renoise(x_t, step - 1, generator) if step else x_t
                    t, timestep = timesteps[index], timesteps[index].expand(batch_size)  # (), (batch,)
                    x_t = hooks.start(solver, step, t, x_t)
                    guider.begin_step(step, per_image(run.guidance_scale, batch_size, "guidance_scale"), x_t)

                    with guider.tracking(x_t, self.unet) as x_in:  # x_0 and Sigma, from the UNet at x_t
                        denoised = solver.predict(denoiser(x_in, timestep, step), index, x_in)
                        denoised = hooks.x_0(step, t, denoised)
                        gradient = guider.gradient(x_in, timestep, denoised.x_0)  # s * grad log p(y | x_t)
                    denoised = denoised if options.with_gradients else denoised.detach()
                    if particles is not None:
                        rows = particles.select(guider.log_psi(x_t, timestep, denoised.x_0))
                        x_t, denoised, gradient = x_t[rows], denoised.rows(rows), guider.select(rows, gradient)
                    moved = guider.move(denoised, x_t, timestep)  # x_0 + w * s * grad log p(y | x_0)
                    latents = solver.step(moved, index, x_t, gradient, generator)  # Algorithm 1 or 2
                    if particles is not None and gradient is not None:
                        particles.propose(solver.log_density_ratio(denoised, index, x_t, gradient, latents))

                    taken = SamplingStep(
                        index=step,
                        num_steps=len(visits),
                        timestep=t,
                        sigma=solver.sigmas[step],
                        class_labels=guider.class_labels,
                        x_t=x_t,
                        x_0=denoised.x_0,
                        gradient=gradient,
                        latents=latents,
                        log_weights=None if particles is None else particles.log_weights,
                        _classify=guider.classification(x_t, timestep),
                        _make_images=make_images,
                    )
                    x_t = hooks.end(solver, taken)
                    taken = replace(taken, latents=x_t)
                progress_bar.update()
                yield taken
                if run.interrupt:
                    break
        visited = solver.schedule.timesteps[visits].tolist()
        hooks.finite.check(visited)
        guider.finite.check(visited)
        check_finite(x_t)
        return x_t if particles is None else x_t[particles.draw()]

    def _finish(
        self,
        steps: Generator[SamplingStep, None, torch.Tensor],
        make_images: Callable,
        return_dict: bool,
        with_gradients: bool,
    ) -> SamplingSteps:
        """Yields the steps of a run, and returns its images. Offloaded models are released however the run ends."""
        try:
            x_0 = yield from steps
        finally:
            self.maybe_free_model_hooks()
        with gradients(with_gradients):
            images = make_images(x_0)
        return ImagePipelineOutput(images=images) if return_dict else (images,)
