"""Trains an ADM upsampler on labelled images.

The UNet is given the noised image, and the clean image after shrinking by averaging and enlarging (Dhariwal & Nichol 2021, arXiv
2105.05233, appendix A). Losses, moving averages and classes are the same as in the training of a UNet.
"""

from diffusers_adm.training.configuration import parse, run_script
from diffusers_adm.training.options import UpsamplerTrainingOptions


PROGRAM = "python -m diffusers_adm.training.train_upsampler"
EXAMPLES = (
    f"{PROGRAM} --preset upsampler-small-64 --train_data_dir my_images --output_dir runs/upsampler",
    f"{PROGRAM} --preset upsampler-256 --train_data_dir my_images --output_dir runs/upsampler --dry_run",
)


def parse_args(argv: list[str] | None = None) -> UpsamplerTrainingOptions:
    """Parses the options, from the command line or from a list of words."""
    return parse(UpsamplerTrainingOptions, PROGRAM, __doc__, EXAMPLES, argv)


def main(options: UpsamplerTrainingOptions) -> None:
    """
    Trains an upsampler, and saves the pipeline of the averaged weights.

    Raises:
        ValueError: If the options contradict each other or the dataset.
    """
    # Imported here, because the help of the script needs none of it.
    import torch
    import torch.nn.functional as F

    from diffusers_adm import ADMUpsamplePipeline
    from diffusers_adm.data.datasets import required_class_names
    from diffusers_adm.training.denoising import label_conditions, train_pipeline
    from diffusers_adm.training.low_res import draw_low_res, shrink
    from diffusers_adm.training.objective import build_objective, sampling_defaults
    from diffusers_adm.training.plan import print_plan
    from diffusers_adm.training.publishing import check_hub
    from diffusers_adm.training.run_folder import reserved_folder
    from diffusers_adm.training.setup import build_unet, load_training_images, resolve_steps, set_up_accelerator
    from diffusers_adm.training.trainer import Trainer
    from diffusers_adm.training.validation import SampleGrid, as_grid

    accelerator = set_up_accelerator(options)
    with reserved_folder(options, accelerator) as checkpoint:
        class_conditional = options.classes.class_conditional
        with accelerator.main_process_first():
            images, held_out = load_training_images(options, class_conditional)
        resolve_steps(options.optimisation, images.num_images, accelerator.num_processes)
        names = required_class_names(images) if class_conditional else None
        unet = build_unet(options, len(names) if names else None, low_res_conditioning=True)
        if options.dry_run:
            print_plan(options, accelerator, unet, images.num_images, options.averages.num_on_device)
        check_hub(options.hub, accelerator, options.dry_run)

        def conditions(batch: dict) -> dict[str, torch.Tensor]:
            low_res = draw_low_res(batch["image"], options.upsampler)
            return {**label_conditions(options.classes, unet, batch), "low_res": low_res}

        sampling = sampling_defaults(options)
        objective = build_objective(options, sampling["scheduler"], accelerator, conditions)
        trainer = Trainer(options, accelerator, unet, images, options.averages, objective.sampler, checkpoint)
        id2label = dict(enumerate(names)) if names else None
        size = options.upsampler.low_resolution
        pipeline = ADMUpsamplePipeline(unet=unet, id2label=id2label, low_res_size=size, **sampling)

        num_images, batch_size = options.validation.num_validation_images, options.optimisation.train_batch_size
        examples = (images if held_out is None else held_out).examples(num_images)
        low_res = shrink(torch.stack([example["image"] for example in examples]), size)
        low_res = ((low_res + 1) / 2).clamp(0, 1)  # (examples, channels, size, size)

        def inputs(numbers: list[int]) -> dict:
            rows = [i % len(examples) for i in numbers]
            labels = {"class_labels": [examples[row]["label"] for row in rows]} if names else {}
            return {"image": low_res[rows], **labels}

        enlarged = as_grid(pipeline, F.interpolate(low_res, options.format.resolution, mode="nearest"))
        grid = SampleGrid(accelerator, pipeline, inputs, num_images, batch_size, shown=enlarged)
        train_pipeline(options, trainer, objective, pipeline, grid, names, held_out)


if __name__ == "__main__":
    run_script(main, parse_args)
