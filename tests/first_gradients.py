"""Saves the gradients of a classifier's first step, on any number of processes; `test_interruption.py` runs it."""

import sys

from safetensors.torch import save_file
from tiny_models import draw_parameters

from diffusers_adm.losses import classifier_loss
from diffusers_adm.models import NoisyClassifier
from diffusers_adm.training import train_classifier
from diffusers_adm.training.arguments import architecture
from diffusers_adm.training.data import load_images
from diffusers_adm.training.loop import Trainer, start


args = train_classifier.parse_args(sys.argv[2:])
accelerator = start(args)
images, _ = load_images(args)
model = draw_parameters(NoisyClassifier(num_classes=2, **architecture(args))).train()
trainer = Trainer(args, accelerator, model, images)
batch = next(iter(trainer._epoch_loader()))
timestep = 300 * batch["label"] + 100  # of the image, not of the process: the noise would differ
loss = classifier_loss(trainer.model(batch["image"], timestep).logits, batch["label"]).mean()
accelerator.backward(loss)
if accelerator.is_main_process:
    save_file({name: parameter.grad for name, parameter in trainer.unwrapped_model.named_parameters()}, sys.argv[1])
