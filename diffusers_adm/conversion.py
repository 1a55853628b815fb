"""Conversion of checkpoints of the original code to folders that diffusers loads."""

from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.atomic_files import atomic_folder
from diffusers_adm.hub.cards import released_card
from diffusers_adm.hub.released_files import save_converted
from diffusers_adm.hub.saved_files import check_variant
from diffusers_adm.models.weights import cast_weights
from diffusers_adm.openai.checkpoints import PublishedCheckpoint
from diffusers_adm.openai.released import find_released, guiding_classifier
from diffusers_adm.pipelines.released import load_released


def convert_checkpoints(
    output: Path,
    *,
    unet: Path | None = None,
    classifier: Path | None = None,
    flags: str | None = None,
    released: str | None = None,
    accept_license: bool = False,
    dtype: str | None = None,
    variant: str | None = None,
) -> str:
    """
    Converts checkpoints of the original code, or a released checkpoint, to a folder that `from_pretrained` loads.

    Args:
        output: Folder to write. It must be new or empty.
        unet: File of a UNet or an upsampler.
        classifier: File of a classifier.
        flags: Model flags of the original command line.
        released: Name of a released checkpoint, instead of files. It is downloaded with the classifier that guides it.
        accept_license: Whether the restrictions of the license of the released checkpoint are accepted.
        dtype: Data type of the weights. `None` keeps the stored data type.
        variant: Part of the names of the weight files.

    Returns:
        Name of the class that loads the folder.

    Raises:
        ValueError: If the folder is not empty, the variant is not valid, or the checkpoints cannot be converted.
        OSError: If the folder cannot be written.
    """
    check_variant(variant)
    folder = output.resolve()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"--output {output} exists already and is not an empty folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as unfinished:
        if released is not None:
            converted = load_released(released, accept_license=accept_license)
        else:
            converted = load_checkpoints(unet, classifier, flags)
        if dtype is not None:
            models = converted.components.values() if isinstance(converted, DiffusionPipeline) else [converted]
            for model in models:
                if isinstance(model, torch.nn.Module):
                    cast_weights(model, getattr(torch, dtype))
        save_converted(converted, unfinished, variant=variant)
        # A released checkpoint already has its card, which was copied from its folder.
        changed = flags is not None or dtype is not None or variant is not None
        card = None if changed or released is not None else find_card(unet, classifier)
        if card is not None:
            card.save(unfinished / "README.md")
    return type(converted).__name__


def load_checkpoints(
    unet: Path | None, classifier: Path | None, flags: str | None
) -> DiffusionPipeline | NoisyClassifier:
    """
    Loads checkpoints as a pipeline. A classifier without a UNet is loaded as a model.

    Raises:
        ValueError: If the checkpoints cannot be converted.
    """
    if unet is None:
        return NoisyClassifier.from_openai(classifier, flags)
    published = PublishedCheckpoint(unet, flags)
    if classifier is None and published.kind == "upsampler":
        return ADMUpsamplePipeline.from_openai(published)
    return ClassifierGuidedPipeline.from_openai(published, classifier)


def find_card(unet: Path | None, classifier: Path | None) -> ModelCard | None:
    """Returns the card of files that are released checkpoints. Returns `None` for other files."""
    known = find_released(unet or classifier)
    guide = find_released(classifier) if unet else None
    return None if known is None or guide is not guiding_classifier(known) else released_card(known)
