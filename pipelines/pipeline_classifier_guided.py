"""Class-guided sampling with ADM (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4)."""

from collections.abc import Callable

import torch
from diffusers import ConfigMixin, DiffusionPipeline, ImagePipelineOutput, SchedulerMixin

from diffusers_adm.guidance import GuidanceFunction, GuidanceOptions
from diffusers_adm.guidance.gradient import gradients, without_gradients
from diffusers_adm.models import ADMUNet2DModel, NoisyClassifier
from diffusers_adm.openai.checkpoints import PublishedCheckpoint
from diffusers_adm.openai.files import Checkpoint
from diffusers_adm.pipelines.beginning import Beginning
from diffusers_adm.pipelines.checks import count_images
from diffusers_adm.pipelines.class_labels import ClassLabels, known_classes
from diffusers_adm.pipelines.guided_sampling import GuidedSamplingMixin
from diffusers_adm.pipelines.images import PipelineImage, model_images
from diffusers_adm.pipelines.options import SamplingOptions
from diffusers_adm.pipelines.particles import check_particles
from diffusers_adm.pipelines.sampling_steps import SamplingSteps, check_arguments, take_all, with_arguments_of
from diffusers_adm.pipelines.step_hooks import StepHooks
from diffusers_adm.solvers import Churn, Restart


