"""What the pipelines share: labels, and the loop that samples (arXiv 2105.05233, section 4)."""

import contextlib
import copy
import difflib
from collections.abc import Callable
from numbers import Integral

import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, ImagePipelineOutput, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils.torch_utils import randn_tensor, unwrap_module

from diffusers_adm.diffusion import NoiseSchedule, Prediction, add_noise, read_prediction, renoise, x_0_from_epsilon
from diffusers_adm.guidance import (
    ClassifierGuidance,
    GuidanceFunction,
    GuidanceOptions,
    combine_predictions,
    differentiable,
    guidance_gradient,
    leaf,
    normalized,
    shortened,
)
from diffusers_adm.models import ADMUNet2DModel, NoisyClassifier
from diffusers_adm.pipelines.saving import SavingMixin
from diffusers_adm.solvers import DDPMSolver, build_solver, check_scheduler, takes_respacing, visited_steps


OUTPUT_TYPES = ("pil", "np", "pt", "latent")

ClassLabels = int | str | list | torch.Tensor | np.ndarray


class GuidedSamplingMixin(SavingMixin):
    """
    Of a `DiffusionPipeline` with an ADM UNet, a scheduler and, if it is guided, a noise-aware classifier. Not a pipeline by
    itself: diffusers takes the one class of a file that is.
    """

    model_cpu_offload_seq = "unet->classifier"
    _optional_components = ["classifier"]
    _callback_tensor_inputs = ["latents", "x_0", "gradient"]

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
        """What all constructors do."""
        self.register_modules(unet=unet, scheduler=scheduler, classifier=classifier)
        self.register_to_config(
            # JSON has made strings of the keys of a saved pipeline.
            id2label=None if id2label is None else {int(label): name for label, name in id2label.items()},
            guidance_scale=guidance_scale,
            num_inference_steps=num_inference_steps,
            timestep_respacing=timestep_respacing,
            **config,
        )
        self._check_components()
        self._guidance_scale = guidance_scale
        self.image_processor = VaeImageProcessor(vae_scale_factor=1, do_resize=False)

    @property
    def guidance_scale(self) -> float | list[float]:
        """Of the run under way, read afresh every step, so that a callback may change `_guidance_scale`."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Number of steps of the run under way."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether the run under way skips the steps that are left; a callback may set `_interrupt`."""
        return self._interrupt

    @property
    def label2id(self) -> dict[str, list[int]]:
        """The classes that bear each name, synonyms apart."""
        label2id: dict[str, list[int]] = {}
        for label, names in (self.config.id2label or {}).items():
            for name in {names.strip(), *(part.strip() for part in names.split(","))}:
                label2id.setdefault(name, []).append(label)
        return label2id

    def _sample(
        self,
        class_labels: ClassLabels | None,
        guidance_scale: float | list[float] | torch.Tensor | None,
        num_inference_steps: int | None,
        timestep_respacing: str | None,
        condition_unet: bool,
        eta: float,
        batch_size: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
        output_type: str,
        return_dict: bool,
        callback_on_step_end: Callable | None,
        callback_on_step_end_tensor_inputs: list[str],
        cfg_weight: float | list[float] | torch.Tensor,
        guiding_unet: ADMUNet2DModel | None,
        guidance_fn: GuidanceFunction | None,
        guidance_options: GuidanceOptions | dict | None,
        timesteps: list[int] | None,
        x_0_fn: Callable | None,
        callback_on_step_start: Callable | None,
        low_res: torch.Tensor | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Draws images, on low-resolution ones `(batch, channels, any height, any width)` where the UNet takes them."""
        # 1. Check what was given.
        self._check_components()
        check_no_dropout(unet=self.unet, classifier=self.classifier, guiding_unet=guiding_unet)
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type={output_type!r} is not one of {OUTPUT_TYPES}.")
        functions = {
            "guidance_fn": guidance_fn,
            "x_0_fn": x_0_fn,
            "callback_on_step_start": callback_on_step_start,
            "callback_on_step_end": callback_on_step_end,
        }
        for name, function in functions.items():
            if function is not None and (not callable(function) or isinstance(function, NoisyClassifier)):
                raise ValueError(f"{name} must be a function: got {type(function).__name__}.")
        unknown = set(callback_on_step_end_tensor_inputs) - set(self._callback_tensor_inputs)
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs: {sorted(unknown)} are not among {self._callback_tensor_inputs}."
            )
        null_class = self.unet.null_class
        if not condition_unet and self.unet.config.num_class_embeds is not None and null_class is None:
            raise ValueError(
                "condition_unet=False needs a UNet that has a null class (use_null_class), or no classes."
            )
        unet_takes_labels = condition_unet and self.unet.config.num_class_embeds is not None
        labels = None if class_labels is None else self.class_ids(class_labels)
        batch_size = self._batch_size(batch_size, labels, latents, low_res)
        generators = generator if isinstance(generator, list) else [generator] * batch_size
        if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
            raise ValueError(f"generator must be a torch.Generator, or a list of them: got {generator!r}.")
        if len(generators) != batch_size:
            raise ValueError(f"{len(generators)} generators were given for {batch_size} images.")
        guides = guidance_fn is not None or self.classifier is not None
        if guidance_scale is None:
            guidance_scale = self.config.guidance_scale if guides else 0.0
        scales = numbers_of_images(guidance_scale, batch_size, "guidance_scale")
        if any(scales) and not guides:
            raise ValueError(f"guidance_scale={guidance_scale} needs a classifier, and the pipeline has none.")
        options = GuidanceOptions.parse(guidance_options)
        if options.gradient_at == "mean" and getattr(guidance_fn, "through_unet", False):
            raise ValueError("gradient_at='mean' is not for a function whose gradient goes through the UNet to x_t.")
        if options.entropy_scaling and guidance_fn is not None:
            raise ValueError("entropy_scaling is of what a classifier says: guidance_fn takes its place.")
        weights = numbers_of_images(cfg_weight, batch_size, "cfg_weight")
        labels_come = labels is not None or low_res is None  # an upsampler's are not drawn
        if any(weights) and guiding_unet is None and (null_class is None or not (unet_takes_labels and labels_come)):
            raise ValueError(
                f"cfg_weight={cfg_weight} needs a UNet that has a null class (use_null_class) and is told the class, or a"
                " guiding_unet."
            )
        if guiding_unet is not None:
            check_guiding_unet(guiding_unet, self.unet, unet_takes_labels and labels_come)
            if not any(weights):
                raise ValueError("guiding_unet guides by cfg_weight, which is 0.")
        height = self.unet.config.sample_size if height is None else height
        width = self.unet.config.sample_size if width is None else width
        self._check_size(height, width)

        # 2. Prepare the steps.
        device = self._execution_device
        if timestep_respacing is None and num_inference_steps is None and timesteps is None:
            num_inference_steps = self.config.num_inference_steps
            if takes_respacing(self.scheduler):
                timestep_respacing = self.config.timestep_respacing
        solver = build_solver(self.scheduler, num_inference_steps, timestep_respacing, eta, timesteps)
        if options.gradient_at == "mean" and not isinstance(solver, DDPMSolver):
            raise ValueError(
                f"gradient_at='mean' is of DDPMScheduler's steps, not of {type(self.scheduler).__name__}'s."
            )
        visits = visited_steps(solver.schedule, timesteps)
        timesteps = solver.schedule.timesteps.to(device)  # (steps,), least noisy first
        self._num_timesteps = len(visits)
        # A copy: a callback may change it in place. On the CPU, where reading it every step waits for nothing.
        is_tensor = isinstance(guidance_scale, torch.Tensor)
        self._guidance_scale = guidance_scale.to("cpu", copy=True) if is_tensor else copy.copy(guidance_scale)
        self._interrupt = False

        # 3. Prepare labels and x_T, in this order: a seed's labels and noise come from one stream.
        guided_by_classifier = guidance_fn is None and any(scales)
        num_classes = self._num_classes(unet_takes_labels, guided_by_classifier)
        if labels is None and num_classes is not None and low_res is None:
            labels = self._draw_labels(num_classes, batch_size, generator)
        elif labels is not None and (unet_takes_labels or guidance_fn is None):  # else they are the function's own
            self._check_labels(labels, unet_takes_labels, scales if guided_by_classifier else [0.0] * batch_size)
        label_ids = labels
        if labels is not None:
            labels = torch.tensor(labels, device=device)  # (batch,)
        unet_labels = labels if unet_takes_labels else None
        if null_class is not None and not condition_unet:
            unet_labels = torch.full((batch_size,), null_class, device=device)
        shape = (batch_size, self.unet.config.in_channels, height, width)
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents of shape {tuple(latents.shape)} were given where {shape} is needed.")
        latents = latents.to(device, torch.float32)

        # 4. Sample.
        if guidance_fn is None and self.classifier is not None:
            guidance = ClassifierGuidance(
                self.classifier, options.max_entropy_scale if options.entropy_scaling else None
            )
        else:
            guidance = guidance_fn
        through_unet = getattr(guidance, "through_unet", False)
        factors = options.factors(solver.schedule.x_0_from_epsilon[visits].tolist())
        if (any(scales) or any(weights)) and not any(factors):
            raise ValueError(f"{options} let guidance act at none of the {len(visits)} steps.")
        gradient_steps = options.gradient_steps(factors)
        weight = latents.new_tensor(weights)[:, None, None, None] if any(weights) else None
        through_half = through_unet and self.unet.dtype == torch.float16
        scales_seen, rows, last_gradient = None, [], None
        gradients_finite, x_0_finite = FiniteCheck(batch_size, device), FiniteCheck(batch_size, device)
        with self.progress_bar(total=len(visits)) as progress_bar:
            for step, index in enumerate(visits):
                if self.interrupt:
                    continue
                if callback_on_step_start is not None:
                    outputs = callback_on_step_start(self, step, timesteps[index], {"latents": latents})
                    latents = returned_latents(outputs, latents, "callback_on_step_start")
                scales = numbers_of_images(self.guidance_scale, batch_size, "guidance_scale")
                if scales != scales_seen:
                    scales_seen = scales
                    if any(scales) and guidance is None:
                        raise ValueError(
                            f"guidance_scale={self.guidance_scale} needs a classifier, and the pipeline has none."
                        )
                    if guidance_fn is None and label_ids is not None:
                        self._check_labels(label_ids, unet_takes_labels, scales)
                    elif guidance_fn is None and any(scales):
                        raise ValueError(f"guidance_scale={self.guidance_scale} needs class_labels to guide to.")
                    rows_before, rows = rows, [row for row, scale in enumerate(scales) if scale]
                    guided_rows = torch.tensor(rows, dtype=torch.long, device=device)
                    if not set(rows) <= set(rows_before):
                        last_gradient = None  # of images that were not guided there is none to use again
                    scale = latents.new_tensor(scales)[:, None, None, None]
                guided = bool(rows) and factors[step] != 0
                asks = guided and (step in gradient_steps or last_gradient is None)

                timestep = timesteps[index].expand(batch_size)  # (batch,)
                with differentiable() if asks and through_unet else contextlib.nullcontext():
                    x_t = leaf(latents) if asks and through_unet else latents
                    step_weight = weight * factors[step] if weight is not None and factors[step] else None
                    # Autograd does not save what was made in inference mode; a clone here is made outside it.
                    told = None if unet_labels is None else unet_labels.clone()
                    model_output = self._evaluate_unets(x_t, timestep, told, low_res, step_weight, guiding_unet)
                    x_0, fraction = solver.predict(model_output, index, x_t)  # (batch, channels, height, width)
                    if x_0_fn is not None:
                        x_0 = as_returned(x_0_fn(x_0, timesteps[index]), x_0, "x_0_fn")
                        x_0_finite.see(x_0, step)
                        if asks and through_unet and not x_0.requires_grad:
                            raise ValueError(
                                "x_0_fn returned what does not depend on x_0, and guidance_fn guides through it (through_unet)."
                            )

                gradient = None
                if asks:
                    if options.gradient_at == "mean":
                        x_t, timestep = solver.mean(x_0, index, x_t), timesteps[max(index - 1, 0)].expand(batch_size)
                    # The classifier is asked of those images alone that are guided; another function may need all.
                    if guidance_fn is not None or len(rows) == batch_size:
                        last_gradient = guidance_gradient(guidance, x_t, timestep, x_0, labels, through_half)
                    else:
                        last_gradient = torch.zeros_like(latents)
                        last_gradient[guided_rows] = guidance_gradient(
                            guidance, *(one[guided_rows] for one in (x_t, timestep, x_0, labels))
                        )
                    if options.normalize:
                        last_gradient = normalized(last_gradient)
                    x_0, fraction = x_0.detach(), None if fraction is None else fraction.detach()
                if guided and (asks or options.skipped == "reuse"):
                    gradient = last_gradient * scale * (factors[step] * gradient_steps.get(step, 1))
                    if options.max_size is not None:
                        gradient = shortened(gradient, options.max_size)
                    gradients_finite.see(gradient, step)

                latents = solver.step(x_0, fraction, index, latents, gradient, generator)

                if callback_on_step_end is not None:
                    callback_kwargs = {}
                    for name in callback_on_step_end_tensor_inputs:
                        callback_kwargs[name] = locals()[name]
                    outputs = callback_on_step_end(self, step, timesteps[index], callback_kwargs)
                    latents = returned_latents(outputs, latents, "callback_on_step_end")
                if step + 1 < len(visits) and visits[step + 1] >= index:
                    noise = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
                    latents = renoise(solver.schedule, latents, index - 1, visits[step + 1], noise)
                progress_bar.update()

        # 5. Make images of x_0.
        x_0_finite.check(timesteps[visits], "What x_0_fn returned for")
        gradients_finite.check(timesteps[visits], "The gradient that guides")
        images = self.image_processor.postprocess(latents, output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _evaluate_unets(
        self,
        x_t: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None,
        low_res: torch.Tensor | None,
        cfg_weight: torch.Tensor | None,
        guiding_unet: ADMUNet2DModel | None,
    ) -> torch.Tensor:
        """
        What the UNet says at x_t, float32; with `cfg_weight` extrapolated away from what it says without a class, or from what
        `guiding_unet` says.
        """
        model_input = x_t.to(self.unet.dtype)
        if cfg_weight is None:
            return self.unet(model_input, timestep, class_labels, low_res).sample.float()
        if guiding_unet is not None:
            output = self.unet(model_input, timestep, class_labels, low_res).sample.float()
            guiding_labels = class_labels if guiding_unet.config.num_class_embeds is not None else None
            weaker = guiding_unet(x_t.to(guiding_unet.dtype), timestep, guiding_labels, low_res).sample.float()
        else:
            # One evaluation of twice the batch.
            labels = torch.cat([class_labels, torch.full_like(class_labels, self.unet.null_class)])
            both = self.unet(
                torch.cat([model_input, model_input]),
                torch.cat([timestep, timestep]),
                labels,
                None if low_res is None else torch.cat([low_res, low_res]),
            ).sample.float()
            output, weaker = both.chunk(2)
        return combine_predictions(output, weaker, cfg_weight, x_t.shape[1])

    def predict(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | int,
        class_labels: ClassLabels | None = None,
        low_res: torch.Tensor | None = None,
    ) -> Prediction:
        """
        What the UNet says of noised images, with gradients with respect to them: for losses of one's own, such as those of
        inverse problems. Nothing is sampled, and weights need no gradient.

        Args:
            sample: x_t, `(batch, channels, height, width)`.
            timestep: Training timestep of each image, `(batch,)`, or one for all.
            class_labels: Class of each image, by number or name; `None` for a UNet without classes, or to run one that has
                a null class without a class.
            low_res: Low-resolution images in [-1, 1], for an upsampler.

        Raises:
            ValueError: If there is no such timestep or class, or they are not as many as the images.
        """
        schedule = NoiseSchedule.from_config(self.scheduler.config)
        sample = sample.to(self._execution_device)
        low_res = None if low_res is None else low_res.to(sample.device)
        timestep = torch.as_tensor(timestep, device=sample.device)
        labels = None if class_labels is None else self.class_ids(class_labels)
        if timestep.numel() not in (1, len(sample)):
            raise ValueError(f"timestep: {timestep.numel()} were given for {len(sample)} images.")
        if labels is not None and len(labels) != len(sample):
            raise ValueError(f"class_labels: {len(labels)} were given for {len(sample)} images.")
        timestep = timestep.flatten().expand(len(sample))  # (batch,)
        if timestep.is_floating_point() or not ((0 <= timestep) & (timestep < len(schedule))).all():
            raise ValueError(f"timestep={timestep.tolist()} is not of the integers in [0, {len(schedule) - 1}].")
        if labels is not None:
            self._check_labels(labels, True, [0.0] * len(labels))
            labels = torch.tensor(labels, device=sample.device)
        model_output = self.unet(sample.to(self.unet.dtype), timestep, labels, low_res).sample
        config = self.scheduler.config
        variance_type = config.get("variance_type") or "fixed_large"
        return read_prediction(schedule, sample, timestep, model_output, config.prediction_type, variance_type)

    @torch.no_grad()
    def invert(
        self,
        images: torch.Tensor,
        class_labels: ClassLabels | None = None,
        num_inference_steps: int = 250,
        low_res: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The noise from which DDIM draws given images, by its ODE in reverse (Dhariwal & Nichol 2021, appendix F): give it as
        `latents` with a `DDIMScheduler`, the same labels and steps, and no guidance.

        Args:
            images: x_0 in [-1, 1], `(batch, channels, height, width)`.
            class_labels: Class of each image, by number or name, or `None`, as of `predict`.
            num_inference_steps: Of DDIM; the more, the nearer is what is drawn from the noise.
            low_res: Low-resolution images in [-1, 1], for an upsampler.

        Returns:
            x_T, of the shape of `images`.

        Raises:
            ValueError: If the number of steps is out of its range, or there is no such class.
        """
        scheduler = DDIMScheduler.from_config(self.scheduler.config)
        schedule = build_solver(scheduler, num_inference_steps, None, 0.0).schedule
        x = images.to(self._execution_device, torch.float32)
        for index in range(len(schedule)):
            # The noise at one step stands for that on the way to the next; that of the first for clean images.
            before = max(index - 1, 0)
            epsilon = self.predict(x, schedule.timesteps[before].item(), class_labels, low_res).epsilon
            x_0 = x if index == 0 else x_0_from_epsilon(schedule, x, before, epsilon)
            x = add_noise(schedule, x_0, index, epsilon)
        return x

    def class_ids(self, class_labels: ClassLabels) -> list[int]:
        """
        Class numbers of labels that are given by number or name.

        Args:
            class_labels: One, a list (nested ones are flattened), or an integer tensor or array.

        Raises:
            ValueError: If a name is unknown or means several classes, or a label is neither a name nor an integer.
        """
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, (list, tuple)):
            return [label for entry in class_labels for label in self.class_ids(entry)]
        if isinstance(class_labels, str):
            return [self._class_id(class_labels)]
        if isinstance(class_labels, (int, np.integer)) and not isinstance(class_labels, bool):
            return [int(class_labels)]
        raise ValueError(f"class_labels must be integers or names: got {class_labels!r}.")

    def _class_id(self, name: str) -> int:
        label2id = self.label2id
        if not label2id:
            raise ValueError(f"class_labels={name!r} is a name, but the pipeline knows none (id2label).")
        if name not in label2id:
            lowered = {known.lower(): known for known in label2id}
            near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3)]
            raise ValueError(f"No class is called {name!r}" + (f"; near it are {near}." if near else "."))
        if len(label2id[name]) > 1:
            raise ValueError(f"Several classes are called {name!r}: give one of the numbers {label2id[name]}.")
        return label2id[name][0]

    def _check_components(self) -> None:
        check_scheduler(self.scheduler)
        unet, classifier = self.unet.config, self.classifier.config if self.classifier is not None else None
        if isinstance(self.scheduler, DDPMScheduler):
            variance_type = self.scheduler.config.variance_type
            if (variance_type == "learned_range") != self.unet.learns_variance:
                raise ValueError(
                    f"The scheduler's variance_type={variance_type!r} does not fit a UNet of in_channels="
                    f"{unet.in_channels} and out_channels={unet.out_channels}: 'learned_range' belongs to twice as many"
                    " output channels, and no other variance_type does."
                )
        for name in ("sample_size", "in_channels"):
            if classifier is not None and unet[name] != classifier[name]:
                raise ValueError(f"UNet and classifier differ in {name}: {unet[name]} and {classifier[name]}.")

    def _check_size(self, height: int, width: int) -> None:
        factor = 2 ** (len(self.unet.config.channel_mult) - 1)
        if not all(isinstance(side, Integral) and side > 0 and side % factor == 0 for side in (height, width)):
            raise ValueError(f"height={height!r} and width={width!r} must be positive multiples of {factor}.")

    def _batch_size(
        self, batch_size: int, labels: list[int] | None, latents: torch.Tensor | None, low_res: torch.Tensor | None
    ) -> int:
        counts = {}
        if low_res is not None:
            counts["image"] = len(low_res)
        if labels is not None:
            counts["class_labels"] = len(labels)
        if latents is not None:
            if not isinstance(latents, torch.Tensor) or latents.ndim != 4:
                raise ValueError("latents must be a tensor (batch, channels, height, width).")
            counts["latents"] = latents.shape[0]
        if not isinstance(batch_size, Integral):
            raise ValueError(f"batch_size={batch_size!r} is not an integer.")
        if batch_size != 1 or not counts:
            counts["batch_size"] = batch_size
        if len(set(counts.values())) > 1 or min(counts.values()) < 1:
            given = ", ".join(f"{name} {count}" for name, count in counts.items())
            raise ValueError(f"The number of images must be one and the same, at least 1; given were: {given}.")
        return next(iter(counts.values()))

    def _num_classes(self, unet_takes_labels: bool, guided: bool) -> int | None:
        """Number of labels that every model that receives one knows; of all models if none receives any."""
        unet_classes = self.unet.config.num_class_embeds
        classifier_classes = self.classifier.config.num_classes if self.classifier is not None else None
        receivers = [unet_classes] if unet_takes_labels else []
        receivers += [classifier_classes] if guided else []
        known = receivers or [count for count in (unet_classes, classifier_classes) if count is not None]
        return min(known) if known else None

    def _check_labels(self, labels: list[int], unet_takes_labels: bool, scales: list[float]) -> None:
        """Raises a ValueError unless every model that receives a label knows it."""
        if self._num_classes(unet_takes_labels, any(scales)) is None:
            raise ValueError("class_labels were given, but neither UNet nor classifier knows classes.")
        received = [(labels, self._num_classes(True, False))] if unet_takes_labels else []
        guided = [label for label, scale in zip(labels, scales) if scale]
        received += [(guided, self._num_classes(False, True))] if guided else []
        for given, num_classes in received or [(labels, self._num_classes(False, False))]:
            wrong = [label for label in given if not 0 <= label < num_classes]
            if wrong:
                raise ValueError(f"class_labels {wrong} are not in [0, {num_classes - 1}].")

    def _draw_labels(
        self, num_classes: int, batch_size: int, generator: torch.Generator | list[torch.Generator] | None
    ) -> list[int]:
        if isinstance(generator, list):
            return [label for one in generator for label in self._draw_labels(num_classes, 1, one)]
        device = generator.device if generator is not None else "cpu"
        return torch.randint(num_classes, (batch_size,), generator=generator, device=device).tolist()


