from diffusers_adm.pipelines.pipeline_adm_upsample import ADMUpsamplePipeline
from diffusers_adm.pipelines.pipeline_classifier_guided import ClassifierGuidedPipeline


__all__ = ["ADMUpsamplePipeline", "ClassifierGuidedPipeline"]
