"""Sampling that both pipelines share: checks and preparation of a run."""

from functools import partial

import torch
from diffusers import DDPMScheduler, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor

from diffusers_adm.checks import check_types, is_integer, plain_numbers
from diffusers_adm.data.image_modes import MODES
from diffusers_adm.guidance import GuidanceOptions, Guider
from diffusers_adm.guidance.functions import ClassifierGuidance, RunClassifierGuidance
from diffusers_adm.guidance.gradient import gradients
from diffusers_adm.guidance.particles import Particles
from diffusers_adm.guidance.sums import classes_of_guidance, summands
from diffusers_adm.models import ADMUNet2DModel, NoisyClassifier
from diffusers_adm.models.class_names import numbered_names
from diffusers_adm.models.preconditioning import training_schedule
from diffusers_adm.pipelines.beginning import Beginning
from diffusers_adm.pipelines.checks import (
    check_classifier,
    check_classifier_of_call,
    check_eval_mode,
    check_guidance_options,
    check_parts,
    check_scheduler_fits,
    check_takes_timesteps,
    check_with_gradients,
    networks_that_guide,
    networks_that_predict,
)
from diffusers_adm.pipelines.class_labels import (
    ClassLabels,
    ClassNames,
    check_labels,
    check_range,
    draw_labels,
    known_classes,
    known_names,
)
from diffusers_adm.pipelines.denoising import DenoisingMixin, Generators
from diffusers_adm.pipelines.inversion import InversionMixin
from diffusers_adm.pipelines.options import SamplingOptions, per_image
from diffusers_adm.pipelines.particles import for_particles, repeated
from diffusers_adm.pipelines.predictions import build_denoiser, check_weaker
from diffusers_adm.pipelines.runs import Runs
from diffusers_adm.pipelines.sampling_steps import SamplingSteps
from diffusers_adm.pipelines.saving import SavingMixin
from diffusers_adm.pipelines.step_hooks import StepHooks, check_function
from diffusers_adm.respacing import respaced_timesteps
from diffusers_adm.solvers import Solver


OUTPUT_TYPES = ("pil", "np", "pt", "latent")
NO_CLASSIFIER = (
    "`guidance_scale` requires a classifier or a `guidance_fn`, but got {} without them. Pass 0. For classifier-free guidance, pass"
    " `cfg_weight`, which is the `guidance_scale` of other pipelines of diffusers minus 1."
)
NO_LABELS = "`guidance_scale` requires `class_labels`, but got {} without them. Pass 0."


