"""A classifier of clean digits that guides, and that shares nothing with the judge: other layers, and trained from another seed.

`python tests/helpers/digit_target.py` trains it in about a minute. Then `--guidance_fn tests/helpers/digit_target.py:guide` of `sample`
and `sweep` guides by it.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from digit_classifier import accuracy, load_digits
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_adm.guidance import CleanClassifierGuidance


WEIGHTS = Path("runs/digit_target.safetensors")


def build_target() -> nn.Module:
    """Digits of 32x32 pixels in [-1, 1] to logits, without weights of its own yet."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.SiLU(),
        nn.Conv2d(16, 32, 5, stride=2, padding=2),
        nn.SiLU(),
        nn.Flatten(),
        nn.Dropout(0.25),
        nn.Linear(32 * 8 * 8, 10),
    )


def guide(pipeline) -> CleanClassifierGuidance:
    """Guidance by the trained network."""
    target = build_target()
    target.load_state_dict(load_file(WEIGHTS))
    target.eval()
    return CleanClassifierGuidance(lambda pixels: target(2 * pixels - 1))


def train(dataset_name: str, epochs: int, batch_size: int = 128) -> None:
    """Trains the network on MNIST's train split, and writes its weights."""
    torch.manual_seed(1)
    images, labels = load_digits(dataset_name, "train")
    target = build_target()
    steps = epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(target.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps)
    for _ in range(epochs):
        for index in torch.randperm(len(images))[: len(images) // batch_size * batch_size].split(batch_size):
            loss = F.cross_entropy(target(images[index]), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    target.eval()
    print(f"accuracy on the test split: {accuracy(target, *load_digits(dataset_name, 'test')):.4f}")
    WEIGHTS.parent.mkdir(exist_ok=True)
    save_file(target.state_dict(), WEIGHTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_name", default="ylecun/mnist", help="Hub id or local folder of MNIST.")
    parser.add_argument("--epochs", type=int, default=3)
    arguments = parser.parse_args()
    train(arguments.dataset_name, arguments.epochs)
