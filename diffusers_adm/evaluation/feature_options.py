"""Options of a feature extractor."""

from dataclasses import dataclass

from diffusers_adm.options import at_least, option


INCEPTION = "inception-v3-compat"


@dataclass(frozen=True)
class FeatureOptions:
    """Feature extractor to load."""

    feature_extractor: str = option(
        INCEPTION,
        metavar="NAME",
        help="Feature extractor, by its name in torch-fidelity's registry. The default is that of the published evaluator.",
    )
    feature_extractor_weights: str | None = option(
        None, metavar="FILE", help="File of the weights of the feature extractor.", unset="they are downloaded"
    )
    register: str | None = option(
        None,
        metavar="FILE",
        help="Python file that registers a feature extractor of your own. The command runs it, so pass only files that you trust.",
    )
    feature_batch_size: int = option(64, help="Number of images per batch of the extractor.", check=at_least(1))