def numbers_of_images(given: float | list[float] | torch.Tensor, batch_size: int, name: str) -> list[float]:
    """
    One number for each image of what may be one for all.

    Raises:
        ValueError: If it is not a number, or not finite, or there are too many or too few.
    """
    if isinstance(given, torch.Tensor):
        given = given.cpu()  # MPS has no float64
    try:
        tensor = torch.as_tensor(given, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{name}={given!r} is neither a number nor one an image.") from error
    values = [tensor.item()] * batch_size if tensor.ndim == 0 else tensor.flatten().tolist()
    if len(values) != batch_size:
        raise ValueError(f"{len(values)} numbers were given as {name} for {batch_size} images.")
    if not all(abs(value) <= torch.finfo(torch.float32).max for value in values):
        raise ValueError(f"{name}={given} is not finite in float32.")
    return values


class FiniteCheck:
    """
    The step at which something of each image was first not finite; read once, at the end, as reading synchronises.

    Args:
        batch_size: Number of images.
        device: Of the tensors.
    """

    def __init__(self, batch_size: int, device: torch.device):
        self.failed_at = torch.full((batch_size,), -1, device=device)  # (batch,)

    def see(self, tensor: torch.Tensor, step: int) -> None:
        """Notes the images of which a tensor, `(batch, channels, height, width)`, is not finite for the first time."""
        failed = ~tensor.flatten(1).isfinite().all(dim=1) & (self.failed_at < 0)
        self.failed_at = self.failed_at.masked_fill(failed, step)

    def check(self, timesteps: torch.Tensor, what: str) -> None:
        """Raises a ValueError that names image, step and timestep, of those of all steps, unless all was finite."""
        for image, step in enumerate(self.failed_at.tolist()):
            if step >= 0:
                raise ValueError(
                    f"{what} image {image} is not finite at step {step} of {len(timesteps)}, timestep {timesteps[step]}."
                )


def as_returned(returned: torch.Tensor, like: torch.Tensor, name: str) -> torch.Tensor:
    """
    What a user's function made of a tensor, in its dtype.

    Raises:
        ValueError: If it is not a tensor of its shape.
    """
    if not isinstance(returned, torch.Tensor) or returned.shape != like.shape:
        got = tuple(returned.shape) if isinstance(returned, torch.Tensor) else type(returned).__name__
        raise ValueError(f"{name} returned {got}, where a tensor {tuple(like.shape)} is needed.")
    return returned.to(like.dtype)


def returned_latents(outputs: dict, latents: torch.Tensor, name: str) -> torch.Tensor:
    """
    What a callback returned, or else the latents as they are.

    Raises:
        ValueError: If it returned no dict, or latents that are no tensor of their shape.
    """
    if not isinstance(outputs, dict):
        raise ValueError(f"{name} returned {type(outputs).__name__}, where a dict, of latents or empty, is needed.")
    return as_returned(outputs.pop("latents", latents), latents, f"{name}, as latents,")


def check_no_dropout(**models: torch.nn.Module | None) -> None:
    """Raises a ValueError if a model would drop features at random."""
    for name, model in models.items():
        if getattr(model, "training", False) and any(
            isinstance(module, torch.nn.Dropout) and module.p for module in model.modules()
        ):
            raise ValueError(
                f"The {name} is in training mode, in which its dropout acts: call its eval() before sampling."
            )


def check_guiding_unet(guiding_unet: ADMUNet2DModel, unet: ADMUNet2DModel, told_class: bool) -> None:
    """Raises a ValueError unless one UNet's predictions, with or without a class, can be weighed against the other's."""
    names = [type(unwrap_module(one)).__name__ for one in (guiding_unet, unet)]  # of a compiled one, the model's
    if names[0] != names[1]:  # by name: saved code has classes of its own
        raise ValueError(f"guiding_unet must be an {names[1]}: got {names[0]}.")
    if not told_class and guiding_unet.config.num_class_embeds is not None and guiding_unet.null_class is None:
        raise ValueError("guiding_unet has no null class (use_null_class), and the UNet is told no class.")
    for name in ("sample_size", "in_channels", "num_class_embeds", "low_res_conditioning"):
        ours, theirs = unet.config[name], guiding_unet.config[name]
        if ours != theirs and not (name == "num_class_embeds" and theirs is None):
            raise ValueError(f"guiding_unet differs from the UNet in {name}: {theirs} and {ours}.")
