"""Features of images, from torch-fidelity's extractors or from an extractor that you register, and the spatial features of sFID."""

import contextlib
import os
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch_fidelity.registry import FEATURE_EXTRACTORS_REGISTRY

from diffusers_adm.evaluation.feature_options import INCEPTION, FeatureOptions
from diffusers_adm.evaluation.user_files import run_file


# Channels of the network's 192 x 17 x 17 features that sFID uses [Nash et al. 2021, arXiv 2103.03841].
SPATIAL_CHANNELS = 7


@dataclass
class Features:
    """
    Features of images.

    Args:
        pooled: Pooled features, `(images, features)`.
        spatial: Spatial features, `(images, spatial features)`, or `None` if the extractor has none.
        logits: Logits, `(images, classes)`, or `None` if the extractor is not a classifier.
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
    Feature extractor of torch-fidelity, or one that you register with `torch_fidelity.register_feature_extractor`.

    A registered extractor names its layers in the method `get_default_feature_layer_for_metric`: the pooled features for `"fid"`,
    and the logits for `"isc"` if it is a classifier. A layer called `"spatial"` is used for sFID. The spatial features of Inception
    are the first seven channels of the first branch of the fourth block at 17 x 17, flattened in the order rows, columns, channels,
    as in the evaluator of the original code.

    Args:
        name: Name in the registry. The evaluator of the original code uses `"inception-v3-compat"`.
        weights_path: File of the weights. By default, they are downloaded, or read from torch's cache.
        device: Device of the network.

    Raises:
        ValueError: If no extractor has this name, or the file does not hold its weights.
        OSError: If the weights cannot be downloaded.
    """

    def __init__(
        self, name: str = INCEPTION, weights_path: str | Path | None = None, device: torch.device | str = "cpu"
    ):
        if name not in FEATURE_EXTRACTORS_REGISTRY:
            raise ValueError(
                f"The feature extractor must be one of {', '.join(FEATURE_EXTRACTORS_REGISTRY)}, but got {name!r}."
            )
        if weights_path is not None and not Path(weights_path).is_file():
            raise ValueError(f"The file of the weights of {name} does not exist: {weights_path}")
        self.name = name
        self.device = torch.device(device)
        cls = FEATURE_EXTRACTORS_REGISTRY[name]
        layers = {"pooled": cls.get_default_feature_layer_for_metric("fid")}
        logits = cls.get_default_feature_layer_for_metric("isc")
        if logits != layers["pooled"]:  # an extractor that is no classifier names the same layer for both
            layers["logits"] = logits
        if "spatial" in cls.get_provided_features_list():
            layers["spatial"] = "spatial"
        self._layers = list(layers)
        path = None if weights_path is None else str(weights_path)
        try:
            with _weights_only():
                network = cls(name, list(layers.values()), feature_extractor_weights_path=path, verbose=False)
        except OSError as error:
            raise OSError(
                f"The weights of {name} cannot be downloaded ({error}). Pass their file with --feature_extractor_weights."
            ) from error
        except Exception as error:  # a damaged file raises errors of many types
            raise ValueError(
                f"{weights_path or 'The file in the cache of torch'} must hold the weights of {name}, but it is damaged, of another"
                " network, or holds code or objects, which are never loaded."
            ) from error
        self.network = network.requires_grad_(False).eval().to(self.device)
        self._spatial: torch.Tensor | None = None
        if name == INCEPTION:
            network.Mixed_6d.branch1x1.register_forward_hook(self._keep_spatial)

    @property
    def has_logits(self) -> bool:
        """Whether the extractor is a classifier."""
        return "logits" in self._layers

    def _keep_spatial(self, module: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> None:
        self._spatial = spatial_features(output)

    @torch.no_grad()
    def __call__(self, images: np.ndarray | torch.Tensor) -> Features:
        """
        Returns the features of images.

        Args:
            images: 8-bit images, `(images, height, width, 1 or 3)`. Grey images are repeated to three channels.

        Raises:
            ValueError: If the images have another shape or type.
        """
        images = torch.as_tensor(images)
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[3] not in (1, 3):
            raise ValueError(
                f"Images must be uint8, (images, height, width, 1 or 3), but got {images.dtype} {tuple(images.shape)}."
            )
        pixels = images.permute(0, 3, 1, 2).expand(-1, 3, -1, -1).to(self.device)  # (images, 3, height, width)
        features = dict(zip(self._layers, self.network(pixels.contiguous())))
        spatial, self._spatial = self._spatial, None
        return Features(features["pooled"], features.get("spatial", spatial), features.get("logits"))


def spatial_features(maps: torch.Tensor) -> torch.Tensor:
    """Returns the features of sFID, `(images, height * width * 7)`, from feature maps `(images, channels, height, width)`."""
    return maps[:, :SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)


def load_extractor(options: FeatureOptions) -> FeatureExtractor:
    """
    Loads an extractor on the fastest device that it supports.

    Raises:
        ValueError: If no extractor has this name, or its weights do not fit.
        OSError: If its weights cannot be downloaded.
    """
    if options.register is not None:
        run_file(options.register, "--register")
    # Apple's accelerators are not used, because they do not support float64.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return FeatureExtractor(options.feature_extractor, options.feature_extractor_weights, device)


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
