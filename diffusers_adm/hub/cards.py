"""Model cards: the common sections, cards that are made from a model's config, and the cards of the released checkpoints.

`python -m diffusers_adm.hub.cards model_cards` writes the cards of all released checkpoints. `diffusers-adm convert` adds the card of a
checkpoint to its output folder.
"""

import json
import os
import sys
from pathlib import Path

import torch
from huggingface_hub import ModelCard, ModelCardData

from diffusers_adm.atomic_files import atomic_write, final_name
from diffusers_adm.hub.saved_files import CARD_FILE, copy_card
from diffusers_adm.openai.released import RELEASED_CHECKPOINTS, guiding_classifier
from diffusers_adm.openai.released_rows import ReleasedCheckpoint


PAPER = "[Dhariwal & Nichol 2021](https://arxiv.org/abs/2105.05233)"
CLASS_NAMES = {"unet": "ClassifierGuidedPipeline", "upsampler": "ADMUpsamplePipeline", "classifier": "NoisyClassifier"}
KINDS = {
    "ClassifierGuidedPipeline": "UNet",
    "ADMUpsamplePipeline": "Upsampler",
    "NoisyClassifier": "Noise-aware classifier",
    "ADMUNet2DModel": "UNet",
}
PIPELINE_TAGS = {
    "ClassifierGuidedPipeline": "unconditional-image-generation",
    "ADMUpsamplePipeline": "image-to-image",
    "NoisyClassifier": "image-classification",
    "ADMUNet2DModel": "unconditional-image-generation",
}
TAGS = ["adm", "guided-diffusion", "classifier-guidance"]
LICENSES = {"MIT": "mit", "CC BY-NC-SA 4.0": "cc-by-nc-sa-4.0"}
LIMITS = """The [model card of the original code](https://github.com/{code}/blob/main/model-card.md) allows use for research,
as a baseline or a starting point. It excludes commercial use, propaganda and offensive images. Some samples are unrealistic, especially
images with faces. Guidance reduces diversity and may amplify biases of the data. The training images come from the Internet and show
real people. The weights may have memorised parts of them."""
OTHER_LIMITS = """The authors state no limits of use with the file. The training images show real people and places. The weights may have
memorised parts of them."""


def card_name(released: ReleasedCheckpoint) -> str:
    """Returns the name of a checkpoint's card. The conversion writes a folder of the same name."""
    if released.file not in RELEASED_CHECKPOINTS:
        return released.name
    return "adm-" + released.file.removesuffix(".pt").replace("_", "-")


def usage(class_name: str, arguments: str, call: str) -> str:
    """
    Returns the section of a card that shows how to load a model with and without this package.

    Args:
        class_name: Name of the saved class.
        arguments: Arguments of `from_pretrained`, as source code.
        call: Lines of source code that use `model`.
    """
    stock = "DiffusionPipeline" if class_name.endswith("Pipeline") else "AutoModel"
    return f"""```python
from diffusers_adm import {class_name}

model = {class_name}.from_pretrained({arguments})
{call}
```

Without `diffusers_adm`:

```python
from diffusers import {stock}

model = {stock}.from_pretrained({arguments}, trust_remote_code=True)
```"""


def example_call(class_name: str, label: str | None) -> str:
    """
    Returns a line of source code that calls `model`.

    Args:
        class_name: Name of the saved class.
        label: Name of a class to draw. `None` if the classes have no names.
    """
    if class_name == "NoisyClassifier":
        return "logits = model(noised_images, timestep).logits"
    if class_name == "ADMUNet2DModel":
        return "prediction = model(noised_images, timestep).sample"
    arguments = ['"small.png"'] if class_name == "ADMUpsamplePipeline" else []
    if label is not None:
        arguments.append(f"class_labels=[{json.dumps(label, ensure_ascii=False)}]")
    return f"image = model({', '.join(arguments)}).images[0]"


def save_card(model, folder: str | os.PathLike, name: str | None = None) -> None:
    """
    Adds a card to a folder, unless the folder has one. If the pipeline or model was loaded from a folder with a card, that card is
    copied. Otherwise, or if the pipeline has a network from elsewhere, a card is made from the config.

    Args:
        model: Pipeline or model of this package.
        folder: Folder of the card.
        name: Title of a card that is made. `None` means the name of the folder.
    """
    folder = Path(folder)
    if (folder / CARD_FILE).exists() or (not _has_new_networks(model) and copy_card(model, folder)):
        return
    with atomic_write(folder / CARD_FILE) as partial:
        partial.write_text(str(config_card(model, name or final_name(folder))), encoding="utf-8")


def _has_new_networks(model) -> bool:
    """Returns whether a pipeline has a network from elsewhere, which the card in the pipeline's folder does not describe."""
    source = Path(model.config.get("_name_or_path") or "")
    networks = {} if isinstance(model, torch.nn.Module) else model.components
    return any(
        Path(network.config.get("_name_or_path") or "") != source / name
        for name, network in networks.items()
        if isinstance(network, torch.nn.Module) and name not in getattr(model, "_described_by_card", ())
    )


