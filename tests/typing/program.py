"""Program of a user. pyright checks that the public names have types, and the right ones: `make quality`. It is never run."""

from typing import assert_type

import torch
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.schedulers.scheduling_ddim import DDIMScheduler

from diffusers_adm import (
    ADMUNet2DModel,
    ADMUpsamplePipeline,
    ClassifierGuidedPipeline,
    NoisyClassifier,
    default_cascade,
    default_consistency_model,
    default_model,
    default_photo_consistency_model,
    default_photo_model,
)
from diffusers_adm.diffusion import NoiseSchedule, Prediction, renoise
from diffusers_adm.evaluation.statistics import GaussianStatistics, frechet_distance
from diffusers_adm.guidance import GuidanceOptions, classifier_gradient
from diffusers_adm.losses import HybridLoss, hybrid_loss
from diffusers_adm.models import ADMUNet2DOutput, NoisyClassifierOutput
from diffusers_adm.pipelines.cascade import draw_cascade
from diffusers_adm.pipelines.sampling_steps import SamplingStep
from diffusers_adm.respacing import respaced_timesteps


images, timestep = torch.randn(1, 1, 32, 32), torch.tensor([500])

assert_type(default_model(), str)
assert_type(default_cascade(), tuple[str, str])
assert_type(default_consistency_model(), str)
assert_type(default_photo_model(), str)
assert_type(default_photo_consistency_model(), str)

# Loading.
pipe = ClassifierGuidedPipeline.from_pretrained(default_model(), dtype=torch.float16)
assert_type(pipe, ClassifierGuidedPipeline)
upsample = ADMUpsamplePipeline.from_pretrained(default_cascade()[1])
assert_type(upsample, ADMUpsamplePipeline)
assert_type(ClassifierGuidedPipeline.from_openai("unet.pt", "classifier.pt"), ClassifierGuidedPipeline)
assert_type(ADMUpsamplePipeline.from_openai("upsampler.pt"), ADMUpsamplePipeline)
unet = ADMUNet2DModel.from_openai("unet.pt", dtype=torch.float16)
assert_type(unet, ADMUNet2DModel)
classifier = NoisyClassifier.from_openai("classifier.pt")
assert_type(classifier, NoisyClassifier)
assert_type(unet.to_openai_state_dict(), dict[str, torch.Tensor])

# Sampling.
options = GuidanceOptions(interval=(0.28, 2.9), entropy_scaling=True)
output = pipe(class_labels=[1, "two"], guidance_scale=[1.0, 2.0], guidance_options=options)
assert_type(output, ImagePipelineOutput | tuple)
pipe(class_labels=3, guidance_scale=1, generator=[torch.Generator().manual_seed(0)], return_dict=False)
upsample("small.png", class_labels=[7])
for step in pipe.steps(class_labels=[1, "two"], guidance_scale=[1.0, 2.0], output_type="pt"):
    assert_type(step, SamplingStep)
    assert_type(step.log_probabilities, torch.Tensor | None)
upsample.steps("small.png", 7).close()
pipe(no_such_argument=1)  # pyright: ignore[reportCallIssue]
pipe.steps(no_such_argument=1)  # pyright: ignore[reportCallIssue]
draw_cascade([pipe, upsample], [7], [{"guidance_scale": 1.0}, {"num_inference_steps": 25}])
assert_type(pipe.class_ids(["2", 3]), list[int])
assert_type(pipe.label2id, dict[str, list[int]])
assert_type(pipe.invert(images), torch.Tensor)


def brighter(
    x_t: torch.Tensor, timestep: torch.Tensor, x_0: torch.Tensor, class_labels: torch.Tensor | None
) -> torch.Tensor:
    return 100 * x_0.mean(dim=(1, 2, 3))


pipe(class_labels=[3], guidance_fn=brighter)

# Predictions and networks.
prediction = pipe.predict(images, 500, class_labels=[3])
assert_type(prediction, Prediction)
assert_type(prediction.x_0_clipped, torch.Tensor)
assert_type(unet.forward(images, timestep), ADMUNet2DOutput | tuple[torch.Tensor])
assert_type(classifier.forward(images, timestep), NoisyClassifierOutput | tuple[torch.Tensor])
assert_type(classifier_gradient(classifier, images, timestep, timestep), torch.Tensor)

# Maths.
schedule = NoiseSchedule.from_config({"beta_schedule": "linear"}).to("cpu")
assert_type(schedule, NoiseSchedule)
assert_type(respaced_timesteps("ddim25", 1000), list[int])
assert_type(renoise(schedule, images, 3, 9, images), torch.Tensor)
assert_type(hybrid_loss(images, schedule, images, images, timestep, images), HybridLoss)
statistics = GaussianStatistics(torch.zeros(2).numpy(), torch.eye(2).numpy())
assert_type(frechet_distance(statistics, statistics), float)
pipe.scheduler = DDIMScheduler()
