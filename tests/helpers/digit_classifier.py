"""An independent judge of drawn digits: a small convolutional network on clean images, trained on MNIST's train split.

`python tests/helpers/digit_classifier.py --dataset_name ylecun/mnist` trains it anew, prints its accuracy on the test split and
writes `digit_classifier.safetensors` beside this file. It shares nothing with the models that it judges.
"""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn


WEIGHTS = Path(__file__).with_name("digit_classifier.safetensors")


class DigitClassifier(nn.Module):
    """Digits of 32x32 pixels in [-1, 1] to logits; `features` gives the 64 numbers before the last layer."""

    def __init__(self):
        super().__init__()
        widths = (1, 16, 32, 64)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                    nn.Conv2d(after, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.ReLU(),
                    nn.MaxPool2d(2),
                )
                for before, after in zip(widths, widths[1:])
            )
        )
        self.head = nn.Linear(64, 10)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        return self.stages[:2](images)  # (batch, 32, 8, 8)

    def pooled(self, maps: torch.Tensor) -> torch.Tensor:
        return self.stages[2](maps).mean(dim=(2, 3))  # (batch, 64)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.pooled(self.maps(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))  # (batch, 10)


def load_digit_classifier() -> DigitClassifier:
    """The trained network, in eval mode."""
    classifier = DigitClassifier()
    classifier.load_state_dict(load_file(WEIGHTS))
    return classifier.eval()


def load_split(dataset_name: str, split: str, column: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split, `(images, height, width[, 3])` in [-1, 1], and their labels, `(images,)`."""
    import numpy as np
    from datasets import load_dataset

    dataset = load_dataset(dataset_name, split=split)
    images = torch.from_numpy(np.stack([np.asarray(image) for image in dataset[column]]))
    return images.float() / 127.5 - 1, torch.tensor(dataset["label"])


def load_digits(dataset_name: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split, `(images, 1, 32, 32)` in [-1, 1], and their labels, `(images,)`."""
    images, labels = load_split(dataset_name, split, "image")  # (images, 28, 28), (images,)
    return F.pad(images[:, None], (2, 2, 2, 2), value=-1.0), labels


@torch.no_grad()
def accuracy(classifier: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images that are classified correctly."""
    hits = [classifier(x).argmax(dim=1) == y for x, y in zip(images.split(500), labels.split(500))]
    return torch.cat(hits).float().mean().item()


def train(dataset_name: str, epochs: int, batch_size: int = 128) -> None:
    torch.manual_seed(0)
    images, labels = load_digits(dataset_name, "train")
    classifier = DigitClassifier()
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=2e-3, weight_decay=1e-2)
    steps = epochs * (len(images) // batch_size)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=steps)
    for epoch in range(epochs):
        for index in torch.randperm(len(images))[: len(images) // batch_size * batch_size].split(batch_size):
            shift = torch.randint(-2, 3, (2,)).tolist()
            loss = F.cross_entropy(classifier(images[index].roll(shift, dims=(2, 3))), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        print(f"epoch {epoch + 1}: loss of the last batch {loss.item():.4f}", flush=True)
    classifier.eval()
    test_images, test_labels = load_digits(dataset_name, "test")
    print(
        f"accuracy on the {len(test_images)} images of the test split: {accuracy(classifier, test_images, test_labels):.4f}"
    )
    save_file(classifier.state_dict(), WEIGHTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_name", default="ylecun/mnist", help="Hub id or local folder of MNIST.")
    parser.add_argument("--epochs", type=int, default=4)
    arguments = parser.parse_args()
    train(arguments.dataset_name, arguments.epochs)
