"""Evaluation: sampling of many images, the metrics of the paper, and likelihood. Most modules require the extra `[eval]`."""

from diffusers_adm.lazy_modules import lazy_attributes


# Names are imported at their first use, because sampling works without the packages of the extra.
_MODULES = {
    "DatasetImages": "diffusers_adm.data.image_sets",
    "NpzImages": "diffusers_adm.data.npz_images",
    "FeatureExtractor": "diffusers_adm.evaluation.features",
    "variational_bound": "diffusers_adm.evaluation.likelihood",
    "compare": "diffusers_adm.evaluation.metrics",
    "inception_score": "diffusers_adm.evaluation.metrics",
    "summarise": "diffusers_adm.evaluation.metrics",
    "precision_and_recall": "diffusers_adm.evaluation.precision_recall",
    "summarise_reference": "diffusers_adm.evaluation.reference",
    "draw_samples": "diffusers_adm.evaluation.sampling",
    "search_steps": "diffusers_adm.evaluation.step_search",
    "GaussianStatistics": "diffusers_adm.evaluation.statistics",
    "RunningStatistics": "diffusers_adm.evaluation.statistics",
    "frechet_distance": "diffusers_adm.evaluation.statistics",
}
__all__ = list(_MODULES)
__getattr__, __dir__ = lazy_attributes(__name__, _MODULES)
