"""Export of one network to a file, and the comparison of the file with the network.

torch.export traces the forward pass once, for all batch sizes and all sizes of the images that the network supports. ONNX files are
made from the same program.
"""

import copy
import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import ModelMixin
from torch.export import Dim, ExportedProgram

from diffusers_adm.atomic_files import atomic_folder
from diffusers_adm.choices import EXPORT_FILES
from diffusers_adm.export.cards import write_card
from diffusers_adm.models import NoisyClassifier
from diffusers_adm.models.adapters import without_adapters


# Packages that write an ONNX file and run it.
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
# Upper bound of batch size, height and width, because torch before 2.7 refuses dimensions without a bound.
MAX_SIZE = 2**20
# Largest difference between file and network that counts as rounding, as a fraction of the largest output.
TOLERANCE = 1e-3


class ForwardPass(torch.nn.Module):
    """Forward pass of a network with one tensor as its output. Its parameters are the inputs of the exported program."""

    def __init__(self, network: ModelMixin):
        super().__init__()
        self.network = network

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        low_res: torch.Tensor | None = None,
    ) -> torch.Tensor:
        others = {"class_labels": class_labels, "low_res": low_res}
        others = {name: tensor for name, tensor in others.items() if tensor is not None}
        return self.network(sample, timestep, **others, return_dict=False)[0]


def export_network(
    network: ModelMixin,
    folder: Path | str,
    format: str = "onnx",
    check: bool = True,
) -> float | None:
    """
    Exports a network in float32 to a new folder. The folder holds the program, the config of the network, a card that describes the
    inputs, and the card that the network was loaded with. Adapters are merged into the weights.

    Args:
        network: `ADMUNet2DModel` or `NoisyClassifier`.
        folder: Folder to write. It must be new or empty.
        format: `"onnx"`, which needs the extra `export`, or `"torch-export"`.
        check: Whether to run the file on random images, and compare its outputs with those of the network.

    Returns:
        Largest absolute difference between the outputs of file and network. `None` without the check.

    Raises:
        ValueError: If the format is unknown, the network is of another class, the folder is not empty, or the outputs of file and
            network differ.
        ModuleNotFoundError: If a package that the format needs is not installed.
        OSError: If a file cannot be written.
    """
    folder = Path(folder).resolve()
    check_can_export(format, folder)
    if "model_channels" not in getattr(network, "config", ()):  # a compiled model is of another class
        raise ValueError(
            f"`network` must be an ADMUNet2DModel or a NoisyClassifier, but got {type(network).__name__}."
        )
    network = plain_copy(network)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as unfinished:
        unfinished.mkdir()
        program = trace(network)
        file = unfinished / EXPORT_FILES[format]
        if format == "onnx":
            write_onnx(program, file)
        else:
            torch.export.save(program, file)
        difference = largest_difference(network, open_program(file)) if check else None
        network.save_config(unfinished)
        write_card(network, unfinished, file.name, size_factor(network), difference)
    return difference


def check_can_export(format: str, folder: Path) -> None:
    """
    Checks format and folder before a network is loaded and traced.

    Raises:
        ValueError: If the format is unknown, or the folder is not empty.
        ModuleNotFoundError: If a package that the format needs is not installed.
    """
    if format not in EXPORT_FILES:
        raise ValueError(f"`format` must be one of {', '.join(EXPORT_FILES)}, but got {format!r}.")
    for name in ONNX_PACKAGES if format == "onnx" else ():
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f'The format onnx requires {name}: run pip install -e ".[export]".', name=name)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise ValueError(f"`folder` must be new or empty, but got {folder}.")


def plain_copy(network: ModelMixin) -> ModelMixin:
    """Returns a copy of a network without adapters and gradients, in float32 on the CPU and in eval mode."""
    network = without_adapters(network) if getattr(network, "peft_config", None) else copy.deepcopy(network)
    return network.to("cpu", torch.float32).eval().requires_grad_(False)


def size_factor(network: ModelMixin) -> int | None:
    """Returns the number that height and width must be multiples of. `None` if the network supports only its `sample_size`."""
    if isinstance(network, NoisyClassifier) and network.config.pool == "attention":
        return None
    return 2 ** (len(network.config.channel_mult) - 1)


