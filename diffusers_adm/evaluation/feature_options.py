"""Options of a feature extractor."""

from dataclasses import dataclass

import torch

from diffusers_adm.evaluation.features import INCEPTION, FeatureExtractor, register_from
from diffusers_adm.options import at_least, option


@dataclass(frozen=True)
class FeatureOptions:
    """Feature extractor to load."""

    feature_extractor: str = option(
        INCEPTION, help="Name in torch-fidelity's registry. The default is the published evaluator's."
    )
    feature_extractor_weights: str | None = option(
        None, metavar="FILE", help="File of the extractor's weights, instead of a download."
    )
    register: str | None = option(
        None,
        metavar="FILE",
        help="Python file that registers a feature extractor of your own. The command runs it, so pass only files that you trust.",
    )
    feature_batch_size: int = option(64, help="Number of images per batch of the extractor.", check=at_least(1))


def load_extractor(options: FeatureOptions) -> FeatureExtractor:
    """
    Loads the extractor on the fastest device that it supports.

    Raises:
        ValueError: If there is no extractor of that name, or its weights do not fit.
        OSError: If its weights cannot be downloaded.
    """
    if options.register is not None:
        register_from(options.register)
    # Apple's accelerators have no float64.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return FeatureExtractor(options.feature_extractor, options.feature_extractor_weights, device)
