"""Class labels of the images of a run."""

import hashlib
import re
from pathlib import Path

import torch

from diffusers_adm.data.npz import NpzFile
from diffusers_adm.evaluation.schedulers import SamplingPipeline
from diffusers_adm.evaluation.shards import image_generator
from diffusers_adm.pipelines.class_labels import known_classes
from diffusers_adm.pipelines.options import SamplingOptions


NUMBER = re.compile("-?[0-9]{1,18}")  # a limit, because no class has a longer number and Python reads long ones slowly


def num_drawn_classes(pipeline: SamplingPipeline, options: SamplingOptions) -> int | None:
    """Returns the number of classes that labels are drawn from, or `None` if a run has no labels. The options must be resolved."""
    num_classes = options.num_classes(pipeline)
    if num_classes is None and options.guidance_fn is not None:
        return known_classes(pipeline)  # the guidance function is given the labels
    return num_classes


class Labels:
    """
    Labels of the images of a sampling run.

    Args:
        policy: Choice of the labels: `"random"`, `"balanced"` or the path of a file. `None` means no labels.
        pipeline: Pipeline of the run.
        options: Resolved options of the pipeline's call.
        seed: Seed of the run.
        num_images: Number of images.

    Attributes:
        policy: Choice of the labels, for the settings of the run. A hash represents the labels of a file.

    Raises:
        ValueError: If the file does not exist, or has too few or unknown labels.
    """

    def __init__(
        self, policy: str | None, pipeline: SamplingPipeline, options: SamplingOptions, seed: int, num_images: int
    ):
        self.policy = policy
        self.seed = seed
        num_classes = num_drawn_classes(pipeline, options)
        self.num_classes = None if policy is None else num_classes
        self.listed: list[int] | None = None
        # A pipeline with classes draws random labels if it is given none. In a run without guidance, no network needs them, but
        # drawing them would change the noise, which must be that of a guided run with the same seed. So it is given a placeholder.
        self.placeholder = 0 if num_classes is None and known_classes(pipeline) is not None else None
        if policy not in ("random", "balanced", None):
            self.listed = self._read(Path(policy), pipeline)
            self.policy = f"listed, {hashlib.sha256(str(self.listed).encode()).hexdigest()[:16]}"
            if len(self.listed) < num_images:
                raise ValueError(
                    f"--labels must have at least {num_images} labels, one per image, but {policy} has {len(self.listed)}."
                )

    def _read(self, path: Path, pipeline: SamplingPipeline) -> list[int]:
        if self.num_classes is None:
            raise ValueError(
                f"--labels requires a network with classes in this run, but there is none. Leave out {path}."
            )
        if not path.is_file():
            raise ValueError(f"--labels must be random, balanced or a file, but got {path}.")
        if path.suffix == ".npz":
            given = NpzFile(path).read("arr_1")
        else:
            label2id = pipeline.label2id
            given = [self._parsed(word, path, label2id) for word in self._words(path)]
        try:
            labels = pipeline.class_ids(given)
        except ValueError as error:
            raise ValueError(f"--labels {path}: {error}") from error
        unknown = sorted({label for label in labels if not 0 <= label < self.num_classes})
        if unknown:
            raise ValueError(f"--labels must be in [0, {self.num_classes - 1}], but {path} has {unknown[:5]}.")
        return labels

    def _parsed(self, word: str, path: Path, label2id: dict[str, list[int]]) -> int | str:
        """Returns a label of a file as a number or a name. Raises a ValueError if it may be both."""
        if not NUMBER.fullmatch(word):
            return word
        number = int(word)
        named = label2id.get(word, [number])
        if named == [number]:
            return number
        if 0 <= number < self.num_classes:
            raise ValueError(
                f"--labels {path} must not have {word}, which is the number of one class and the name of class {named[0]}. Pass an .npz file"
                " with the numbers of the classes as arr_1."
            )
        return word

    @staticmethod
    def _words(path: Path) -> list[str]:
        try:
            lines = path.read_text(encoding="utf-8-sig").splitlines()
        except UnicodeDecodeError as error:
            raise ValueError(f"--labels must be a text file or an .npz file, but {path} is neither.") from error
        return [line.strip() for line in lines if line.strip()]

    def of_images(self, numbers: range) -> list[int] | None:
        """Returns the labels of the images with these numbers, or `None` if no network takes labels."""
        if self.num_classes is None:
            return None
        if self.listed is not None:
            return [
                self.listed[number % len(self.listed)] for number in numbers
            ]  # images beyond the end are dropped later
        if self.policy == "balanced":
            return [number % self.num_classes for number in numbers]
        generators = (image_generator(self.seed, number, purpose=1) for number in numbers)
        return [torch.randint(self.num_classes, (), generator=generator).item() for generator in generators]

    def for_call(self, numbers: range) -> list[int] | None:
        """Returns the labels to pass to the pipeline for the images with these numbers. No network sees placeholders."""
        labels = self.of_images(numbers)
        return [self.placeholder] * len(numbers) if labels is None and self.placeholder is not None else labels
