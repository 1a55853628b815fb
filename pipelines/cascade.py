"""Large images in stages: a base model draws small images, and upsamplers enlarge them (Dhariwal & Nichol 2021, arXiv 2105.05233,
section 4.3 and Table 6)."""

import torch
from diffusers import ImagePipelineOutput

from diffusers_adm.pipelines import ADMUpsamplePipeline, ClassifierGuidedPipeline
from diffusers_adm.pipelines.class_labels import known_classes


def draw_cascade(
    stages: list[ClassifierGuidedPipeline | ADMUpsamplePipeline],
    class_labels: int | str | list | torch.Tensor | None = None,
    calls: list[dict] | None = None,
    generator: torch.Generator | list[torch.Generator] | None = None,
    output_type: str = "pil",
) -> ImagePipelineOutput:
    """
    Draws images in all stages, one after the other. All stages use the same generators.

    Args:
        stages: Base pipeline, then one or more upsamplers. Each upsampler enlarges the images of the previous stage.
        class_labels: Class of each image, by number or name, for all stages that have classes. `None` for models without classes. If
            the base model has classes, `None` draws random labels for it, and the upsamplers use their null class, which they must
            have.
        calls: Other arguments of each stage's call, such as its number of steps and guidance scale, or its own `class_labels` and
            `generator`.
        generator: Generator for all images, or a list of one generator per image.
        output_type: Type of the images, see [`ClassifierGuidedPipeline.__call__`].

    Raises:
        ValueError: If a stage cannot follow the previous stage, the number of calls differs from the number of stages, or a call has an
            argument that the cascade sets.
    """
    if not isinstance(stages, (list, tuple)) or len(stages) < 2:
        given = len(stages) if isinstance(stages, (list, tuple)) else type(stages).__name__
        raise ValueError(f"`stages` must be a list of at least two stages (pipelines), but got {given}.")
    if not isinstance(stages[0], ClassifierGuidedPipeline):
        raise ValueError(f"The first stage must be a ClassifierGuidedPipeline, but got {type(stages[0]).__name__}.")
    calls = [{}] * len(stages) if calls is None else calls
    if not isinstance(calls, (list, tuple)) or not all(isinstance(call, dict) for call in calls):
        raise ValueError(f"`calls` must be a list of one dict per stage, but got {calls!r}.")
    if len(calls) != len(stages):
        raise ValueError(f"`calls` must have one dict per stage, {len(stages)}, but got {len(calls)}.")
    for number, call in enumerate(calls):
        taken = {"output_type", "return_dict", "image"} if number else {"output_type", "return_dict"}
        if taken & call.keys():
            raise ValueError(
                f"`calls` must not have {sorted(taken & call.keys())} for stage {number}, because the cascade sets them."
            )
    for before, after in zip(stages, stages[1:]):
        if not isinstance(after, ADMUpsamplePipeline):
            raise ValueError(f"Stages after the first must be ADMUpsamplePipelines, but got a {type(after).__name__}.")
        drawn, taken = before.unet.config, after.unet.config
        if drawn.in_channels != taken.in_channels or drawn.sample_size != after.config.low_res_size:
            raise ValueError(
                f"A stage must draw the images that the next stage enlarges, {taken.in_channels} channels of"
                f" {after.config.low_res_size} pixels, but draws {drawn.in_channels} channels of {drawn.sample_size} pixels."
            )
        if class_labels is None and taken.num_class_embeds is not None and after.unet.null_class is None:
            raise ValueError(
                "`class_labels` are required, because an upsampler has classes and no null class, but got None."
            )
    if class_labels is not None:
        # Names are converted once, because the numbers of the classes must be the same in all stages.
        class_labels = stages[0].class_ids(class_labels)
    images = None
    for number, (stage, call) in enumerate(zip(stages, calls)):
        arguments = {"class_labels": class_labels, "generator": generator, **call}
        if number and known_classes(stage) is None and call.get("guidance_fn") is None and "class_labels" not in call:
            arguments["class_labels"] = None  # this upsampler has no classes
        arguments["output_type"] = output_type if number == len(stages) - 1 else "pt"
        output = stage(**arguments) if images is None else stage(images, **arguments)
        images = output.images
    return output
