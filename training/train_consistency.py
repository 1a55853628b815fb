"""Trains a consistency model, which draws in one or two steps.

Training starts from a trained UNet, by consistency tuning (Geng et al. 2024, arXiv 2406.14548). With a teacher, the model learns where
the teacher's guided steps lead. Sampling then needs neither guidance nor a classifier.
"""

from diffusers_adm.training.configuration import parse, run_script
from diffusers_adm.training.consistency_options import ConsistencyTrainingOptions


PROGRAM = "python -m diffusers_adm.training.train_consistency"
EXAMPLES = (
    f"{PROGRAM} --pretrained_model_name_or_path runs/unet/pipeline --train_data_dir my_images"
    " --max_train_steps 20000 --output_dir runs/consistency",
    f"{PROGRAM} --pretrained_model_name_or_path my-model --teacher_model_name_or_path my-model"
    " --guidance_scale 1 --train_data_dir my_images --max_train_steps 20000 --output_dir runs/consistency",
)


def parse_args(argv: list[str] | None = None) -> ConsistencyTrainingOptions:
    """Parses the options, from the command line or from a list of words."""
    return parse(ConsistencyTrainingOptions, PROGRAM, __doc__, EXAMPLES, argv)


def main(options: ConsistencyTrainingOptions) -> None:
    """
    Trains a consistency model, and saves the pipeline of the averaged weights.

    Raises:
        ValueError: If the options contradict each other, the dataset or the teacher.
    """
    # Imported here, because the help of the script needs none of it.
    from diffusers_adm.data.datasets import required_class_names
    from diffusers_adm.training.consistency import (
        ConsistencyObjective,
        StoredPathObjective,
        Teacher,
        build_consistency_unet,
        consistency_pipeline,
    )
    from diffusers_adm.training.denoising import label_conditions, train_pipeline
    from diffusers_adm.training.plan import print_plan
    from diffusers_adm.training.pretrained import check_pretrained
    from diffusers_adm.training.publishing import check_hub
    from diffusers_adm.training.run_folder import reserved_folder
    from diffusers_adm.training.setup import load_training_images, resolve_steps, set_up_accelerator
    from diffusers_adm.training.teacher_paths import stored_paths
    from diffusers_adm.training.trainer import Trainer
    from diffusers_adm.training.validation import SampleGrid

    accelerator = set_up_accelerator(options)
    with reserved_folder(options, accelerator) as checkpoint:
        class_conditional = options.classes.class_conditional
        with accelerator.main_process_first():
            images, held_out = load_training_images(options, class_conditional)
        names = required_class_names(images) if class_conditional else None
        unet = build_consistency_unet(options, len(names) if names else None)
        pipeline = consistency_pipeline(options, unet, names)
        teacher = None
        if options.teacher.teacher_model_name_or_path is not None:
            teacher = Teacher(options, images, accelerator)
            options.teacher.guidance_scale = teacher.guidance_scale
        num_images = images.num_images
        check_hub(options.hub, accelerator, options.dry_run)
        stored = options.teacher.num_paths is not None
        if stored:
            if checkpoint is None:  # before hours of drawing
                check_pretrained(unet, options.architecture)
            images, held_out = stored_paths(options, images, held_out, teacher, accelerator)
            teacher = None  # not needed any more
        resolve_steps(options.optimisation, images.num_images, accelerator.num_processes)
        if options.consistency.closer_every is None and not stored:
            options.consistency.closer_every = -(-options.optimisation.max_train_steps // 8)
        if options.dry_run:
            evaluations = 1 if stored else options.teacher.teacher_steps
            print_plan(options, accelerator, unet, images.num_images, options.averages.num_on_device, evaluations)

        trainer = Trainer(options, accelerator, unet, images, options.averages, checkpoint=checkpoint)

        def conditions(batch: dict) -> dict:
            return label_conditions(options.classes, unet, batch)

        if stored:
            objective = StoredPathObjective(options, conditions)
        else:
            objective = ConsistencyObjective(options, conditions, lambda: trainer.global_step, teacher)

        def inputs(numbers: list[int]) -> dict:
            return {"class_labels": [i % len(names) for i in numbers]} if names else {"batch_size": len(numbers)}

        num_samples, batch_size = options.validation.num_validation_images, options.optimisation.train_batch_size
        grid = SampleGrid(accelerator, pipeline, inputs, num_samples, batch_size)
        train_pipeline(options, trainer, objective, pipeline, grid, names, held_out, num_images)


if __name__ == "__main__":
    run_script(main, parse_args)
