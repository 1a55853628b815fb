"""Training of the UNet of a pipeline, shared by the scripts for UNets, upsamplers and consistency models."""

import torch
from diffusers import DiffusionPipeline

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.data.datasets import LabelledImages
from diffusers_adm.losses import drop_labels
from diffusers_adm.training.objective import DenoisingObjective, NoiseLevelObjective
from diffusers_adm.training.options import ClassOptions, PipelineTrainingOptions
from diffusers_adm.training.publishing import BackgroundPush, print_results, publish, write_card
from diffusers_adm.training.setup import build_validation_loader
from diffusers_adm.training.trainer import Trainer
from diffusers_adm.training.validation import HeldOutLoss, RegularPush, SampleGrid, SavedPipelines


def label_conditions(options: ClassOptions, unet: ADMUNet2DModel, batch: dict) -> dict[str, torch.Tensor]:
    """Returns the labels of a batch as argument of the UNet. Dropped labels are replaced by the null class."""
    if not options.class_conditional:
        return {}
    if not options.label_dropout:
        return {"class_labels": batch["label"]}
    return {"class_labels": drop_labels(batch["label"], unet.null_class, options.label_dropout)}


def train_pipeline(
    options: PipelineTrainingOptions,
    trainer: Trainer,
    objective: DenoisingObjective | NoiseLevelObjective,
    pipeline: DiffusionPipeline,
    grid: SampleGrid,
    class_names: list[str] | None,
    held_out: LabelledImages | None,
    num_images: int | None = None,
) -> None:
    """
    Trains the UNet of a pipeline. Saves the pipeline with each moving average, a model card, and sample grids.

    Args:
        options: Options of the run.
        trainer: Trainer of the UNet.
        objective: Objective of the training.
        pipeline: Pipeline of the UNet.
        grid: Validation that draws sample grids.
        class_names: Names of the classes, for the model card.
        held_out: Held-out images, on which losses are computed.
        num_images: Number of training images, for the model card. The default is that of the trainer's dataset.
    """
    accelerator, folder = trainer.accelerator, options.output.output_dir / "pipeline"
    push = BackgroundPush(options.hub, options.output.output_dir)

    def add_card() -> None:
        count = trainer.state.images.num_images if num_images is None else num_images
        facts = (type(pipeline).__name__, count, class_names, trainer.global_step)
        write_card(options, accelerator, folder, *facts)

    saved = SavedPipelines(pipeline)
    validations = [saved]
    if held_out is not None:
        loader = build_validation_loader(held_out, options, accelerator)
        validations.append(HeldOutLoss(objective, loader, options.optimisation.seed))
    validations.append(grid)
    if options.validation.push_every is not None:
        validations.append(RegularPush(options.validation.push_every, saved, push, add_card))

    trainer.train(objective, validations)
    if accelerator.is_main_process and trainer.finished:
        if trainer.began_step == trainer.global_step:  # the pipeline, if any, may be that of a later step
            saved(trainer)
        add_card()
        print_results(options.output.output_dir, folder, type(pipeline).__name__)
        if options.hub.push_to_hub:
            push.finish()
            publish(options.hub, folder, options.output.output_dir)