def native_size(network: ModelMixin) -> int:
    """Returns the height and width that a network is traced with: its `sample_size`, or two pixels at the lowest resolution."""
    return max(network.config.sample_size, 2 * (size_factor(network) or 0))


def example_inputs(network: ModelMixin, batch: int, height: int, width: int) -> dict[str, torch.Tensor]:
    """Returns random inputs of a network by their names, the same ones at each call."""
    generator, config = torch.Generator().manual_seed(0), network.config
    inputs = {
        "sample": torch.randn(batch, config.in_channels, height, width, generator=generator),
        "timestep": torch.linspace(1.0, 50.0, batch),
    }
    if config.get("num_class_embeds") is not None:
        inputs["class_labels"] = torch.arange(batch) % config.num_class_embeds
    if config.get("low_res_conditioning"):
        size = (max(height // 2, 2), max(width // 2, 2))
        inputs["low_res"] = torch.randn(batch, config.in_channels, *size, generator=generator)
    return inputs


def trace(network: ModelMixin) -> ExportedProgram:
    """Traces the forward pass of a network for any batch size, and for any size of the images that the network supports."""
    size = native_size(network)
    inputs = example_inputs(network, 2, size, size)
    batch = Dim("batch", min=1, max=MAX_SIZE)
    shapes = {name: {0: batch} for name in inputs}
    if (factor := size_factor(network)) is not None:
        # At least 2, because torch.export makes another program for a single pixel than for several.
        rows, columns = (Dim(name, min=2, max=MAX_SIZE) for name in ("rows", "columns"))
        shapes["sample"] |= {2: factor * rows, 3: factor * columns}
    if "low_res" in inputs:
        height, width = (Dim(f"low_res_{name}", min=2, max=MAX_SIZE) for name in ("height", "width"))
        shapes["low_res"] |= {2: height, 3: width}
    with torch.no_grad():
        return torch.export.export(ForwardPass(network), (), inputs, dynamic_shapes=shapes, strict=False)


def write_onnx(program: ExportedProgram, file: Path) -> None:
    """Writes a program as an ONNX file. Weights above 2 GB, the limit of an ONNX file, are written to a second file."""
    inputs = program.graph_signature.user_inputs
    names = {"sample": ("batch", None, "height", "width"), "low_res": (None, None, "low_res_height", "low_res_width")}
    written = torch.onnx.export(
        program,
        input_names=inputs,
        output_names=["output"],
        dynamic_shapes={name: names.get(name) for name in inputs},
        dynamo=True,
        verbose=False,
    )
    written.save(file)


def open_program(file: Path) -> Callable[[dict[str, torch.Tensor]], torch.Tensor]:
    """Returns a function that runs a written program, from inputs by name to the output."""
    if file.suffix == ".pt2":
        program = torch.export.load(file).module()
        return lambda inputs: program(**inputs)
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda inputs: torch.from_numpy(session.run(None, {name: inputs[name].numpy() for name in inputs})[0])


@torch.no_grad()
def largest_difference(network: ModelMixin, run: Callable[[dict[str, torch.Tensor]], torch.Tensor]) -> float:
    """
    Compares a written program with its network, on one image of the network's size and on three images of another size.

    Args:
        network: Network that was exported.
        run: Function that runs the program.

    Returns:
        Largest absolute difference of the outputs.

    Raises:
        ValueError: If the outputs differ by more than rounding.
    """
    size, factor = native_size(network), size_factor(network)
    other_size = (size, size) if factor is None else (2 * factor, 3 * factor)
    forward, largest = ForwardPass(network), 0.0
    for inputs in (example_inputs(network, 1, size, size), example_inputs(network, 3, *other_size)):
        expected, output = forward(**inputs), run(inputs)
        difference = (output - expected).abs().max().item()
        if output.shape != expected.shape or not difference <= TOLERANCE * max(1.0, expected.abs().max().item()):
            raise ValueError(
                f"The exported program differs from the network by {difference:.1e}, for inputs of"
                f" {tuple(inputs['sample'].shape)}: nothing was written. Try other versions of torch and of the extra `export`."
            )
        largest = max(largest, difference)
    return largest
