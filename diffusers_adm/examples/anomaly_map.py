"""Anomaly maps: white spots on digits are found by noising each image in part and drawing it again (Wyatt et al. 2022, AnoDDPM).

The model draws only digits without spots, so that the image that is drawn again differs most at the spot.
"""

import sys

import torch

from diffusers_adm.command_line import run_command
from diffusers_adm.examples.digits import draw, parse_arguments, quiet_pipeline, save_rows, true_digits


def spoilt_digits(images: torch.Tensor, side: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns images with a white square on each, and where a pixel is spoilt by it, both of the shape of `images`."""
    generator, spoilt = torch.Generator().manual_seed(0), images.clone()
    for image in spoilt:
        top, left = torch.randint(4, 28 - side, (2,), generator=generator).tolist()
        image[:, top : top + side, left : left + side] = 1
    return spoilt, (spoilt - images).abs() > 0.5


def drawn_again(
    pipeline, images: torch.Tensor, steps: int, strength: float = 0.4, repeats: int = 4, **call
) -> list[torch.Tensor]:
    """
    Draws noised images again, each time with other noise.

    Args:
        pipeline: Pipeline that draws.
        images: Images in [-1, 1].
        steps: Number of steps of the whole schedule.
        strength: Fraction of the steps that are taken. A larger anomaly needs a higher strength.
        repeats: Number of times.
        call: Other arguments of `draw`.
    """
    call = {"image": (images + 1) / 2, "strength": strength, "num_inference_steps": steps, **call}
    return [draw(pipeline, len(images), seed=1000 * repeat, **call) for repeat in range(repeats)]


def anomaly_map(images: torch.Tensor, again: list[torch.Tensor]) -> torch.Tensor:
    """Returns the mean absolute difference of each pixel from the images that were drawn again, in [0, 2]."""
    return torch.stack([(images - one).abs() for one in again]).mean(dim=0)


def separation(scores: torch.Tensor, is_spoilt: torch.Tensor) -> float:
    """Returns the probability that a spoilt pixel has a larger score than another pixel (the area under the ROC curve)."""
    spoilt, others = scores[is_spoilt], scores[~is_spoilt]
    larger, equal = spoilt[:, None] > others, spoilt[:, None] == others
    return (larger.float() + equal.float() / 2).mean().item()


def main() -> None:
    """Finds the spots on digits, and writes a picture of them."""
    args = parse_arguments("anomaly_map", __doc__, least_steps=3)
    pipeline, whole = quiet_pipeline(ddim=True), true_digits(args.digits)
    spoilt, is_spoilt = spoilt_digits(whole)
    again = drawn_again(pipeline, spoilt, args.steps)
    scores = anomaly_map(spoilt, again)
    print(f"Area under the ROC curve of spoilt pixels: {separation(scores, is_spoilt):.3f}")
    rows = {"whole": whole, "spoilt": spoilt, "drawn again": again[0], "anomaly map": scores - 1}
    save_rows(pipeline, rows, args.output)


if __name__ == "__main__":
    sys.exit(run_command("anomaly_map", main))
