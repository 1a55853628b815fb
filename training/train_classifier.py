"""Trains the noise-aware classifier that guides sampling.

The loss is the cross-entropy on noised images at uniformly drawn timesteps. The optimizer is AdamW with weight decay, and the learning
rate falls linearly (Dhariwal & Nichol 2021, arXiv 2105.05233, section 4.3 and Table 12).
"""

from diffusers_adm.training.configuration import parse, run_script
from diffusers_adm.training.options import ClassifierTrainingOptions


PROGRAM = "python -m diffusers_adm.training.train_classifier"
EXAMPLES = (
    f"{PROGRAM} --preset classifier-small-64 --train_data_dir my_images --output_dir runs/classifier",
    f"{PROGRAM} --dataset_name ylecun/mnist --in_channels 1 --resolution 32 --num_epochs 10 --output_dir runs/mnist",
)


def parse_args(argv: list[str] | None = None) -> ClassifierTrainingOptions:
    """Parses the options, from the command line or from a list of words."""
    return parse(ClassifierTrainingOptions, PROGRAM, __doc__, EXAMPLES, argv)


def main(options: ClassifierTrainingOptions) -> None:
    """
    Trains a classifier, and saves it.

    Raises:
        ValueError: If the options contradict each other or the dataset.
    """
    # Imported here, because the help of the script needs none of it.
    from diffusers_adm.atomic_files import atomic_folder
    from diffusers_adm.data.datasets import required_class_names
    from diffusers_adm.diffusion import NoiseSchedule
    from diffusers_adm.hub.bundle import save_model
    from diffusers_adm.models import NoisyClassifier
    from diffusers_adm.training.objective import ClassifierObjective, build_noise_scheduler
    from diffusers_adm.training.plan import print_plan
    from diffusers_adm.training.pretrained import save_adapter
    from diffusers_adm.training.publishing import check_hub, print_results, publish, write_card
    from diffusers_adm.training.run_folder import reserved_folder
    from diffusers_adm.training.setup import (
        build_validation_loader,
        load_training_images,
        model_config,
        resolve_steps,
        set_up_accelerator,
    )
    from diffusers_adm.training.trainer import Trainer
    from diffusers_adm.training.validation import HeldOutAccuracy

    accelerator = set_up_accelerator(options)
    with reserved_folder(options, accelerator) as checkpoint:
        with accelerator.main_process_first():
            images, held_out = load_training_images(options)
        optimisation = options.optimisation
        resolve_steps(optimisation, images.num_images, accelerator.num_processes)
        names = required_class_names(images)
        noise = build_noise_scheduler(options.diffusion).config
        classifier = NoisyClassifier(
            num_classes=len(names),
            pool=options.classifier.pool,
            num_train_timesteps=noise.num_train_timesteps,
            beta_schedule=noise.beta_schedule,
            id2label=dict(enumerate(names)),
            **model_config(options.architecture, options.format),
        )
        if options.dry_run:
            print_plan(options, accelerator, classifier, images.num_images)
        check_hub(options.hub, accelerator, options.dry_run)

        schedule = NoiseSchedule.from_config(noise).to(accelerator.device)
        objective = ClassifierObjective(schedule, options.classifier.entropy_weight)
        trainer = Trainer(options, accelerator, classifier, images, checkpoint=checkpoint)
        validations = []
        if held_out is not None:
            loader = build_validation_loader(held_out, options, accelerator)
            validations.append(HeldOutAccuracy(objective, loader, optimisation.seed))
        trainer.train(objective, validations)

        if accelerator.is_main_process and trainer.finished:
            folder = options.output.output_dir / "classifier"
            with atomic_folder(folder) as partial:
                save_model(classifier, partial)
                save_adapter(classifier, partial)
            facts = (type(classifier).__name__, images.num_images, names, trainer.global_step)
            write_card(options, accelerator, folder, *facts)
            print_results(options.output.output_dir, folder, type(classifier).__name__)
            if options.hub.push_to_hub:
                publish(options.hub, folder, options.output.output_dir)


if __name__ == "__main__":
    run_script(main, parse_args)