class GuidedSamplingMixin(InversionMixin, SavingMixin, DenoisingMixin):
    """
    Sampling with an ADM UNet, a scheduler and an optional noise-aware classifier. The mixin does not derive from `DiffusionPipeline`,
    because diffusers expects exactly one class that does in the code file of a pipeline.
    """

    model_cpu_offload_seq = "unet->classifier"
    _optional_components = ["classifier"]
    _callback_tensor_inputs = StepHooks.TENSORS

    def _register(
        self,
        unet: ADMUNet2DModel,
        scheduler: SchedulerMixin,
        classifier: NoisyClassifier | None,
        id2label: dict | None,
        guidance_scale: float,
        num_inference_steps: int,
        timestep_respacing: str | None,
        **config,
    ) -> None:
        """Checks and registers components and config. Every pipeline's constructor calls it."""
        check_parts(unet, classifier)
        check_scheduler_fits(unet, scheduler)
        config |= {
            "guidance_scale": guidance_scale,
            "num_inference_steps": num_inference_steps,
            "timestep_respacing": timestep_respacing,
        }
        check_types(type(self).__init__, config)
        per_image(guidance_scale, 1, "guidance_scale")
        if num_inference_steps < 1:
            raise ValueError(f"`num_inference_steps` must be at least 1, but got {num_inference_steps}.")
        if timestep_respacing is not None and unet.config.get("preconditioning") is None:
            respaced_timesteps(timestep_respacing, scheduler.config.num_train_timesteps)
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier)
        self.register_to_config(id2label=numbered_names(id2label), **plain_numbers(config))
        self._check_components()
        self._runs = Runs()
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    @property
    def label2id(self) -> dict[str, list[int]]:
        """Numbers of the classes that have a name. Each synonym is an entry."""
        return ClassNames(known_names(self)).label2id

    def class_ids(self, class_labels: ClassLabels) -> list[int]:
        """
        Converts labels that are numbers or names to numbers.

        Args:
            class_labels: One label, a list of labels (nested lists are flattened), or an integer tensor or array.

        Raises:
            ValueError: If a name is unknown or means several classes, or a label is neither a name nor an integer.
        """
        return ClassNames(known_names(self)).class_ids(class_labels)

    def _prepare_labels(
        self, labels: list[int] | None, options: SamplingOptions, batch_size: int, generator: Generators
    ) -> list[int] | None:
        """Checks given labels. If there are none and a network has classes, draws random labels."""
        if labels is None:
            num_classes = options.num_classes(self) or known_classes(self)
            return None if num_classes is None else draw_labels(num_classes, batch_size, generator).tolist()
        unet_takes_labels = options.unet_takes_labels(self)
        if unet_takes_labels or options.guidance_fn is None:  # otherwise only `guidance_fn` uses the labels
            guided = options.guided_by_classifier(self)
            scales = per_image(options.guidance_scale, batch_size, "guidance_scale") if guided else None
            check_labels(self, labels, unet_takes_labels, scales)
        for num_classes in classes_of_guidance(options.guidance_fn):
            check_range(labels, num_classes)
        return labels

    def _guidance_factors(
        self, options: SamplingOptions, solver: Solver, has_labels: bool, batch_size: int
    ) -> list[float]:
        """
        Checks the options of guidance. Call it before labels are drawn, so that an invalid call does not advance the generator.

        Args:
            options: Resolved options of the run.
            solver: Run of the scheduler.
            has_labels: Whether each image has a label, which may be given or drawn.
            batch_size: Number of images.

        Returns:
            Factor of guidance scale and weight at each step. It is 0 at steps without guidance.

        Raises:
            ValueError: If the options contradict each other, or guidance acts at no step.
        """
        guidance_options, guidance_fn = GuidanceOptions.parse(options.guidance_options), options.guidance_fn
        check_guidance_options(self, guidance_options, guidance_fn, options.eta)
        scales = per_image(options.guidance_scale, batch_size, "guidance_scale")
        weaker_guides = check_weaker(self, options, has_labels, batch_size)
        if any(scales) and guidance_fn is None and self.classifier is None:
            raise ValueError(NO_CLASSIFIER.format(options.guidance_scale))
        factors = guidance_options.factors(solver.sigmas)
        if (any(scales) or weaker_guides) and not any(factors):
            raise ValueError(
                f"`guidance_options` must let guidance act at one of the {len(factors)} steps or more, but got {guidance_options}."
            )
        return factors

    def _prepare_guider(
        self,
        options: SamplingOptions,
        solver: Solver,
        factors: list[float],
        labels: list[int] | None,
        generator: Generators,
        device: torch.device,
    ) -> Guider:
        """Returns the guidance of a run, by the classifier or by `guidance_fn`."""
        guidance_options, guidance_fn = GuidanceOptions.parse(options.guidance_options), options.guidance_fn
        if guidance_fn is None and self.classifier is not None:
            max_entropy_scale = guidance_options.max_entropy_scale if guidance_options.entropy_scaling else None
            schedule, config = None, self.classifier.config
            if self.unet.config.get("preconditioning") is not None:
                schedule = training_schedule(config.num_train_timesteps, config.beta_schedule)
            guidance_fn = RunClassifierGuidance(self.classifier, max_entropy_scale, schedule)
        elif any(isinstance(part, ClassifierGuidance) for part in summands(guidance_fn)):
            check_takes_timesteps(self.unet, "guidance_fn=ClassifierGuidance(...)")

        def check_scales(scales: list[float]) -> None:
            self._check_scales(scales, options, guidance_fn is not None, labels)

        return Guider(
            guidance_fn,
            guidance_options,
            solver,
            factors,
            None if labels is None else torch.tensor(labels, device=device),
            through_half=guidance_options.goes_through_unet(guidance_fn) and self.unet.dtype == torch.float16,
            check_scales=check_scales,
            generator=generator,
            with_gradients=options.with_gradients,
        )

    def _check_scales(
        self, scales: list[float], options: SamplingOptions, guides: bool, labels: list[int] | None
    ) -> None:
        """Raises a ValueError if images whose scale is not 0 cannot be guided, because a classifier or valid labels are missing."""
        given = scales[0] if len(set(scales)) == 1 else scales
        if any(scales) and not guides:
            raise ValueError(NO_CLASSIFIER.format(given))
        if options.guidance_fn is None and labels is not None:
            check_labels(self, labels, options.unet_takes_labels(self), scales)
        elif options.guidance_fn is None and any(scales):
            raise ValueError(NO_LABELS.format(given))

    def _run(
        self,
        options: SamplingOptions,
        solver: Solver,
        factors: list[float],
        labels: list[int] | None,
        size: tuple[int, int, int],
        generator: Generators,
        beginning: Beginning,
        hooks: StepHooks,
        output_type: str,
        return_dict: bool,
        low_res: torch.Tensor | None = None,
    ) -> SamplingSteps:
        """
        Prepares guidance and the images of the first step, and returns an iterator over the steps.

        Args:
            options: Resolved options of the run.
            solver: Solver of the run.
            factors: Factor of guidance at each step.
            labels: Class of each image, or `None`.
            size: Number of images, height and width.
            generator: Generator of the noise, one for all images or one per image.
            beginning: Images with which the run begins.
            hooks: Functions of the caller.
            output_type: Type of the images.
            return_dict: Whether the iterator returns an `ImagePipelineOutput` instead of a tuple.
            low_res: Low-resolution images of an upsampler, `(batch, channels, any height, any width)`, or `None`.
        """
        batch_size, height, width = size
        device = self._execution_device  # read once, because it walks over all modules
        particles = None
        if options.particles not in (None, 1):  # each particle is a row of its own
            count = options.particles
            particles = Particles(batch_size, count, generator, device)
            options, batch_size = for_particles(options, batch_size), batch_size * count
            labels, generator = repeated(labels, count), repeated(generator, count)
            beginning = beginning.per_particle(count)
            low_res = None if low_res is None else low_res.repeat_interleave(count, dim=0)
        with gradients(options.with_gradients):
            low_res = None if low_res is None else low_res.to(device)
        guidance_options = GuidanceOptions.parse(options.guidance_options)
        guides = any(per_image(options.guidance_scale, batch_size, "guidance_scale")) or options.guider is not None
        guides = guides or any(per_image(options.cfg_weight, batch_size, "cfg_weight"))
        counts = [guidance_options.recurrence if factor and guides else 1 for factor in factors]
        factors = [factor for factor, count in zip(factors, counts) for _ in range(count)]
        solver.repeat(counts)
        solver.spherical = guidance_options.spherical
        # The last step adds no noise, so guidance of particles could not be weighted there.
        guided = factors if particles is None else [*factors[:-1], 0.0]
        guider = self._prepare_guider(options, solver, guided, labels, generator, device)
        denoiser = build_denoiser(self, options, solver, factors, labels, batch_size, generator, low_res)
        shape = (batch_size, self.unet.config.in_channels, height, width)
        with gradients(options.with_gradients):
            x_t = beginning.first_images(solver, shape, generator, device)
        make_images = partial(self.image_processor.postprocess, output_type=output_type)
        steps = self._denoise(x_t, options, solver, denoiser, guider, hooks, generator, make_images, particles)
        return self._finish(steps, make_images, return_dict, options.with_gradients)

    def _check_components(self) -> None:
        check_parts(self.unet, self.classifier)
        check_scheduler_fits(self.unet, self.scheduler)
        unet = self.unet.config
        if isinstance(self.scheduler, DDPMScheduler):
            variance_type = self.scheduler.config.variance_type
            if (variance_type == "learned_range") != self.unet.learns_variance:
                needed = "learned_range" if self.unet.learns_variance else "fixed_large"
                raise ValueError(
                    f"The scheduler's variance_type={variance_type!r} does not fit a UNet with in_channels={unet.in_channels}"
                    f" and out_channels={unet.out_channels}. Use DDPMScheduler.from_config(config, variance_type={needed!r})."
                )
        if self.classifier is not None:
            check_classifier(self)

    def _check_size(self, height: int, width: int) -> None:
        factor = 2 ** (len(self.unet.config.channel_mult) - 1)
        if not all(is_integer(side) and side > 0 and side % factor == 0 for side in (height, width)):
            raise ValueError(
                f"`height` and `width` must be positive multiples of {factor}, but got {height!r} and {width!r}."
            )

    def _check_call(
        self,
        options: SamplingOptions,
        batch_size: int,
        height: int,
        width: int,
        generator: Generators,
        output_type: str,
        return_dict: bool,
    ) -> None:
        """Checks all inputs that can be checked before timesteps and labels are known."""
        booleans = {"condition_unet": options.condition_unet, "with_gradients": options.with_gradients}
        check_types(type(self).steps, {**booleans, "return_dict": return_dict})
        self._check_components()
        evaluated, guiding = networks_that_predict(self, options), networks_that_guide(self, options)
        check_eval_mode(evaluated | guiding)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {OUTPUT_TYPES}, but got {output_type!r}.")
        if output_type == "pil" and self.unet.config.in_channels not in MODES:
            raise ValueError(
                f"output_type='pil' requires images of 1 or 3 channels, but the UNet has {self.unet.config.in_channels}. Pass"
                " 'np', 'pt' or 'latent'."
            )
        check_function("guidance_fn", options.guidance_fn)
        if (
            not options.condition_unet
            and self.unet.config.num_class_embeds is not None
            and self.unet.null_class is None
        ):
            raise ValueError(
                "condition_unet=False requires a UNet with a null class (use_null_class) or without classes, but this UNet has"
                " neither."
            )
        generators = generator if isinstance(generator, list) else [generator] * batch_size
        if generator is not None and not all(isinstance(own, torch.Generator) for own in generators):
            raise ValueError(f"`generator` must be a torch.Generator, or a list of them, but got {generator!r}.")
        if len(generators) != batch_size:
            raise ValueError(
                f"`generator` must have one generator per image, {batch_size}, but got {len(generators)}."
            )
        scales = per_image(options.guidance_scale, batch_size, "guidance_scale")
        check_with_gradients(options, output_type, evaluated, guiding if any(scales) else {})
        self._check_size(height, width)
        if any(scales) and guiding.get("classifier") is not None:
            check_classifier_of_call(self, options, height, width)
