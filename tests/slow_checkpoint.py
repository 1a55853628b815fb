"""Writes a checkpoint for which the main process takes a second; `test_interruption.py` runs it on two."""

import sys
import time
from pathlib import Path

from diffusers_adm.models import NoisyClassifier
from diffusers_adm.training import train_classifier
from diffusers_adm.training.arguments import architecture
from diffusers_adm.training.data import load_images
from diffusers_adm.training.loop import Trainer, start


def write_slowly(models, weights, folder):
    paths = [Path(folder) / f"{number}.partial" for number in range(100)]
    deadline = time.monotonic() + 1
    while time.monotonic() < deadline:  # as what writes under one name and renames
        for path in paths:
            path.touch()
        for path in paths:
            path.unlink()


args = train_classifier.parse_args(sys.argv[1:])
accelerator = start(args)
images, _ = load_images(args)
trainer = Trainer(args, accelerator, NoisyClassifier(num_classes=2, **architecture(args)), images)
if accelerator.is_main_process:
    accelerator.register_save_state_pre_hook(write_slowly)
trainer.save_checkpoint(must_succeed=True)