class ClassifierGuidedPipeline(GuidedSamplingMixin, DiffusionPipeline):
    r"""
    Draws images with an ADM UNet that a noise-aware classifier guides towards a class. Each step is shifted by the gradient of
    log p(y | x_t). The gradient moves the mean of DDPM's steps (Algorithm 1 of arXiv 2105.05233), or the predicted noise of other
    solvers (Algorithm 2). A seed draws the same image as in the original code.

    Args:
        unet: [`ADMUNet2DModel`], class-conditional or unconditional.
        scheduler: Scheduler of diffusers, one of `diffusers_adm.solvers.SUPPORTED_SCHEDULERS`, such as `DDPMScheduler`,
            `DDIMScheduler` or `DPMSolverMultistepScheduler`. Its `clip_sample` and `clip_sample_range` clip the predicted
            x_0 before guidance, never after. A UNet with preconditioning, which is given the noise level, requires one of
            `diffusers_adm.solvers.SIGMA_SCHEDULERS` instead, such as `HeunDiscreteScheduler` or
            `CMStochasticIterativeScheduler`.
        classifier: [`NoisyClassifier`] that guides. `None` for a pipeline that only a `guidance_fn` can guide.
        id2label: Name of each class by its number. Commas separate synonyms.
        guidance_scale: Default guidance scale of a call.
        num_inference_steps: Default number of steps of a call.
        timestep_respacing: Default respacing string of a call, for DDPM and DDIM. It overrides the default of
            `num_inference_steps`.

    Raises:
        ValueError: If UNet, classifier and scheduler do not fit together.
    """

    def __init__(
        self,
        unet: ADMUNet2DModel,
        scheduler: SchedulerMixin,
        classifier: NoisyClassifier | None = None,
        id2label: dict | None = None,
        guidance_scale: float = 1.0,
        num_inference_steps: int = 250,
        timestep_respacing: str | None = None,
    ):
        super().__init__()
        self._register(unet, scheduler, classifier, id2label, guidance_scale, num_inference_steps, timestep_respacing)

    @classmethod
    def from_openai(
        cls,
        unet_checkpoint: Checkpoint | PublishedCheckpoint,
        classifier_checkpoint: Checkpoint | PublishedCheckpoint | None = None,
        flags: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "ClassifierGuidedPipeline":
        """
        Builds a pipeline that samples as the original code does with the same checkpoints and flags.

        Args:
            unet_checkpoint: Path of the UNet's file, its state dict, or a `PublishedCheckpoint`.
            classifier_checkpoint: Path of the classifier's file, its state dict, or a `PublishedCheckpoint`. `None` for a
                pipeline without a classifier.
            flags: Flags of the original command line, as one string. Released files are recognised by name and need no flags.
                `--image_size` describes both models. Other architecture flags without the prefix `classifier_` describe only the
                UNet. Respacing and guidance scale become the defaults of the pipeline.
            dtype: Data type of the weights. `None` keeps the data type of the checkpoint.

        Raises:
            ValueError: If a file cannot be read or contradicts the flags, or a flag is not supported.
        """
        published = PublishedCheckpoint.of(unet_checkpoint, flags)
        if published.kind == "upsampler":
            raise ValueError(
                "The checkpoint has the shapes of an upsampler. Use ADMUpsamplePipeline, or pass --learn_sigma False if it is a UNet"
                " without learned variance and all of its input channels are those of the image."
            )
        unet = ADMUNet2DModel.from_openai(published, dtype=dtype)
        classifier, labelled = None, published
        if classifier_checkpoint is not None:
            published_classifier = published.classifier(classifier_checkpoint)
            classifier = NoisyClassifier.from_openai(published_classifier, dtype=dtype)
            if unet.config.num_class_embeds is None:
                labelled = published_classifier  # the only model with labels
        return cls(
            unet,
            published.scheduler(),
            classifier,
            id2label=labelled.id2label,
            guidance_scale=published.guidance_scale,
            num_inference_steps=published.num_inference_steps,
            timestep_respacing=published.timestep_respacing,
        )

    @without_gradients()
    def steps(
        self,
        class_labels: ClassLabels | None = None,
        guidance_scale: float | list[float] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        timestep_respacing: str | None = None,
        condition_unet: bool = True,
        eta: float = 0.0,
        batch_size: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],
        cfg_weight: float | list[float] | torch.Tensor = 0.0,
        weaker: str | dict | ADMUNet2DModel | Callable | None = None,
        guidance_fn: GuidanceFunction | None = None,
        guidance_options: GuidanceOptions | dict | str | None = None,
        timesteps: list[int] | None = None,
        x_0_fn: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] | None = None,
        callback_on_step_start: Callable | None = None,
        churn: Churn | dict | None = None,
        guider: ConfigMixin | dict | None = None,
        epsilon_scale: float | tuple[float, float] | None = None,
        particles: int | None = None,
        image: PipelineImage | list[PipelineImage] | None = None,
        strength: float | None = None,
        start: float | torch.Tensor | None = None,
        with_gradients: bool = False,
        sigmas: list[float] | None = None,
        restart: Restart | dict | list | None = None,
    ) -> SamplingSteps:
        r"""
        Takes the steps of a call one at a time, so that images can be shown while they are drawn. Arguments are checked, and labels and
        x_T are drawn, before the iterator is returned. Each step is taken when the next item of the iterator is requested.

        A loop that is left early takes no further step. `close()` then closes the progress bar and releases offloaded models. Leaving a
        `for` loop over `pipe.steps(...)` does this too.

        Args:
            class_labels: Class of each image, by number or name: one label, a list of labels, or an integer tensor. If a network has
                classes, `None` draws `batch_size` random labels from `generator`, before the noise.
            guidance_scale: Scale of classifier guidance, one number or one per image. 0 turns it off. `None` means the default of the
                pipeline, or 0 if there is neither a classifier nor a `guidance_fn`.
            num_inference_steps: Number of steps, in [1, num_train_timesteps]. `None` means the default of the pipeline. DDPM spaces
                its timesteps evenly, including the first and the last. DDIM uses an integer stride from 0 if there is one that gives
                this number. One step is at the last timestep. With `timestep_spacing="trailing"`, both begin at the last timestep.
                Other values of `timestep_spacing` have no effect on DDPM and DDIM. Heun's method and DPM-Solver-2 (KDPM2) evaluate
                the UNet twice per step, except in the last step. PNDM evaluates it twice in the first step. A UNet with
                preconditioning is evaluated at the noise levels of Karras et al. 2022 (arXiv 2206.00364, eq. 5), and KDPM2 evaluates
                it twice in the last step too.
            timestep_respacing: Respacing string of the original code for DDPM and DDIM, such as `"250"`, `"ddim25"` or
                `"90,60,60,20,20"`. `""` means all timesteps. For `CMStochasticIterativeScheduler`, steps of a consistency model in the
                form of the original code, such as `"0,22,39"`. It overrides `num_inference_steps`.
            condition_unet: Whether the UNet is given the class. `False` uses the null class, so that only the classifier is given
                the label.
            eta: Noise of DDIM, in [0, 1]. 0 is deterministic.
            batch_size: Number of images, if none of `class_labels`, `latents` and `image` determines it.
            height: Height in pixels. `None` means the `sample_size` of the UNet.
            width: Width in pixels. `None` means the `sample_size` of the UNet.
            generator: Generator for all images, or a list of one generator per image. With a list, an image is the same in every
                batch, up to rounding. Differences of x_0 of up to 4.5e-4 have been measured, because torch sums in another order for
                another batch size.
            latents: Noise x_T, or noised images x_t at the timestep `start`, `(batch, channels, height, width)`. `None` draws noise.
            output_type: Type of the images: `"pil"` for PIL images, `"np"` for an array `(batch, height, width, channels)` in [0, 1],
                `"pt"` for a tensor `(batch, channels, height, width)` in [0, 1], or `"latent"` for x_0 without conversion.
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: Function `callback(pipeline, step, timestep, {"latents": ...})` that is called after each step. It
                returns a dict. Latents in the dict replace x_{t-1}. The callback may change `pipeline._guidance_scale`, set
                `pipeline._interrupt`, and call the pipeline. Both attributes belong to the run that called the callback. The networks
                are read at the beginning of a run, so a change of `pipeline.unet` takes effect in the next run.
            callback_on_step_end_tensor_inputs: Names of the tensors that are passed to the callback: `"latents"`, `"x_0"` (predicted
                clean images, before guidance), `"gradient"` (scaled gradient that guided the step, or `None` if the step was not
                guided) and `"log_probabilities"` (log p(y | x_t) of each class by the classifier, see
                [`~diffusers_adm.pipelines.sampling_steps.SamplingStep`]).
            cfg_weight: Weight w of classifier-free guidance, (1 + w) * epsilon(x, c) - w * epsilon(x) (Ho & Salimans 2022, eq. 6), one
                number or one per image. 0 turns it off. In other pipelines of diffusers, the `guidance_scale` of classifier-free
                guidance is 1 + w. It requires a UNet with a null class, and works with and without a classifier.
            weaker: Weaker prediction, which replaces epsilon(x) in classifier-free guidance. `None` or `"null_class"` means the
                prediction without a class. Other names are `"random_class"`, `"perturbed_attention"` and `"smoothed_attention"`. A
                dict such as `{"kind": "perturbed_attention", "layers": [...]}` adds options, see
                [`~diffusers_adm.guidance.WeakerPrediction`]. With a UNet, such as a smaller or less trained one, it is autoguidance
                (Karras et al. 2024, arXiv 2406.02507), and the guidance weight of the paper is 1 + w. A function
                `weaker(x_t, timestep, class_labels)` returns the prediction itself.
            guidance_fn: Function that guides instead of the classifier. It is given x_t, timestep, predicted x_0 and labels, and
                returns a log-probability per image, or a gradient. `guidance_scale` multiplies the gradient. See the docstring of
                `diffusers_adm.guidance`.
            guidance_options: Options of guidance, such as the noise levels at which it acts: a
                [`~diffusers_adm.guidance.GuidanceOptions`], or a dict such as `{"interval": (0.28, 2.9), "entropy_scaling": True}`.
                The name of a method of training-free guidance selects its options: `"dps"`, `"lgd"`, `"freedom"`, `"mpgd"`, `"ugd"`,
                `"tfg"` or `"dsg"`. A dict changes them, such as `{"method": "freedom", "recurrence": 4}`.
            timesteps: Training timesteps to visit, in this order. Each step goes down to the next lower timestep of the list, and the
                last step to the scheduler's own end. If the next entry of the list is a higher timestep, noise is added up to it, as in
                RePaint (Lugmayr et al. 2022, arXiv 2201.09865, Algorithm 1). For `CMStochasticIterativeScheduler`, its `timesteps`, such
                as `[22, 0]`.
            x_0_fn: Function `x_0_fn(x_0, timestep)` that replaces the predicted x_0 before guidance. x_0 has been clipped if the
                scheduler clips. Dynamic thresholding comes later, in the scheduler's step.
            callback_on_step_start: Function like `callback_on_step_end` that is called with x_t before each step.
            churn: Noise that is added before each step of Heun's and Euler's method (Karras et al. 2022, arXiv 2206.00364, Algorithm
                2): [`~diffusers_adm.solvers.Churn`], or a dict such as `{"s_churn": 40, "s_tmin": 0.05, "s_tmax": 50, "s_noise":
                1.003}`. KDPM2 takes it too if the UNet has preconditioning.
            guider: Guider of diffusers that combines the two predictions, instead of `cfg_weight`: `ClassifierFreeGuidance`,
                `AdaptiveProjectedGuidance`, `AdaptiveProjectedMixGuidance`, `ClassifierFreeZeroStarGuidance` or
                `TangentialClassifierFreeGuidance`. Its `guidance_scale` is 1 + w. A dict such as `{"kind": "AdaptiveProjectedGuidance",
                "guidance_scale": 2.5}` is also accepted.
            epsilon_scale: Divisor of the predicted noise before x_0 is computed, or a pair (k, b) for the divisor k t + b at timestep
                t. Numbers such as 1.005 compensate for errors that add up over the steps (Ning et al. 2024, arXiv 2308.15321).
            particles: Number K of particles per image, at K times the cost. `None` means one. Guided particles are weighted by the
                classifier and resampled. For large K, the images are samples of p(x_0) p(y | x_0)^s, where p(x_0) is the distribution
                of unguided images (twisted sequential Monte Carlo, Wu et al. 2023, arXiv 2306.17775). The last step is unguided.
                Particles require `DDPMScheduler`.
            image: Images to edit, one image or a list of images, of `height` and `width`. They are noised and drawn again (SDEdit, Meng
                et al. 2022, arXiv 2108.01073). They may be PIL images, paths or URLs, arrays `(height, width, channels)` or `(batch,
                height, width, channels)`, uint8 or in [0, 1], or tensors `(channels, height, width)` or `(batch, channels, height,
                width)` in [0, 1].
            strength: Fraction of the steps that are taken from the noised `image`, in (0, 1]. Of n steps, the last int(n * strength)
                are taken. With 1, the run begins with pure noise, and `image` has no effect.
            start: Timestep at which the run begins with `latents` or with the noised `image`, in place of `strength`. The run
                begins at its first step whose timestep is at most `start`, and `latents` must have the noise level of that step:
                sqrt(alpha_bar) * x_0 + sqrt(1 - alpha_bar) * epsilon, as `invert` with `until` returns. For a UNet with
                preconditioning, it is a noise level.
            with_gradients: Whether the result has gradients with respect to `latents` or a tensor `image`, through all steps and their
                guidance, for purification and adversarial attacks. Networks are evaluated again in the backward pass, so that memory
                does not grow with the activations of the steps. Functions of the caller must then return the same again, and
                networks that guide must not use gradient checkpointing. It requires an `output_type` of `"pt"` or `"latent"`. To save time, freeze the networks with `requires_grad_(False)`.
            sigmas: Noise levels sigma = sqrt((1 - alpha_bar) / alpha_bar) to visit, in this order, instead of `timesteps`. The UNet is
                given timesteps that are interpolated between the training timesteps. Leave out the end, 0.
            restart: Part of the run that is repeated, for solvers without noise: [`~diffusers_adm.solvers.Restart`], or a dict such as
                `{"sigma_min": 0.3, "sigma_max": 2, "times": 3}`, or a list of them. Whenever the run arrives at the lowest noise level of
                the part, noise is added up to its highest one (Xu et al. 2023, arXiv 2306.14878).

        Returns:
            Iterator over one [`~diffusers_adm.pipelines.sampling_steps.SamplingStep`] per step. It is a generator with the same return
            value as the call. After the last step of a run without particles, `step.images` are the images of the call.

        Raises:
            ValueError: If an argument is out of its range, or does not fit the models.
        """
        # 1. Check the inputs.
        options = SamplingOptions(
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            timestep_respacing=timestep_respacing,
            condition_unet=condition_unet,
            eta=eta,
            cfg_weight=cfg_weight,
            weaker=weaker,
            guider=guider,
            epsilon_scale=epsilon_scale,
            guidance_fn=guidance_fn,
            guidance_options=guidance_options,
            timesteps=timesteps,
            churn=churn,
            particles=particles,
            with_gradients=with_gradients,
            sigmas=sigmas,
            restart=restart,
        ).resolved(self)
        hooks = StepHooks(
            self, x_0_fn, callback_on_step_start, callback_on_step_end, callback_on_step_end_tensor_inputs
        )
        labels = None if class_labels is None else self.class_ids(class_labels)
        with gradients(with_gradients):
            image = None if image is None else model_images(image, self.unet.config.in_channels)
        beginning = Beginning(latents, image, start, strength)
        batch_size = count_images(batch_size, class_labels=labels, latents=latents, image=image)
        height = self.unet.config.sample_size if height is None else height
        width = self.unet.config.sample_size if width is None else width
        self._check_call(options, batch_size, height, width, generator, output_type, return_dict)

        # 2. Prepare the timesteps.
        solver = options.solver(self)
        beginning.skip(self, solver)
        check_particles(self, options, solver, batch_size, latents, hooks)
        factors = self._guidance_factors(
            options, solver, labels is not None or known_classes(self) is not None, batch_size
        )

        # 3. Prepare labels. They are drawn before x_T, and this order decides the labels and noise of a seed.
        labels = self._prepare_labels(labels, options, batch_size, generator)

        # 4. Prepare guidance and the first images, denoise (Algorithm 1 or 2), and make images of x_0.
        return self._run(
            options,
            solver,
            factors,
            labels,
            size=(batch_size, height, width),
            generator=generator,
            beginning=beginning,
            hooks=hooks,
            output_type=output_type,
            return_dict=return_dict,
        )

    @with_arguments_of(steps)
    def __call__(self, *args, **kwargs) -> ImagePipelineOutput | tuple:
        """
        Draws one image per label.

        Returns:
            `ImagePipelineOutput` with `images`, or the tuple `(images,)`.

        Raises:
            ValueError: If an argument is out of its range, or does not fit the models.
        """
        check_arguments(self.steps, type(self).__name__, *args, **kwargs)
        return take_all(self.steps(*args, **kwargs))

    def _check_components(self) -> None:
        super()._check_components()
        if self.unet.config.low_res_conditioning:
            raise ValueError(
                "The UNet must not be an upsampler (low_res_conditioning=True), because this pipeline draws without a small image. Use"
                " ADMUpsamplePipeline."
            )
