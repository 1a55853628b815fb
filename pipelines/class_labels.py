"""Classes of images: their names, and who is told them."""

import difflib

import numpy as np
import torch
from diffusers import DiffusionPipeline

from diffusers_adm.models.class_names import synonyms


ClassLabels = int | str | list | torch.Tensor | np.ndarray


class ClassNames:
    """
    Names of the classes of a pipeline.

    Args:
        id2label: Name of each class by its number; synonyms are separated by commas.
    """

    def __init__(self, id2label: dict[int, str] | None):
        self.label2id: dict[str, list[int]] = {}  # the classes that bear each name, synonyms apart
        for label, names in (id2label or {}).items():
            for name in synonyms(names):
                self.label2id.setdefault(name, []).append(label)

    def class_ids(self, class_labels: ClassLabels) -> list[int]:
        """
        Returns class numbers of labels that are given by number or name.

        Args:
            class_labels: One label, a list (nested ones are flattened), or an integer tensor or array.

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
        raise ValueError(f"class_labels must be integers or names: got {class_labels!r}.")

    def _class_id(self, name: str) -> int:
        if not self.label2id:
            raise ValueError(
                f"class_labels={name!r} is a name, but neither pipeline nor classifier knows names (id2label)."
            )
        if name not in self.label2id:
            lowered = {known.lower(): known for known in self.label2id}
            near = [lowered[match] for match in difflib.get_close_matches(name.lower(), lowered, n=3)]
            raise ValueError(f"No class is called {name!r}" + (f"; near it are {near}." if near else "."))
        if len(self.label2id[name]) > 1:
            raise ValueError(f"Several classes are called {name!r}: give one of the numbers {self.label2id[name]}.")
        return self.label2id[name][0]


def known_names(pipeline: DiffusionPipeline) -> dict[int, str] | None:
    """Returns the names of the classes: those of the pipeline, else those of its classifier."""
    if pipeline.config.id2label is not None or pipeline.classifier is None:
        return pipeline.config.id2label
    return pipeline.classifier.config.get("id2label")


def known_classes(pipeline: DiffusionPipeline) -> int | None:
    """Returns the number of classes that all networks of a pipeline know, or `None` where none knows any."""
    unet_classes = pipeline.unet.config.num_class_embeds
    classifier_classes = None if pipeline.classifier is None else pipeline.classifier.config.num_classes
    return min((count for count in (unet_classes, classifier_classes) if count is not None), default=None)


def check_labels(
    pipeline: DiffusionPipeline, labels: list[int], unet_takes_labels: bool, scales: list[float] | None = None
) -> None:
    """
    Checks that every network knows the labels that it is told.

    Args:
        pipeline: Pipeline of the networks.
        labels: Class of each image.
        unet_takes_labels: Whether the UNet is told them.
        scales: Scale at which the classifier guides each image; it is told the labels of those that are not 0.

    Raises:
        ValueError: If a network does not know a label, or none knows classes.
    """
    receivers = [(labels, pipeline.unet.config.num_class_embeds)] if unet_takes_labels else []
    guided = [label for label, scale in zip(labels, scales or []) if scale]
    receivers += [(guided, pipeline.classifier.config.num_classes)] if guided else []
    for told, num_classes in receivers or [(labels, known_classes(pipeline))]:
        if num_classes is None:
            raise ValueError("class_labels were given, but neither UNet nor classifier knows classes.")
        wrong = [label for label in told if not 0 <= label < num_classes]
        if wrong:
            raise ValueError(f"class_labels {wrong} are not in [0, {num_classes - 1}].")


def draw_labels(
    num_classes: int, batch_size: int, generator: torch.Generator | list[torch.Generator] | None
) -> list[int]:
    """Returns random labels, from one generator for all images or one per image."""
    if isinstance(generator, list):
        return [label for own in generator for label in draw_labels(num_classes, 1, own)]
    device = generator.device if generator is not None else "cpu"
    return torch.randint(num_classes, (batch_size,), generator=generator, device=device).tolist()
