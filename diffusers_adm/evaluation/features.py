"""Features of images: torch-fidelity's extractors, any that a user registers there, and the spatial features of sFID."""

import contextlib
import os
import runpy
import sys
import traceback
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from diffusers_adm.evaluation.feature_options import INCEPTION, FeatureOptions


# Channels of the network's 192 x 17 x 17 features that sFID uses [Nash et al. 2021, arXiv 2103.03841].
SPATIAL_CHANNELS = 7


@dataclass
class Features:
    """
    Features of images.

    Args:
        pooled: `(images, features)`.
        spatial: `(images, spatial features)`, or `None` if the extractor has none.
        logits: `(images, classes)`, or `None` if the extractor knows no classes.
    """

    pooled: torch.Tensor
    spatial: torch.Tensor | None
    logits: torch.Tensor | None

    @staticmethod
    def joined(batches: list["Features"]) -> "Features":
        """Concatenates batches."""
        columns = ([getattr(batch, field.name) for batch in batches] for field in fields(Features))
        return Features(*(None if column[0] is None else torch.cat(column) for column in columns))


class FeatureExtractor:
    """
    Feature extractor of torch-fidelity, or one that was registered by `torch_fidelity.register_feature_extractor`.

    The method `get_default_feature_layer_for_metric` of a registered extractor names its features for `"fid"` and, if it
    classifies, for `"isc"`. Its features called `"spatial"` are used for sFID. Inception's spatial features are the first
    seven channels of the first branch of the fourth block at 17 x 17, rows before columns before channels, as in the
    published evaluator.

    Args:
        name: Name in the registry. `"inception-v3-compat"` is the published evaluator's.
        weights_path: File of the weights. By default they are downloaded, or read from torch's cache.
        device: Device of the network.

    Raises:
        ValueError: If there is no extractor of that name, or the file does not hold its weights.
        OSError: If the weights cannot be fetched.
    """

    def __init__(
        self, name: str = INCEPTION, weights_path: str | Path | None = None, device: torch.device | str = "cpu"
    ):
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            raise ValueError(f"Feature extractor {name!r} is not one of {', '.join(FEATURE_EXTRACTORS_REGISTRY)}.")
        if weights_path is not None and not Path(weights_path).is_file():
            raise ValueError(f"There is no file {weights_path} of the weights of {name}.")
        self.name = name
        self.device = torch.device(device)
        cls = FEATURE_EXTRACTORS_REGISTRY[name]
        layers = {"pooled": cls.get_default_feature_layer_for_metric("fid")}
        logits = cls.get_default_feature_layer_for_metric("isc")
        if logits != layers["pooled"]:  # where they are the same, it knows no classes
            layers["logits"] = logits
        if "spatial" in cls.get_provided_features_list():
            layers["spatial"] = "spatial"
        self._layers = list(layers)
        path = None if weights_path is None else str(weights_path)
        try:
            with _weights_only():
                network = cls(name, list(layers.values()), feature_extractor_weights_path=path, verbose=False)
        except OSError as error:
            raise OSError(f"The weights of {name} cannot be fetched ({error}): give their file.") from error
        except Exception as error:  # a damaged file raises errors of a dozen types
            raise ValueError(
                f"{weights_path or 'The file in the cache of torch'} holds no weights of {name}: it is damaged, of another"
                " network, or holds code or objects, which are not loaded."
            ) from error
        self.network = network.requires_grad_(False).eval().to(self.device)
        self._spatial: torch.Tensor | None = None
        if name == INCEPTION:
            network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    @property
    def has_logits(self) -> bool:
        """Whether the extractor knows classes."""
        return "logits" in self._layers

    def _keep_spatial(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self._spatial = spatial_features(output)

    @torch.no_grad()
    def __call__(self, images: np.ndarray | torch.Tensor) -> Features:
        """
        Returns the features of images.

        Args:
            images: `(images, height, width, 1 or 3)`, 8-bit. Grey images are repeated to three channels.

        Raises:
            ValueError: If the images have another shape or type.
        """
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(
                f"Images must be 8-bit, (images, height, width, 1 or 3): they are {images.dtype} {tuple(images.shape)}."
            )
        pixels = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).to(self.device)  # (images, 3, height, width)
        features = dict(zip(self._layers, self.network(pixels.contiguous())))
        spatial, self._spatial = self._spatial, None
        return Features(features["pooled"], features.get("spatial", spatial), features.get("logits"))


def spatial_features(maps: torch.Tensor) -> torch.Tensor:
    """Returns the features of sFID: from `(images, channels, height, width)` to `(images, height * width * 7)`."""
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def load_extractor(options: FeatureOptions) -> FeatureExtractor:
    """
    Loads an extractor on the fastest device that it supports.

    Raises:
        ValueError: If there is no extractor of that name, or its weights do not fit.
        OSError: If its weights cannot be downloaded.
    """
    if options.register is not None:
        register_from(options.register)
    # Apple's accelerators have no float64.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return FeatureExtractor(options.feature_extractor, options.feature_extractor_weights, device)


def register_from(path: str | Path) -> None:
    """
    Runs a Python file that registers feature extractors. It can import modules from its own folder, as a script can.

    Raises:
        ValueError: If there is no such file, or it fails.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--register {path}: there is no such file.")
    beside = str(path.resolve().parent)
    sys.path.insert(0, beside)
    try:
        runpy.run_path(str(path))
    except (Exception, SystemExit) as error:  # it is code of the user, which may raise anything
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        place = f" in line {lines[-1]}" if lines else ""
        raise ValueError(f"--register {path} failed{place}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(beside)


@contextlib.contextmanager
def _weights_only():
    """Restricts every `torch.load` to weights."""
    before = os.environ.get("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    try:
        yield
    finally:
        os.environ.pop("TORCH_FORCE_WEIGHTS_ONLY_LOAD")
        if before is not None:
            os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = before
