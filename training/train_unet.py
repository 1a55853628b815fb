"""Trains an ADM UNet on labelled images.

The loss is the hybrid loss of Nichol & Dhariwal 2021 (arXiv 2102.09672), and the weights are averaged at constant rates. With
`--label_dropout`, the UNet also learns a null class, so that one UNet is both the conditional and the unconditional model. With
`--preconditioning edm`, the UNet is given the noise level, and the loss is that of Karras et al. 2022 (arXiv 2206.00364).
"""

from diffusers_adm.training.configuration import parse, run_script
from diffusers_adm.training.options import UNetTrainingOptions


PROGRAM = "python -m diffusers_adm.training.train_unet"
EXAMPLES = (
    f"{PROGRAM} --preset small-64 --train_data_dir my_images --output_dir runs/unet",
    f"{PROGRAM} --config runs/unet/checkpoint-5000/options.yaml --resume_from_checkpoint latest",
)


def parse_args(argv: list[str] | None = None) -> UNetTrainingOptions:
    """Parses the options, from the command line or from a list of words."""
    return parse(UNetTrainingOptions, PROGRAM, __doc__, EXAMPLES, argv)


def main(options: UNetTrainingOptions) -> None:
    """
    Trains a UNet, and saves the pipeline of the averaged weights.

    Raises:
        ValueError: If the options contradict each other or the dataset.
    """
    # Imported here, because the help of the script needs none of it.
    from diffusers_adm import ClassifierGuidedPipeline
    from diffusers_adm.data.datasets import required_class_names
    from diffusers_adm.training.denoising import label_conditions, train_pipeline
    from diffusers_adm.training.objective import build_objective, sampling_defaults
    from diffusers_adm.training.plan import print_plan
    from diffusers_adm.training.publishing import check_hub
    from diffusers_adm.training.run_folder import reserved_folder
    from diffusers_adm.training.setup import build_unet, load_training_images, resolve_steps, set_up_accelerator
    from diffusers_adm.training.trainer import Trainer
    from diffusers_adm.training.validation import SampleGrid

    accelerator = set_up_accelerator(options)
    with reserved_folder(options, accelerator) as checkpoint:
        class_conditional = options.classes.class_conditional
        with accelerator.main_process_first():
            images, held_out = load_training_images(options, class_conditional)
        resolve_steps(options.optimisation, images.num_images, accelerator.num_processes)
        names = required_class_names(images) if class_conditional else None
        unet = build_unet(options, len(names) if names else None)
        if options.dry_run:
            print_plan(options, accelerator, unet, images.num_images, options.averages.num_on_device)
        check_hub(options.hub, accelerator, options.dry_run)

        sampling = sampling_defaults(options)
        objective = build_objective(
            options, sampling["scheduler"], accelerator, lambda batch: label_conditions(options.classes, unet, batch)
        )
        trainer = Trainer(options, accelerator, unet, images, options.averages, objective.sampler, checkpoint)
        id2label = dict(enumerate(names)) if names else None
        pipeline = ClassifierGuidedPipeline(unet=unet, id2label=id2label, **sampling)

        def inputs(numbers: list[int]) -> dict:
            return {"class_labels": [i % len(names) for i in numbers]} if names else {"batch_size": len(numbers)}

        num_images, batch_size = options.validation.num_validation_images, options.optimisation.train_batch_size
        grid = SampleGrid(accelerator, pipeline, inputs, num_images, batch_size)
        train_pipeline(options, trainer, objective, pipeline, grid, names, held_out)


if __name__ == "__main__":
    run_script(main, parse_args)
