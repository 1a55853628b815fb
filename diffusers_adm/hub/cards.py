"""Cards of models: sections that every card shares, and the cards of the released checkpoints, made from their table.

`python -m diffusers_adm.hub.cards model_cards` writes the cards of all released checkpoints, and `diffusers-adm convert` adds the
card of a checkpoint to the folder that it writes.
"""

import sys
from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData

from diffusers_adm.openai.released import RELEASED_CHECKPOINTS, ReleasedCheckpoint, guiding_classifier


PAPER = "[Dhariwal & Nichol 2021](https://arxiv.org/abs/2105.05233)"
CLASS_NAMES = {"unet": "ClassifierGuidedPipeline", "upsampler": "ADMUpsamplePipeline", "classifier": "NoisyClassifier"}
KINDS = {
    "ClassifierGuidedPipeline": "UNet",
    "ADMUpsamplePipeline": "Upsampler",
    "NoisyClassifier": "Noise-aware classifier",
}
PIPELINE_TAGS = {
    "ClassifierGuidedPipeline": "unconditional-image-generation",
    "ADMUpsamplePipeline": "image-to-image",
    "NoisyClassifier": "image-classification",
}
LSUN = {"bedroom", "cat", "horse"}
LIMITS = """The [published model card](https://github.com/openai/guided-diffusion/blob/main/model-card.md) says: for research only, as a
baseline or a starting point; not for commercial use, propaganda or offensive pictures. Some samples are unrealistic, those with faces
most of all. Guidance costs diversity, and may make biases of the data stronger. The training images come from the Internet and show
real people, which the weights may remember in part."""


def card_name(released: ReleasedCheckpoint) -> str:
    """Returns the name of a checkpoint's card, which is the name of the folder that its conversion writes."""
    return "adm-" + released.file.removesuffix(".pt").replace("_", "-")


def usage(class_name: str, arguments: str, call: str) -> str:
    """
    Returns the section of a card that shows how to load a model, with this package and without it.

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


def released_usage(released: ReleasedCheckpoint) -> str:
    """Returns the section of a released checkpoint's card that shows how to load and call the model."""
    labelled = released.imagenet_labels or guiding_classifier(released) is not None
    label = 'class_labels=["goldfish"]' if labelled else ""
    call = {
        "unet": f"image = model({label}).images[0]",
        "upsampler": f'image = model("small.png", {label}).images[0]',
        "classifier": "logits = model(noised_images, timestep).logits",
    }[released.kind]
    return usage(CLASS_NAMES[released.kind], f'"me/{card_name(released)}"', call)


def conversion_commands(released: ReleasedCheckpoint) -> str:
    """Returns the commands that download, convert and upload a released checkpoint."""
    name, classifier = card_name(released), guiding_classifier(released)
    files = f"--classifier {released.file}" if released.kind == "classifier" else f"--unet {released.file}"
    files += f" --classifier {classifier.file}" if classifier is not None else ""
    downloads = " ".join(f"-O {source.url}" for source in (released, classifier) if source is not None)
    return f"""```sh
curl -L {downloads}
diffusers-adm convert {files} --output {name}
hf upload me/{name} {name}
```"""


def fact_table(released: ReleasedCheckpoint, trained_on: str) -> str:
    """Returns the table of facts of a released checkpoint's card."""
    facts: dict[str, str] = {"File": f"[`{released.file}`]({released.url})", "Trained on": trained_on}
    classifier = guiding_classifier(released)
    if classifier is not None:
        facts["Guided by"] = f"`{classifier.file}`, at scale {released.guidance_scale:g} by default"
    if released.fid is not None:
        facts["Published FID"] = f"{released.fid:.2f} (50,000 samples, {released.fid_setting})"
    facts["Flags"] = f"`{released.flags}`"
    return "\n".join(["| | |", "| --- | --- |", *(f"| {fact} | {value} |" for fact, value in facts.items())])


def released_card(released: ReleasedCheckpoint) -> ModelCard:
    """
    Returns the card of a released checkpoint as this package converts it.

    Args:
        released: Row in the table of released checkpoints.
    """
    name, class_name = card_name(released), CLASS_NAMES[released.kind]
    words = set(released.file.removesuffix(".pt").split("_"))
    trained_on = f"LSUN {next(iter(LSUN & words))}" if LSUN & words else "ImageNet"
    data = ModelCardData(
        library_name="diffusers",
        pipeline_tag=PIPELINE_TAGS[class_name],
        license="mit",
        tags=["adm", "guided-diffusion", "classifier-guidance"],
        datasets=["imagenet-1k"] if trained_on == "ImageNet" else None,
        model_name=name,
    )
    return ModelCard(f"""---
{data.to_yaml()}
---

# {name}

{KINDS[class_name]} of ADM ({PAPER}), converted by `diffusers_adm` from the checkpoint that
[openai/guided-diffusion](https://github.com/openai/guided-diffusion) released under the MIT license. Each of its tensors is the published
one.

{fact_table(released, trained_on)}

## Use

{released_usage(released)}

## Conversion

{conversion_commands(released)}

## Limits

{LIMITS}
""")


def main(folder: str) -> None:
    """Writes `folder/<name>/README.md` for each released checkpoint."""
    for released in RELEASED_CHECKPOINTS.values():
        released_card(released).save(Path(folder) / card_name(released) / "README.md")


if __name__ == "__main__":
    main(*sys.argv[1:])
