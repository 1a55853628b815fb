"""Card of an exported network: its inputs and output, how to run it, and the license of the network."""

from pathlib import Path

from diffusers import ModelMixin
from huggingface_hub import ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

from diffusers_adm.hub.saved_files import CARD_FILE
from diffusers_adm.models import NoisyClassifier


# Name of the network's own card in the folder of an export.
SOURCE_CARD = "SOURCE_CARD.md"
# Metadata of the network's card that the card of the export repeats.
KEPT_METADATA = ("license", "license_name", "license_link", "language", "datasets", "tags", "pipeline_tag")
# Code that runs each file.
USAGE = {
    "model.onnx": """import onnxruntime

session = onnxruntime.InferenceSession("model.onnx")
(output,) = session.run(None, inputs)  # NumPy arrays by name""",
    "model.pt2": """import torch

program = torch.export.load("model.pt2").module()
output = program(**inputs)  # tensors by name""",
}


def source_card(network: ModelMixin) -> ModelCard | None:
    """Returns the card of the folder or repository that a network was loaded from. `None` if it has no card."""
    source = network.config.get("_name_or_path")
    if not source:
        return None
    folder = Path(source)
    if folder.is_dir():
        files = [folder / CARD_FILE]
        if (folder.parent / "model_index.json").is_file():  # the card of the pipeline that the network is in
            files.append(folder.parent / CARD_FILE)
    else:
        try:
            files = [Path(hf_hub_download(source, CARD_FILE))]
        except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError):
            files = []
    file = next((file for file in files if file.is_file()), None)
    return None if file is None else ModelCard(file.read_text(encoding="utf-8"))


def input_rows(network: ModelMixin, factor: int | None) -> list[str]:
    """
    Returns the rows of the table of inputs.

    Args:
        network: Network that was exported.
        factor: Number that height and width must be multiples of. `None` if the network supports only its own size.
    """
    config, size = (
        network.config,
        "height, width" if factor else f"{network.config.sample_size}, {network.config.sample_size}",
    )
    multiples = f" Height and width must be multiples of {factor}, at least {2 * factor}." if factor else ""
    noised, timestep = (
        "x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) epsilon",
        "Training timestep t of each image, from 0.",
    )
    if config.get("preconditioning"):
        noised, timestep = "x_0 + sigma epsilon", f"Noise level sigma, {config.sigma_min} to {config.sigma_max}."
    rows = [
        f"| `sample` | batch, {config.in_channels}, {size} | float32 | Noised images {noised}, with x_0 in [-1, 1].{multiples} |",
        f"| `timestep` | batch | float32 | {timestep} |",
    ]
    if (classes := config.get("num_class_embeds")) is not None:
        null = f", or {classes} for no class" if config.use_null_class else ""
        rows.append(f"| `class_labels` | batch | int64 | Class of each image, 0 to {classes - 1}{null}. |")
    if config.get("low_res_conditioning"):
        shape = f"batch, {config.in_channels}, low_res_height, low_res_width"
        rows.append(f"| `low_res` | {shape} | float32 | Images to enlarge, in [-1, 1]. They may have any size. |")
    return rows


def describe_output(network: ModelMixin) -> str:
    """Returns the sentences of the card about the output."""
    config = network.config
    if isinstance(network, NoisyClassifier):
        return f"Logits of the classes, (batch, {config.num_classes})."
    predicted = "x_0" if config.preconditioning else "noise (or x_0, if the scheduler's `prediction_type` is `sample`)"
    variance = ""
    if config.out_channels == 2 * config.in_channels:
        variance = (
            f" The first {config.in_channels} channels predict it. The other {config.in_channels} interpolate the log-variance:"
            " -1 is its lower bound, and 1 is its upper bound."
        )
    return f"Predicted {predicted}, (batch, {config.out_channels}, height, width).{variance}"


def write_card(network: ModelMixin, folder: Path, file: str, factor: int | None, difference: float | None) -> None:
    """
    Writes the card of an exported network, and a copy of the card that the network was loaded with.

    Args:
        network: Network that was exported.
        folder: Folder of the file.
        file: Name of the file.
        factor: Number that height and width must be multiples of. `None` if the network supports only its own size.
        difference: Largest difference between the outputs of file and network. `None` if it was not measured.
    """
    card, metadata = source_card(network), {}
    origin = "The network was loaded without a card, so its license is not known here."
    if card is not None:
        metadata = {name: card.data.get(name) for name in KEPT_METADATA if card.data.get(name) is not None}
        card.save(folder / SOURCE_CARD)
        origin = f"[{SOURCE_CARD}]({SOURCE_CARD}) is the card of the network, whose license and limits hold for this file too."
    checked = "The file was not compared with the network."
    if difference is not None:
        checked = f"On random inputs, the outputs of file and network differ by {difference:.1e} at most."
    rows = "\n".join(input_rows(network, factor))
    ModelCard(f"""---
{ModelCardData(**metadata).to_yaml()}
---

# {file}

{type(network).__name__} of `diffusers_adm`, exported in float32. `config.json` is its config. {checked}

{origin}

## Inputs

| name | shape | type | what it is |
| --- | --- | --- | --- |
{rows}

## Output

{describe_output(network)}

## Use

```python
{USAGE[file]}
```
""").save(folder / CARD_FILE)