def config_card(model, name: str) -> ModelCard:
    """
    Returns a card with the facts of a model's config.

    Args:
        model: Pipeline or model of this package.
        name: Name of the folder or repository.
    """
    title = name.split("/")[-1]
    class_name = next(base.__name__ for base in type(model).__mro__ if base.__name__ in KINDS)
    data = ModelCardData(library_name="diffusers", pipeline_tag=PIPELINE_TAGS[class_name], tags=TAGS, model_name=title)
    parts = {"model": model} if isinstance(model, torch.nn.Module) else model.components
    networks = {part: network for part, network in parts.items() if isinstance(network, torch.nn.Module)}
    configs = [model.config, *(network.config for network in networks.values())]
    config, id2label = configs[1], next((one["id2label"] for one in configs if one.get("id2label")), {})
    facts = {"Images": f"{config.sample_size}x{config.sample_size} pixels, channels: {config.in_channels}"}
    facts |= {
        f"Parameters of the {part}": f"{sum(parameter.numel() for parameter in network.parameters()):,}"
        for part, network in networks.items()
    }
    counts = (one.get("num_class_embeds") or one.get("num_classes") for one in configs)
    facts["Classes"] = str(next((count for count in counts if count), "none"))
    if id2label:
        names = [name.replace("|", r"\|") for name in list(id2label.values())[:20]]
        facts["Names of classes"] = ", ".join(names + ["..."] * (len(id2label) > 20))
    return ModelCard(f"""---
{data.to_yaml()}
---

# {title}

{KINDS[class_name]} of ADM ({PAPER}), saved by `diffusers_adm`.
This card was made from the config. Please add the training data, metrics and intended use.

{table_of(facts)}

## Use

{usage(class_name, json.dumps(name), example_call(class_name, next(iter(id2label.values()), None)))}
""")


def table_of(facts: dict[str, str]) -> str:
    """Returns a Markdown table of two columns without a header."""
    return "\n".join(["| | |", "| --- | --- |", *(f"| {fact} | {value} |" for fact, value in facts.items())])


def released_usage(released: ReleasedCheckpoint) -> str:
    """Returns the section of a released checkpoint's card that shows how to load and call the model."""
    labelled = released.imagenet_labels or guiding_classifier(released) is not None
    class_name = CLASS_NAMES[released.kind]
    call = example_call(class_name, "goldfish" if labelled else None)
    return usage(class_name, f'"me/{card_name(released)}"', call)


def conversion_commands(released: ReleasedCheckpoint) -> str:
    """Returns the commands that download, convert and upload a released checkpoint."""
    name, classifier = card_name(released), guiding_classifier(released)
    if released.file not in RELEASED_CHECKPOINTS:
        terms = "" if released.terms is None else " --accept_license"
        return f"""```sh
diffusers-adm convert --released {released.name}{terms} --output {name}
hf upload me/{name} {name}
```"""
    loader = "load_released" if released.kind == "classifier" else f"{CLASS_NAMES[released.kind]}.from_released"
    files = f"--classifier {released.file}" if released.kind == "classifier" else f"--unet {released.file}"
    files += f" --classifier {classifier.file}" if classifier is not None else ""
    downloads = " ".join(f"-O {source.url}" for source in (released, classifier) if source is not None)
    return f"""`{loader}("{released.name}")` downloads and converts the checkpoint by itself. To publish the converted
checkpoint under your own name in place of `me`:

```sh
curl -L {downloads}
diffusers-adm convert {files} --output {name}
hf upload me/{name} {name}
```"""


def fact_table(released: ReleasedCheckpoint) -> str:
    """Returns the table of facts of a released checkpoint's card."""
    facts: dict[str, str] = {"File": f"[`{released.file}`]({released.url})", "Trained on": released.trained_on}
    if released.sha256 is not None:
        facts["SHA-256"] = f"`{released.sha256}`"
    classifier = guiding_classifier(released)
    if classifier is not None:
        facts["Guided by"] = f"`{classifier.file}`, at scale {released.guidance_scale:g} by default"
    if released.fid is not None:
        facts["Published FID"] = f"{released.fid:.2f} (50,000 samples, {released.fid_setting})"
    facts["Flags"] = f"`{released.flags}`"
    return table_of(facts)


def origin(released: ReleasedCheckpoint) -> str:
    """Returns the sentences of a card that name the source and the license of a checkpoint."""
    source = f"[{released.code}](https://github.com/{released.code})"
    has_published = "has published" if released.code.startswith("openai/") else "has trained or uses"
    terms = "" if released.terms is None else f", for {released.terms} use"
    license = f"License: {released.license}{terms}."
    if released.license.endswith("(code)"):
        license += " No license of the weights is published."
    note = f" Note: {released.note}." if released.note else ""
    return f"""{source} {has_published}.
The conversion does not change the value of any weight, except that weights in float16 or bfloat16 are rounded.
{license}{note}"""


def released_card(released: ReleasedCheckpoint) -> ModelCard:
    """
    Returns the card of a converted released checkpoint.

    Args:
        released: Row in the table of released checkpoints.
    """
    name, class_name = card_name(released), CLASS_NAMES[released.kind]
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAGS[class_name],
        license=LICENSES.get(released.license, "other"),
        tags=TAGS,
        datasets=["imagenet-1k"] if released.trained_on == "ImageNet" else None,
        model_name=name,
    )
    limits = LIMITS.format(code=released.code) if released.for_research else OTHER_LIMITS
    return ModelCard(f"""---
{data.to_yaml()}
---

# {name}

{KINDS[class_name]} of ADM ({PAPER}), converted by `diffusers_adm` from the checkpoint that
{origin(released)}

{fact_table(released)}

## Use

{released_usage(released)}

## Conversion

{conversion_commands(released)}

## Limits

{limits}
""")


def main(folder: str) -> None:
    """Writes `folder/<name>/README.md` for each released checkpoint."""
    for released in RELEASED_CHECKPOINTS.values():
        released_card(released).save(Path(folder) / card_name(released) / "README.md")


if __name__ == "__main__":
    main(*sys.argv[1:])
