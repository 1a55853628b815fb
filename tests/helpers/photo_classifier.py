"""An independent judge of small photographs: a convolutional network on clean images, trained on CIFAR-10's train split.

`python tests/helpers/photo_classifier.py` trains it anew, prints its accuracy on the test split and writes
`photo_classifier.safetensors` beside this file, in half precision. It shares nothing with the models that it judges. `--state FILE`
keeps the state after each epoch, and an interrupted training goes on from there.

The first layer whitens patches of 3x3 pixels and is not trained. This and the shape of the network follow Jordan 2024
(arXiv 2404.00498).
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from digit_classifier import accuracy, load_split
from safetensors.torch import load_file, save_file
from torch import nn


WEIGHTS = Path(__file__).with_name("photo_classifier.safetensors")
WIDTHS = (64, 192, 256)
PATCH = 3
BATCH_SIZE = 250
LEARNING_RATE = 0.2
WEIGHT_DECAY = 5e-4
MEAN_OVER = 500  # steps that the average of the weights remembers


class PhotoClassifier(nn.Module):
    """Photographs of 32x32 pixels in [-1, 1] to logits; `features` gives the 256 numbers before the last layer."""

    def __init__(self):
        super().__init__()
        values = 3 * PATCH**2
        self.whiten = nn.Conv2d(3, 2 * values, PATCH, padding=1, bias=False).requires_grad_(False)
        widths = (2 * values, *WIDTHS)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(
                    nn.Conv2d(before, after, 3, padding=1, bias=False),
                    nn.MaxPool2d(2),
                    nn.BatchNorm2d(after),
                    nn.GELU(),
                    nn.Conv2d(after, after, 3, padding=1, bias=False),
                    nn.BatchNorm2d(after),
                    nn.GELU(),
                )
                for before, after in zip(widths, widths[1:])
            )
        )
        self.head = nn.Linear(WIDTHS[-1], 10)

    def maps(self, images: torch.Tensor) -> torch.Tensor:
        return self.stages[:2](F.gelu(self.whiten(images)))  # (batch, 192, 8, 8)

    def pooled(self, maps: torch.Tensor) -> torch.Tensor:
        return self.stages[2](maps).amax(dim=(2, 3))  # (batch, 256)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        return self.pooled(self.maps(images))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(self.features(images))  # (batch, 10)


@torch.no_grad()
def set_whitening(classifier: PhotoClassifier, images: torch.Tensor) -> None:
    """Makes the first layer project patches onto the eigenvectors of their covariance and their negatives, scaled to variance 1."""
    patches = images.unfold(2, PATCH, 1).unfold(3, PATCH, 1).permute(0, 2, 3, 1, 4, 5).flatten(0, 2).flatten(1)
    variances, vectors = torch.linalg.eigh(torch.cov(patches.double().T))
    rows = (vectors / (variances + 1e-3).sqrt()).T.reshape(-1, 3, PATCH, PATCH).float()
    classifier.whiten.weight.copy_(torch.cat([rows, -rows]))


def load_photo_classifier() -> PhotoClassifier:
    """The trained network, in eval mode."""
    if not WEIGHTS.exists():
        raise FileNotFoundError(
            f"{WEIGHTS} does not exist. Run `python tests/helpers/photo_classifier.py` to train the classifier."
        )
    classifier = PhotoClassifier()
    classifier.load_state_dict(load_file(WEIGHTS))
    return classifier.eval()


def load_photos(dataset_name: str, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    """All images of a split, `(images, 3, 32, 32)` in [-1, 1], and their labels, `(images,)`."""
    images, labels = load_split(dataset_name, split, "img")  # (images, 32, 32, 3), (images,)
    return images.permute(0, 3, 1, 2), labels


def augmented(images: torch.Tensor) -> torch.Tensor:
    """The images, each flipped or not, and moved by up to 2 pixels, with reflected edges."""
    count, size = len(images), images.shape[-1]
    images = torch.where(torch.rand(count, 1, 1, 1) < 0.5, images, images.flip(-1))
    padded = F.pad(images, (2, 2, 2, 2), mode="reflect")
    rows = torch.randint(0, 5, (count, 1)) + torch.arange(size)  # (images, 32)
    columns = torch.randint(0, 5, (count, 1)) + torch.arange(size)  # (images, 32)
    numbers = torch.arange(count)[:, None, None]
    return padded.permute(0, 2, 3, 1)[numbers, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def train(dataset_name: str, epochs: int, state: Path | None) -> None:
    torch.manual_seed(0)
    images, labels = load_photos(dataset_name, "train")
    test_images, test_labels = load_photos(dataset_name, "test")
    classifier = PhotoClassifier().to(memory_format=torch.channels_last)
    set_whitening(classifier, images[:5000])
    average = copy.deepcopy(classifier)
    parameters = [parameter for parameter in classifier.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, LEARNING_RATE, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY)
    steps = epochs * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.2, anneal_strategy="linear", cycle_momentum=False
    )
    parts = {"classifier": classifier, "average": average, "optimizer": optimizer, "schedule": schedule}
    begun = 0
    if state is not None and state.exists():
        found = torch.load(state, weights_only=True)
        begun = found["epoch"]
        torch.set_rng_state(found["random"])
        for name, part in parts.items():
            part.load_state_dict(found[name])
    for epoch in range(begun, epochs):
        for index in torch.randperm(len(images)).split(BATCH_SIZE):
            x = augmented(images[index]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = classifier(x)
            loss = F.cross_entropy(logits.float(), labels[index], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for mean, value in zip(average.state_dict().values(), classifier.state_dict().values()):
                    if mean.is_floating_point():
                        mean.lerp_(value, 1 / MEAN_OVER)
        average.eval()
        share = accuracy(average, test_images[:2000], test_labels[:2000])
        print(f"epoch {epoch + 1}: loss {loss.item():.4f}, accuracy on 2000 test images {share:.4f}", flush=True)
        if state is not None:
            kept = {name: part.state_dict() for name, part in parts.items()}
            torch.save({**kept, "epoch": epoch + 1, "random": torch.get_rng_state()}, state.with_suffix(".part"))
            state.with_suffix(".part").rename(state)
    average.half().float()  # judged as it is stored
    share = accuracy(average, test_images, test_labels)
    print(f"accuracy on the {len(test_images)} images of the test split: {share:.4f}")
    save_file({name: tensor.half().contiguous() for name, tensor in average.state_dict().items()}, WEIGHTS)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset_name", default="uoft-cs/cifar10", help="Hub id or local folder of CIFAR-10.")
    parser.add_argument("--epochs", type=int, default=14)
    parser.add_argument("--state", type=Path, default=None, help="File that keeps the state after each epoch.")
    arguments = parser.parse_args()
    train(arguments.dataset_name, arguments.epochs, arguments.state)
