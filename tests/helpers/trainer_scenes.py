"""Scenes that whole trainings seldom meet, played by the trainer of a classifier.

`test_interruption.py` runs the scene of the first argument on any number of processes.
"""

import os
import signal
import sys
import time
from pathlib import Path

from safetensors.torch import save_file
from tiny_models import draw_parameters

from diffusers_adm.losses import classifier_loss
from diffusers_adm.models import NoisyClassifier
from diffusers_adm.training import train_classifier
from diffusers_adm.training.checkpointing import find_checkpoint
from diffusers_adm.training.objective import LossTerms
from diffusers_adm.training.setup import load_training_images, model_config, set_up_accelerator
from diffusers_adm.training.trainer import Trainer


def objective(model, batch):
    timestep = 300 * batch["label"] + 100  # of the image, not of the process: the noise would differ
    return LossTerms(classifier_loss(model(batch["image"], timestep).logits, batch["label"]), {}, timestep)


def first_gradients(trainer):
    """Saves the gradients of the first step."""
    loss = objective(trainer.model, next(trainer.batches())).loss.mean()
    trainer.accelerator.backward(loss)
    gradients = {name: parameter.grad for name, parameter in trainer.unwrapped_model.named_parameters()}
    if trainer.accelerator.is_main_process:
        trainer.options.output.output_dir.mkdir()
        save_file(gradients, trainer.options.output.output_dir / "gradients.safetensors")


def slow_checkpoint(trainer):
    """Writes a checkpoint for which the main process takes a second."""

    def write_slowly(models, weights, folder):
        paths = [Path(folder) / f"{number}.partial" for number in range(100)]
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:  # as what writes under one name and renames
            for path in paths:
                path.touch()
            for path in paths:
                path.unlink()

    if trainer.accelerator.is_main_process:
        trainer.accelerator.register_save_state_pre_hook(write_slowly)
    trainer.save_checkpoint(must_succeed=True)


def stopped_while_validating(trainer):
    """Only the last process is asked to stop. All processes must treat the run as unfinished."""

    def validate(trainer):
        if trainer.accelerator.is_last_process:
            os.kill(os.getpid(), signal.SIGTERM)

    trainer.train(objective, [validate])
    assert trainer.global_step == 1 and not trainer.finished


def own_disks(trainer):
    """Only the first process has a checkpoint in its folder. All processes must resume from it."""
    assert trainer.global_step == 1


if __name__ == "__main__":
    scene = globals()[sys.argv[1]]
    options = train_classifier.parse_args(sys.argv[2:])
    accelerator = set_up_accelerator(options)
    if scene is own_disks:
        options.output.output_dir /= str(accelerator.process_index)
    images, _ = load_training_images(options)
    model = draw_parameters(
        NoisyClassifier(num_classes=2, **model_config(options.architecture, options.format))
    ).train()
    checkpoint = find_checkpoint(options.output, accelerator)
    scene(Trainer(options, accelerator, model, images, checkpoint=checkpoint))
    accelerator.end_training()  # ends the group of processes, which could abort the last one otherwise
