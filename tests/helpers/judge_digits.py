"""Judges the default model's digits by the independent classifier: `python tests/helpers/judge_digits.py --output figures.json`.

Draws `--images` digits, as many of each class, in each of the four ways of the demo's rows, at 250 DDPM and at 25 DDIM
steps, and counts those that the judge takes for the digit that was asked for. Image i is drawn from seed i. With
`--upsampler` the model's digits are enlarged, in as many steps.
"""

import argparse
import json
from pathlib import Path

import torch
from digit_classifier import load_digit_classifier

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline, default_model
from diffusers_adm.demo import ROWS
from diffusers_adm.evaluation.schedulers import set_scheduler
from diffusers_adm.pipelines.cascade import draw_cascade


@torch.no_grad()
def share_judged_right(
    pipeline: ClassifierGuidedPipeline,
    upsampler: ADMUpsamplePipeline | None,
    images: int,
    batch_size: int,
    condition_unet: bool,
    guidance_scale: float,
) -> float:
    """Share of `images` digits that the judge takes for what they were drawn as."""
    judge = load_digit_classifier()
    hits = []
    for seeds in torch.arange(images).split(batch_size):
        labels = seeds % 10
        generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        shared = {"class_labels": labels, "generator": generators, "output_type": "latent"}
        how = {"guidance_scale": guidance_scale, "condition_unet": condition_unet}
        if upsampler is None:
            drawn = pipeline(**shared, **how).images
        else:
            drawn = draw_cascade([pipeline, upsampler], calls=[how, {}], **shared).images
        hits.append(judge(drawn.clamp(-1, 1)).argmax(dim=1) == labels)
    return torch.cat(hits).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=default_model(), help="Folder of the pipeline.")
    parser.add_argument("--upsampler", default=None, help="Folder of the pipeline that enlarges.")
    parser.add_argument("--images", type=int, default=500)
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--solvers", default="250 DDPM,25 DDIM")
    parser.add_argument("--rows", default="0,1,2,3", help="Which of the demo's rows.")
    parser.add_argument("--output", type=Path, default=None, help="JSON file of the figures.")
    args = parser.parse_args()

    pipeline = ClassifierGuidedPipeline.from_pretrained(args.model)
    upsampler = None if args.upsampler is None else ADMUpsamplePipeline.from_pretrained(args.upsampler)
    stages = [stage for stage in (pipeline, upsampler) if stage is not None]
    stock_schedulers = [stage.scheduler for stage in stages]
    figures = {}
    for solver in args.solvers.split(","):
        steps, kind = solver.split()
        for stage, stock_scheduler in zip(stages, stock_schedulers):
            stage.scheduler = stock_scheduler
            stage.set_progress_bar_config(disable=True)
            set_scheduler(stage, kind)
            stage.register_to_config(num_inference_steps=int(steps))
        for row in args.rows.split(","):
            name, condition_unet, scale = ROWS[int(row)]
            share = share_judged_right(pipeline, upsampler, args.images, args.batch_size, condition_unet, scale)
            figures[f"{solver} steps, {name}"] = share
            print(f"{solver} steps, {name}: {share:.1%} of {args.images} judged right", flush=True)
    if args.output:
        args.output.write_text(json.dumps({"images": args.images, "judged_right": figures}, indent=2) + "\n")


if __name__ == "__main__":
    main()
