"""Class-conditional super-resolution with ADM (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4.4, appendix A)."""

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
from diffusers_adm.pipelines.class_labels import ClassLabels
from diffusers_adm.pipelines.guided_sampling import NO_LABELS, GuidedSamplingMixin
from diffusers_adm.pipelines.images import PipelineImage, model_images
from diffusers_adm.pipelines.options import SamplingOptions, per_image
from diffusers_adm.pipelines.particles import check_particles
from diffusers_adm.pipelines.sampling_steps import SamplingSteps, check_arguments, take_all, with_arguments_of
from diffusers_adm.pipelines.step_hooks import StepHooks
from diffusers_adm.solvers import Churn, Restart


class ADMUpsamplePipeline(GuidedSamplingMixin, DiffusionPipeline):
    r"""
    Draws large images from small images. The input of the ADM UNet is the noised large image and the enlarged small image. A seed
    draws the same image as in the original code.

    Args:
        unet: [`ADMUNet2DModel`] with `low_res_conditioning`. Its `sample_size` is the size of the large image.
        scheduler: Scheduler of diffusers, see [`ClassifierGuidedPipeline`].
        classifier: [`NoisyClassifier`] of large images, which guides this stage. The paper guides only the small image.
        id2label: Name of each class by its number. Commas separate synonyms.
        guidance_scale: Default guidance scale of a call.
        num_inference_steps: Default number of steps of a call.
        timestep_respacing: Default respacing string of a call, for DDPM and DDIM. It overrides the default of
            `num_inference_steps`.
        low_res_size: Height and width of the small images that the UNet was trained on. It must be a divisor of `sample_size`.

    Raises:
        ValueError: If UNet, classifier, scheduler and `low_res_size` do not fit together.
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
        low_res_size: int = 64,
    ):
        super().__init__()
        self._register(
            unet,
            scheduler,
            classifier,
            id2label,
            guidance_scale,
            num_inference_steps,
            timestep_respacing,
            low_res_size=low_res_size,
        )

    @classmethod
    def from_openai(
        cls,
        checkpoint: Checkpoint | PublishedCheckpoint,
        flags: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> "ADMUpsamplePipeline":
        """
        Builds a pipeline that samples as the original code does with the same checkpoint and flags.

        Args:
            checkpoint: Path of the upsampler's file, its state dict, or a `PublishedCheckpoint`.
            flags: Flags of the original command line, as one string. Released files are recognised by name and need no flags.
            dtype: Data type of the weights. `None` keeps the data type of the checkpoint.

        Raises:
            ValueError: If the file cannot be read, does not hold an upsampler, or contradicts the flags.
        """
        published = PublishedCheckpoint.of(checkpoint, flags)
        if published.kind == "unet":
            raise ValueError(
                "The checkpoint must hold an upsampler, but it has no low-resolution input. Use ClassifierGuidedPipeline."
            )
        return cls(
            ADMUNet2DModel.from_openai(published, dtype=dtype),
            published.scheduler(),
            id2label=published.id2label,
            timestep_respacing=published.timestep_respacing,
            low_res_size=published.flags["small_size"],
        )

    @without_gradients()
    def steps(
        self,
        image: PipelineImage | list[PipelineImage],
        class_labels: ClassLabels | None = None,
        guidance_scale: float | list[float] | torch.Tensor | None = None,
        num_inference_steps: int | None = None,
        timestep_respacing: str | None = None,
        condition_unet: bool = True,
        eta: float = 0.0,
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
        start: float | torch.Tensor | None = None,
        with_gradients: bool = False,
        sigmas: list[float] | None = None,
        restart: Restart | dict | list | None = None,
    ) -> SamplingSteps:
        r"""
        Takes the steps of a call one at a time, so that images can be shown while they are drawn. Arguments are checked, and x_T is
        drawn, before the iterator is returned. Each step is taken when the next item of the iterator is requested.

        A loop that is left early takes no further step. `close()` then closes the progress bar and releases offloaded models. Leaving a
        `for` loop over `pipe.steps(...)` does this too.

        Args:
            image: Small images: one image, or a list of images. They may be PIL images, paths or URLs, arrays `(height, width,
                channels)` or `(batch, height, width, channels)`, uint8 or in [0, 1], or tensors `(channels, height, width)` or
                `(batch, channels, height, width)` in [0, 1]. [`ClassifierGuidedPipeline`] returns such images for every `output_type`
                except `"latent"`.
            class_labels: Class of each image, by number or name. `None` for an upsampler without classes, or for the null class.
            guidance_scale: Scale of classifier guidance, one number or one per image. `None` means the default of the pipeline, or 0 if
                there are no labels, or neither a classifier nor a `guidance_fn`.
            num_inference_steps: Number of steps, see [`ClassifierGuidedPipeline.__call__`].
            timestep_respacing: Respacing string of DDPM or DDIM, see [`ClassifierGuidedPipeline.__call__`].
            condition_unet: Whether the UNet is given the class. `False` uses the null class.
            eta: Noise of DDIM, in [0, 1]. 0 is deterministic.
            height: Height of the large image in pixels. `None` means the `sample_size` of the UNet. The small image must be smaller by
                the factor `sample_size / low_res_size`.
            width: Width of the large image in pixels, like `height`.
            generator: Generator for all images, or a list of one generator per image.
            latents: Noise x_T, or noised images x_t at the timestep `start`, `(batch, channels, height, width)`. `None` draws noise.
            output_type: Type of the images: `"pil"`, `"np"`, `"pt"` or `"latent"`, see [`ClassifierGuidedPipeline.__call__`].
            return_dict: Whether to return an `ImagePipelineOutput` instead of a tuple.
            callback_on_step_end: Function `callback(pipeline, step, timestep, {"latents": ...})` that is called after each
                step, see [`ClassifierGuidedPipeline.__call__`].
            callback_on_step_end_tensor_inputs: Names of the tensors that are passed to the callback: `"latents"`, `"x_0"`,
                `"gradient"` and `"log_probabilities"`.
            cfg_weight: Weight w of classifier-free guidance, see [`ClassifierGuidedPipeline.__call__`].
            weaker: Weaker prediction that `cfg_weight` moves away from, see [`ClassifierGuidedPipeline.__call__`].
            guidance_fn: Function that guides instead of the classifier, see [`ClassifierGuidedPipeline.__call__`].
            guidance_options: Options of guidance, a [`~diffusers_adm.guidance.GuidanceOptions`], a dict or the name of a method.
            timesteps: Training timesteps to visit, see [`ClassifierGuidedPipeline.__call__`].
            x_0_fn: Function `x_0_fn(x_0, timestep)` that replaces the predicted x_0 before guidance, see
                [`ClassifierGuidedPipeline.__call__`].
            callback_on_step_start: Function like `callback_on_step_end` that is called with x_t before each step.
            churn: Noise that is added before each step, see [`ClassifierGuidedPipeline.__call__`].
            guider: Guider of diffusers that replaces `cfg_weight`, see [`ClassifierGuidedPipeline.__call__`].
            epsilon_scale: Divisor of the predicted noise, see [`ClassifierGuidedPipeline.__call__`].
            particles: Number of particles per image, see [`ClassifierGuidedPipeline.__call__`].
            start: Timestep of `latents`, at which the run begins, see [`ClassifierGuidedPipeline.__call__`].
            with_gradients: Whether the result has gradients with respect to `latents` or a tensor `image`, see
                [`ClassifierGuidedPipeline.__call__`].
            sigmas: Noise levels to visit, see [`ClassifierGuidedPipeline.__call__`].
            restart: Parts of the run that are repeated, see [`ClassifierGuidedPipeline.__call__`].

        Returns:
            Iterator over one [`~diffusers_adm.pipelines.sampling_steps.SamplingStep`] per step. It is a generator with the same return
            value as the call. After the last step of a run without particles, `step.images` are the images of the call.

        Raises:
            ValueError: If an argument is out of its range, or does not fit the models.
        """
        # 1. Check the inputs.
        with gradients(with_gradients):
            low_res = self.prepare_low_res(image)  # (batch, channels, small height, small width)
        height = self.unet.config.sample_size if height is None else height
        width = self.unet.config.sample_size if width is None else width
        self._check_size(height, width)
        self._check_low_res_size(low_res, height, width)
        if class_labels is None:
            guidance_scale = self._scale_without_labels(guidance_scale, guidance_fn, len(low_res))
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
        beginning = Beginning(latents=latents, start=start)
        batch_size = count_images(1, image=low_res, class_labels=labels, latents=latents)
        self._check_call(options, batch_size, height, width, generator, output_type, return_dict)

        # 2. Prepare the timesteps.
        solver = options.solver(self)
        beginning.skip(self, solver)
        check_particles(self, options, solver, batch_size, latents, hooks)
        factors = self._guidance_factors(options, solver, labels is not None, batch_size)

        # 3. Prepare labels, which are never drawn here.
        if labels is not None:
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
            low_res=low_res,
        )

    @with_arguments_of(steps)
    def __call__(self, *args, **kwargs) -> ImagePipelineOutput | tuple:
        """
        Draws one large image for each small image.

        Returns:
            `ImagePipelineOutput` with `images`, or the tuple `(images,)`.

        Raises:
            ValueError: If an argument is out of its range, or does not fit the models.
        """
        check_arguments(self.steps, type(self).__name__, *args, **kwargs)
        return take_all(self.steps(*args, **kwargs))

    def _check_low_res_size(self, low_res: torch.Tensor, height: int, width: int) -> None:
        """Raises a ValueError if the size of the small images does not fit the size of the large images."""
        sample_size, low_res_size = self.unet.config.sample_size, self.config.low_res_size
        given, needed = low_res.shape[2:], [side * low_res_size / sample_size for side in (height, width)]
        if list(given) != needed:
            raise ValueError(
                f"`image` must be {needed[0]:g}x{needed[1]:g} (height x width) for a large image of {height}x{width}, but got"
                f" {given[0]}x{given[1]}. Resize it, or pass {sample_size // low_res_size} times its `height` and `width`."
            )

    def _scale_without_labels(
        self,
        guidance_scale: float | list[float] | torch.Tensor | None,
        guidance_fn: GuidanceFunction | None,
        batch_size: int,
    ) -> float | list[float] | torch.Tensor | None:
        """
        Returns the guidance scale of a call without labels. It is 0 unless a `guidance_fn` guides.

        Raises:
            ValueError: If the UNet requires labels, or the scale of the classifier is not 0.
        """
        if self.unet.config.num_class_embeds is not None and self.unet.null_class is None:
            raise ValueError(
                "`class_labels` are required, because the upsampler has classes and no null class, but got None."
            )
        if guidance_fn is not None:
            return guidance_scale
        if guidance_scale is not None and any(per_image(guidance_scale, batch_size, "guidance_scale")):
            raise ValueError(NO_LABELS.format(guidance_scale))
        return 0.0

    def prepare_low_res(self, image: PipelineImage | list[PipelineImage]) -> torch.Tensor:
        """
        Converts small images to the input of the UNet, `(batch, channels, height, width)` in [-1, 1], float32.

        Args:
            image: Small images, see `__call__`.

        Raises:
            ValueError: If an image has a wrong type, range or number of channels, or images differ in size.
        """
        return model_images(image, self.unet.config.in_channels)

    def _check_components(self) -> None:
        super()._check_components()
        config, low_res_size = self.unet.config, self.config.low_res_size
        if not config.low_res_conditioning:
            raise ValueError(
                "The UNet must be an upsampler (low_res_conditioning=True). Use ClassifierGuidedPipeline for this UNet."
            )
        if low_res_size < 1 or config.sample_size % low_res_size or low_res_size == config.sample_size:
            raise ValueError(
                f"`low_res_size` must be a divisor of the UNet's sample_size, {config.sample_size}, and smaller, but got"
                f" {low_res_size}."
            )
