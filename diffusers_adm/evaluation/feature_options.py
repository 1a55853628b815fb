"""Options of a feature extractor."""

from dataclasses import dataclass

from diffusers_adm.options import at_least, option


INCEPTION = "inception-v3-compat"


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
