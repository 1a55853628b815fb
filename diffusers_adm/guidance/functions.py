"""Guidance functions: a noise-aware classifier, and networks that were trained on clean images.

Classifiers of clean images and CLIP are applied to the predicted x_0. Pass a guidance function as `guidance_fn` to a pipeline. The
docstring of `diffusers_adm.guidance` describes its arguments.
"""

import copy
import math
from collections.abc import Callable
from numbers import Real

import torch
import torch.nn.functional as F
from torch import nn

from diffusers_adm.checks import check_images, check_types, one_per_image
from diffusers_adm.diffusion import NoiseSchedule, timestep_at
from diffusers_adm.guidance.gradient import guidance_gradient, moves_weights, weights_in_place


CLASSIFIER_NEEDS_LABELS = "Guidance by a classifier requires `class_labels`, but got None."


class ClassifierGuidance:
    """
    log p(y | x_t) of a noise-aware classifier.

    Args:
        classifier: Module that is called as `classifier(x_t, timestep).logits`, `(batch, num_classes)`.
        max_entropy_scale: Largest factor of the entropy scaling, or `None` for no entropy scaling. The factor is the largest
            possible entropy, divided by the entropy of p(y | x_t). It multiplies each image's gradient, so that guidance still acts
            when the classifier has become certain (Li et al. 2022, arXiv 2206.11474).
    """

    def __init__(self, classifier: torch.nn.Module, max_entropy_scale: float | None = None):
        self.classifier = classifier
        self.frozen_weights = weights_in_place(classifier)
        self.max_entropy_scale = max_entropy_scale

    @property
    def network(self) -> torch.nn.Module:
        """The classifier."""
        return self.classifier

    @property
    def dtype(self) -> torch.dtype | None:
        """Data type of the classifier's weights. `None` if the classifier has no `dtype`."""
        return getattr(self.classifier, "dtype", None)

    @property
    def num_classes(self) -> int | None:
        """Number of classes. `None` if the classifier's config does not have it."""
        return getattr(getattr(self.classifier, "config", None), "num_classes", None)

    def log_probabilities(self, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """
        Returns the log-probability of each class, `(batch, num_classes)`, float32.

        Args:
            x_t: Noised images, `(batch, channels, height, width)`.
            timestep: Timestep of each image, `(batch,)`.
        """
        return self.classifier(x_t.to(self.dtype or x_t.dtype), timestep).logits.float().log_softmax(dim=-1)

    def __call__(
        self, x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        """Returns the log-probability of each image's class, `(batch,)`."""
        if class_labels is None:
            raise ValueError(CLASSIFIER_NEEDS_LABELS)
        x_t = x_t.view_as(x_t)  # a new tensor object, because the hook below must not stay on the caller's tensor
        log_probabilities = self.log_probabilities(x_t, timestep)  # (batch, num_classes)
        if self.max_entropy_scale is not None and x_t.requires_grad:
            entropy = torch.special.entr(log_probabilities.detach().exp()).sum(dim=1)  # (batch,)
            largest = math.log(log_probabilities.shape[1])
            factor = (largest / entropy).nan_to_num(1.0).clamp(max=self.max_entropy_scale)[:, None, None, None]
            # The gradient is scaled, not the log-probability, because a float16 classifier could not hold such large gradients.
            x_t.register_hook(lambda gradient: factor * gradient)
        return log_probabilities.gather(1, class_labels[:, None])[:, 0]


class RunClassifierGuidance(ClassifierGuidance):
    """
    Guidance of one run by the pipeline's classifier. It reads properties of the classifier only once, because each read walks over
    all modules.

    Args:
        classifier: Classifier of the pipeline.
        max_entropy_scale: Largest factor of the entropy scaling, see [`ClassifierGuidance`].
        schedule: Noise schedule that the classifier was trained with, for a run whose timesteps are noise levels. The classifier is
            given the timestep of its own schedule that has the same noise level. `None` means that the timesteps of the run are
            timesteps of the classifier.

    Attributes:
        dtype: Data type of the classifier's weights. `None` if the classifier has no `dtype`.
        weights_may_move: Whether the classifier's weights may be replaced between the forward and the backward pass.
        independent_rows: Whether the value of an image does not depend on the other images, so that some can be left out.
        last_log_probabilities: Log-probability of each class in the last evaluation, `(batch, num_classes)`.
    """

    dtype: torch.dtype | None = None
    independent_rows = True
    last_log_probabilities: torch.Tensor | None = None

    def __init__(
        self,
        classifier: torch.nn.Module,
        max_entropy_scale: float | None = None,
        schedule: NoiseSchedule | None = None,
    ):
        super().__init__(classifier, max_entropy_scale)
        self.schedule = schedule
        self.dtype = getattr(classifier, "dtype", None)
        self.weights_may_move = moves_weights(classifier)

    def log_probabilities(self, x_t: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        """Returns the log-probability of each class, `(batch, num_classes)`. The arguments are those of [`ClassifierGuidance`]."""
        if self.schedule is not None:
            timestep = timestep_at(self.schedule, timestep)
        log_probabilities = super().log_probabilities(x_t, timestep)
        self.last_log_probabilities = log_probabilities.detach()
        return log_probabilities


def classifier_gradient(
    classifier: torch.nn.Module, x_t: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor
) -> torch.Tensor:
    """
    Returns the gradient of log p(y | x_t) with respect to x_t, of the shape and dtype of `x_t`. The gradient is taken at x_t, as in
    the original code.

    Args:
        classifier: Module that is called as `classifier(x_t, timestep).logits`, `(batch, num_classes)`.
        x_t: Noised images, `(batch, channels, height, width)`.
        timestep: Training timestep of each image, `(batch,)`.
        class_labels: Class of each image, `(batch,)`.

    Raises:
        ValueError: If an argument has a wrong type or shape.
    """
    if not callable(classifier):
        raise ValueError(f"`classifier` must be a module, but got {type(classifier).__name__}.")
    check_images("x_t", x_t)
    timestep = one_per_image("timestep", timestep, x_t).expand(len(x_t))
    class_labels = one_per_image("class_labels", class_labels, x_t).expand(len(x_t))
    if class_labels.is_floating_point():
        raise ValueError(f"`class_labels` must be integers, but got {class_labels.dtype}.")
    x_t, class_labels = x_t.detach(), class_labels.long()
    return guidance_gradient(ClassifierGuidance(classifier), x_t, timestep, x_t, class_labels)


class CleanClassifierGuidance:
    """
    log p(y | x_0) of a classifier of clean images, with the calibration of Ma et al. 2023 (arXiv 2310.11311).

    Args:
        classifier: Classifier from `transformers`, or any module in eval mode or function from pixels to logits `(batch, classes)`.
            Its classes must have the same numbers as the pipeline's labels.
        image_processor: Image processor from `transformers`, which resizes and normalises. Without one, the classifier is given
            pixels in [0, 1].
        through_unet: Whether the gradient goes through the UNet to x_t, at twice the cost. Otherwise the gradient with respect to
            the predicted x_0 guides.
        joint_temperature: Factor tau_1 of the logit of the class.
        conditional_temperature: Factor tau_2 of all logits in the normaliser. The authors use 0.5.
        softplus_beta: Beta of the softplus functions that replace the ReLUs in a copy of the classifier, because a smooth network
            has smoother gradients. The authors use 3. `None` keeps the ReLUs.

    Raises:
        ValueError: If `softplus_beta` is not above 0 or is given for a classifier without `torch.nn.ReLU` modules, or an argument
            has a wrong type.
    """

    def __init__(
        self,
        classifier: nn.Module | Callable[[torch.Tensor], torch.Tensor],
        image_processor: Callable | None = None,
        through_unet: bool = False,
        joint_temperature: float = 1.0,
        conditional_temperature: float = 1.0,
        softplus_beta: float | None = None,
    ):
        for name, function in (("classifier", classifier), ("image_processor", image_processor)):
            if not callable(function) and not (name == "image_processor" and function is None):
                raise ValueError(f"`{name}` must be a module or a function, but got {type(function).__name__}.")
        temperatures = {"joint_temperature": joint_temperature, "conditional_temperature": conditional_temperature}
        check_types(type(self).__init__, {"through_unet": through_unet, **temperatures})
        if softplus_beta is not None:
            classifier = smoothed(classifier, softplus_beta)
        self.classifier = classifier
        self.frozen_weights = weights_in_place(classifier)
        self.image_processor = image_processor
        self.through_unet = through_unet
        self.joint_temperature = joint_temperature
        self.conditional_temperature = conditional_temperature

    @classmethod
    def from_pretrained(cls, name: str, device: torch.device | str = "cpu", **kwargs) -> "CleanClassifierGuidance":
        """
        Loads a classifier and its image processor with `transformers`.

        Args:
            name: Id on the Hub or folder of a model that `AutoModelForImageClassification` can load.
            device: Device of the classifier.
            kwargs: Other arguments of the constructor.
        """
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        classifier = AutoModelForImageClassification.from_pretrained(name).to(device)
        return cls(classifier, AutoImageProcessor.from_pretrained(name), **kwargs)

    @property
    def network(self) -> nn.Module | Callable[[torch.Tensor], torch.Tensor]:
        """The classifier."""
        return self.classifier

    @property
    def dtype(self) -> torch.dtype | None:
        """Data type of the classifier's weights. `None` if it has no weights."""
        return dtype_of(self.classifier)

    @property
    def num_classes(self) -> int | None:
        """Number of the classifier's classes. `None` if its config does not say it."""
        return getattr(getattr(self.classifier, "config", None), "num_labels", None)

    def __call__(
        self, x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor, class_labels: torch.Tensor
    ) -> torch.Tensor:
        """Returns the calibrated log-probability of each image's class, `(batch,)`."""
        if class_labels is None:
            raise ValueError(CLASSIFIER_NEEDS_LABELS)
        pixels = as_pixels(x_0, self.image_processor)
        output = self.classifier(pixels.to(self.dtype or pixels.dtype))
        logits = getattr(output, "logits", output).float()  # (batch, classes)
        # Reading a tensor on a GPU would wait for it.
        if class_labels.device.type == "cpu" and not ((0 <= class_labels) & (class_labels < logits.shape[1])).all():
            raise ValueError(
                f"`class_labels` must be in [0, {logits.shape[1] - 1}], the classifier's classes, but got {class_labels.tolist()}."
            )
        joint = self.joint_temperature * logits.gather(1, class_labels[:, None])[:, 0]  # (batch,)
        return joint - (self.conditional_temperature * logits).logsumexp(dim=1)


class CLIPGuidance:
    """
    Guidance towards a text prompt. The guidance function is minus the spherical distance between CLIP's features of the text and
    of random cutouts of the predicted x_0, as in Crowson's CLIP-guided diffusion. The spherical distance is half the squared angle.
    Guidance scales of about 1000 are usual, with `guidance_options={"max_size": 0.2}`.

    Args:
        model: CLIP model in eval mode, a `transformers.CLIPModel`.
        processor: Processor of the model, a `transformers.CLIPProcessor`.
        prompt: Text for all images, or a list with one text per image.
        num_cutouts: Number of cutouts per image and step.
        min_cutout: Smallest side of a cutout, as a fraction of the image's shorter side.
        through_unet: Whether the gradient goes through the UNet to x_t.
        generator: Generator of the random cutouts, on the CPU.

    Raises:
        ValueError: If `num_cutouts` is below 1, or `min_cutout` is not in (0, 1].
    """

    def __init__(
        self,
        model: nn.Module,
        processor: Callable,
        prompt: str | list[str],
        num_cutouts: int = 16,
        min_cutout: float = 0.5,
        through_unet: bool = True,
        generator: torch.Generator | None = None,
    ):
        if num_cutouts < 1 or not 0 < min_cutout <= 1:
            raise ValueError(
                f"`num_cutouts` must be at least 1 and `min_cutout` must be in (0, 1], but got {num_cutouts} and {min_cutout}."
            )
        self.model = model
        self.frozen_weights = weights_in_place(model)
        self.image_processor = processor.image_processor
        self.num_cutouts = num_cutouts
        self.min_cutout = min_cutout
        self.through_unet = through_unet
        self.generator = generator
        words = processor(text=[prompt] if isinstance(prompt, str) else prompt, return_tensors="pt", padding=True)
        with torch.no_grad():
            features = model.get_text_features(**words.to(model.device)).pooler_output
        self.text = F.normalize(features.float(), dim=-1)  # (1 or batch, features)

    @property
    def network(self) -> nn.Module:
        """The CLIP model."""
        return self.model

    @property
    def dtype(self) -> torch.dtype | None:
        """Data type of CLIP's weights."""
        return dtype_of(self.model)

    def __call__(
        self, x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor, class_labels: torch.Tensor | None
    ) -> torch.Tensor:
        """Returns minus the mean distance of each image's cutouts from its text, `(batch,)`."""
        if len(self.text) not in (1, len(x_0)):
            raise ValueError(
                f"`prompt` must be one text, or one text per image ({len(x_0)}), but got {len(self.text)} texts."
            )
        pixels = torch.cat([as_pixels(self._cutout(x_0), self.image_processor) for _ in range(self.num_cutouts)])
        features = self.model.get_image_features(pixels.to(self.dtype)).pooler_output
        seen = F.normalize(features.float(), dim=-1).unflatten(0, (self.num_cutouts, -1))  # (cutouts, batch, features)
        return -spherical_distance(seen, self.text).mean(dim=0)

    def _cutout(self, x_0: torch.Tensor) -> torch.Tensor:
        shorter = min(x_0.shape[2:])
        share = self.min_cutout + (1 - self.min_cutout) * torch.rand((), generator=self.generator).item()
        side = max(1, round(share * shorter))
        top, left = (torch.randint(length - side + 1, (), generator=self.generator).item() for length in x_0.shape[2:])
        return x_0[:, :, top : top + side, left : left + side]


def as_pixels(x_0: torch.Tensor, image_processor: Callable | None) -> torch.Tensor:
    """
    Converts images to the input of a network from `transformers`. Gradients flow through the conversion.

    Args:
        x_0: Images in [-1, 1], `(batch, 1 or 3, height, width)`.
        image_processor: Image processor from `transformers`. Without one, only the range is changed, to [0, 1].
    """
    pixels = (x_0 + 1) / 2
    if image_processor is None:
        return pixels
    pixels = pixels.expand(-1, 3, -1, -1) if pixels.shape[1] == 1 else pixels
    return image_processor(images=pixels, do_rescale=False, return_tensors="pt")["pixel_values"]


def spherical_distance(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Returns half the squared angle between unit vectors. The last dimension is that of the vectors."""
    return 2 * ((first - second).norm(dim=-1) / 2).arcsin().square()


def dtype_of(network: nn.Module | Callable) -> torch.dtype | None:
    """Returns the data type of a network's weights. `None` if it has no weights."""
    weights = network.parameters() if isinstance(network, nn.Module) else ()
    return next((weight.dtype for weight in weights if weight.is_floating_point()), None)


def smoothed(classifier: nn.Module, beta: float) -> nn.Module:
    """Returns a copy of a classifier in which softplus functions replace the ReLUs."""
    if not (isinstance(beta, Real) and beta > 0):
        raise ValueError(f"`softplus_beta` must be a number above 0, but got {beta!r}.")
    if not (isinstance(classifier, nn.Module) and any(isinstance(module, nn.ReLU) for module in classifier.modules())):
        raise ValueError(
            "`softplus_beta` requires a classifier with torch.nn.ReLU modules, but this classifier has none. Pass None instead."
        )
    classifier = copy.deepcopy(classifier)
    for parent in list(classifier.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.ReLU):
                setattr(parent, name, nn.Softplus(beta=beta))
    return classifier
