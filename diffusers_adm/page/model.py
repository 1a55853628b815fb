"""The model that all users of a page share."""

from collections import Counter

from diffusers_adm import ClassifierGuidedPipeline
from diffusers_adm.evaluation.options import SCHEDULERS
from diffusers_adm.evaluation.schedulers import set_scheduler
from diffusers_adm.pipelines.class_labels import known_classes, known_names
from diffusers_adm.solvers import SIGMA_SCHEDULERS


class PageModel:
    """
    Pipeline that all users of a page share. Its networks are only read, so that runs of several users do not affect each other.

    Args:
        pipeline: Pipeline to sample with.
        loading: Arguments of `load_pipeline` with which the pipeline was loaded.

    Attributes:
        classes: Names of the classes, without duplicates. The list is empty for a model without classes.
        schedulers: Names of the schedulers that the model supports. The first one is the default.
        consistency_steps: Default and largest number of steps of a consistency model. `None` for other models.
        is_told_timesteps: Whether the UNet is told timesteps. Otherwise it is told noise levels, and cannot invert.
        is_told_classes: Whether the UNet can be told the class.
        can_forget_classes: Whether the UNet can be run without a class.
        is_guided: Whether there is a classifier.
        size: Height and width of the images in pixels.
        channels: Number of channels of the images.
        device: Device of the networks.
    """

    def __init__(self, pipeline: ClassifierGuidedPipeline, **loading: str | None):
        self._pipeline = pipeline
        self.loading = loading
        unet = pipeline.unet.config
        self.classes = class_names(pipeline)
        self.is_told_timesteps = unet.get("preconditioning") is None
        names = SCHEDULERS if self.is_told_timesteps else map(scheduler_name, SIGMA_SCHEDULERS)
        first = "DDIM" if self.is_told_timesteps else scheduler_name(type(pipeline.scheduler))
        self.consistency_steps: tuple[int, int] | None = None
        if unet.get("preconditioning") == "consistency":
            names = [first]  # other schedulers have other noise levels than those that the model learned
            self.consistency_steps = pipeline.config.num_inference_steps, pipeline.scheduler.config.num_train_timesteps
        self.schedulers = sorted(names, key=lambda name: (name != first, name))
        self.is_told_classes = unet.num_class_embeds is not None
        self.can_forget_classes = not self.is_told_classes or pipeline.unet.null_class is not None
        self.is_guided = pipeline.classifier is not None
        self.size, self.channels = unet.sample_size, unet.in_channels
        self.device = pipeline.device

    def pipeline(self, scheduler: str | None = None) -> ClassifierGuidedPipeline:
        """
        Returns a pipeline for one run. It shares the networks, but nothing that a run changes.

        Args:
            scheduler: Name of the scheduler. `None` means that of the model.
        """
        shared = self._pipeline
        own = ClassifierGuidedPipeline(**shared.components, id2label=shared.config.id2label)
        own.set_progress_bar_config(disable=True)
        set_scheduler(own, scheduler)
        return own


def scheduler_name(scheduler: type) -> str:
    """Returns the name of a scheduler's class in commands and in the page."""
    return scheduler.__name__.removesuffix("Scheduler")


def class_names(pipeline: ClassifierGuidedPipeline) -> list[str]:
    """Returns a name per class. A name that several classes share, such as crane of ImageNet, is followed by the number."""
    known = known_names(pipeline) or {}
    names = [known.get(number, str(number)).split(",")[0] for number in range(known_classes(pipeline) or 0)]
    count = Counter(names)
    return [name if count[name] == 1 else f"{name} ({number})" for number, name in enumerate(names)]
