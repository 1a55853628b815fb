"""Class labels: names of classes, checks, and random labels."""

import difflib

import numpy as np
import torch
from diffusers import DiffusionPipeline

from diffusers_adm.models.class_names import composed, synonyms


MOST_NAMES = 20  # that a message lists
ClassLabels = int | str | list | torch.Tensor | np.ndarray


class ClassNames:
    """
    Names of the classes of a pipeline.

    Args:
        id2label: Name of each class by its number. Commas separate synonyms.

    Attributes:
        label2id: Numbers of the classes that have a name. Each synonym is an entry.
    """

    def __init__(self, id2label: dict[int, str] | None):
        self.label2id: dict[str, list[int]] = {}
        for label, names in (id2label or {}).items():
            for name in synonyms(names):
                self.label2id.setdefault(name, []).append(label)

    def class_ids(self, class_labels: ClassLabels) -> list[int]:
        """
        Converts labels that are numbers or names to numbers.

        Args:
            class_labels: One label, a list of labels (nested lists are flattened), or an integer tensor or array.

        Raises:
            ValueError: If a name is unknown or means several classes, or a label is neither a name nor an integer.
        """
        if isinstance(class_labels, (torch.Tensor, np.ndarray)) and not getattr(class_labels, "is_meta", False):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, (list, tuple)):
            return [label for entry in class_labels for label in self.class_ids(entry)]
        if isinstance(class_labels, str):
            return [self._class_id(class_labels)]
        if isinstance(class_labels, (int, np.integer)) and not isinstance(class_labels, bool):
            return [int(class_labels)]
        raise ValueError(f"`class_labels` must be integers or names, but got {class_labels!r}.")

    def _class_id(self, name: str) -> int:
        name = composed(name)
        if not self.label2id:
            raise ValueError(
                f"`class_labels` must be integers, because neither pipeline nor classifier has names (id2label), but got {name!r}."
            )
        if name not in self.label2id:
            lowered = {known.lower(): known for known in self.label2id}
            near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3)]
            known = f"The names are {', '.join(self.label2id)}."
            if len(self.label2id) > MOST_NAMES:
                known = f"Similar names are {near}. " * bool(near) + "`pipe.label2id` has all names."
            raise ValueError(f"No class is called {name!r}. {known}")
        if len(self.label2id[name]) > 1:
            raise ValueError(f"Several classes are called {name!r}. Pass one of the numbers {self.label2id[name]}.")
        return self.label2id[name][0]


def known_names(pipeline: DiffusionPipeline) -> dict[int, str] | None:
    """Returns the names of the classes of a pipeline. If it has none, returns those of its classifier."""
    if pipeline.config.id2label is not None or pipeline.classifier is None:
        return pipeline.config.id2label
    return pipeline.classifier.config.get("id2label")


def known_classes(pipeline: DiffusionPipeline) -> int | None:
    """Returns the number of classes that all networks with classes have, or `None` if no network has classes."""
    unet_classes = pipeline.unet.config.num_class_embeds
    classifier_classes = None if pipeline.classifier is None else pipeline.classifier.config.num_classes
    return min((count for count in (unet_classes, classifier_classes) if count is not None), default=None)


def check_labels(
    pipeline: DiffusionPipeline, labels: list[int], unet_takes_labels: bool, scales: list[float] | None = None
) -> None:
    """
    Checks that labels are valid for the networks that are given them.

    Args:
        pipeline: Pipeline of the networks.
        labels: Class of each image.
        unet_takes_labels: Whether the UNet is given the labels.
        scales: Guidance scale of each image. The classifier is given the labels of images whose scale is not 0.

    Raises:
        ValueError: If a label is out of range for a network, or no network has classes.
    """
    receivers = [(labels, pipeline.unet.config.num_class_embeds)] if unet_takes_labels else []
    guided = [label for label, scale in zip(labels, scales or []) if scale]
    receivers += [(guided, pipeline.classifier.config.num_classes)] if guided else []
    for received, num_classes in receivers or [(labels, known_classes(pipeline))]:
        if num_classes is None:
            networks = "the UNet has no classes" if unet_takes_labels else "neither UNet nor classifier has classes"
            raise ValueError(f"`class_labels` must be None, because {networks}.")
        check_range(received, num_classes)


def check_range(labels: list[int], num_classes: int) -> None:
    """Raises a ValueError if a label is not the number of a class."""
    wrong = [label for label in labels if not 0 <= label < num_classes]
    if wrong:
        raise ValueError(f"`class_labels` must be in [0, {num_classes - 1}], but got {wrong}.")


def draw_labels(
    num_classes: int, batch_size: int, generator: torch.Generator | list[torch.Generator] | None
) -> torch.Tensor:
    """Draws random labels, `(batch_size,)`, from one generator for all images or one generator per image."""
    if isinstance(generator, list):
        return torch.cat([draw_labels(num_classes, 1, own) for own in generator])
    device = generator.device if generator is not None else "cpu"
    return torch.randint(num_classes, (batch_size,), generator=generator, device=device)
