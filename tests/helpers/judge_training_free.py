"""Compares training-free guidance by a classifier of clean digits with the noise-aware classifier of the default model.

First train the classifier that guides: `python tests/helpers/digit_target.py`. Then `python tests/helpers/judge_training_free.py
mnist-test.npz --output runs/training-free` draws with the unconditional UNet, DDIM and eta 1, and judges by the independent classifier.
`mnist-test.npz` is the reference of the default model's card. A run that was stopped goes on where it stopped.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from digit_features import NAME

from diffusers_adm.data.options import ImageSetOptions
from diffusers_adm.evaluation.feature_options import FeatureOptions
from diffusers_adm.evaluation.features import load_extractor
from diffusers_adm.evaluation.reference import summarise_reference
from diffusers_adm.evaluation.sampling import draw_samples, load_pipeline
from diffusers_adm.evaluation.schedulers import set_scheduler
from diffusers_adm.evaluation.sweep import PointEvaluator


TARGET = f"{Path(__file__).with_name('digit_target.py')}:guide"
# Guidance scale and options of each row. Without options, the noise-aware classifier guides.
ROWS = {
    "noise-aware classifier, scale 1": (1.0, None),
    "noise-aware classifier, scale 10": (10.0, None),
    "mpgd, scale 1": (1.0, {"method": "mpgd"}),
    "dps, scale 1": (1.0, {"method": "dps"}),
    "lgd, scale 4": (4.0, {"method": "lgd"}),
    "dsg, rate 0.1": (1.0, {"method": "dsg"}),
    "freedom, scale 1": (1.0, {"method": "freedom"}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("reference", help="Reference batch of MNIST's test split.")
    parser.add_argument("--output", type=Path, required=True, help="Folder of the run.")
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    args = parser.parse_args()

    torch.set_num_threads(1)
    pipeline = load_pipeline(None)
    set_scheduler(pipeline, "DDIM")
    extractor = load_extractor(FeatureOptions(NAME))
    evaluate = PointEvaluator(
        summarise_reference(args.reference, extractor, ImageSetOptions()), extractor, judged=True
    )
    print("| guidance | judged right | FD | recall | CPU seconds per image |\n| --- | --- | --- | --- | --- |")
    for name, (scale, options) in ROWS.items():
        call = {"condition_unet": False, "num_inference_steps": args.steps, "eta": 1.0, "guidance_scale": scale}
        if options is not None:
            call |= {"guidance_fn": TARGET, "guidance_options": options}
        folder, start = args.output / name.replace(" ", "_"), time.process_time()
        samples = draw_samples(pipeline, folder, args.images, labels="balanced", call=call)
        taken = folder / "seconds.json"
        if not taken.exists():
            taken.write_text(json.dumps((time.process_time() - start) / args.images))
        metrics = evaluate(samples)["metrics"]
        figures = (metrics["accuracy"], metrics["frechet_distance"], metrics["recall"], json.loads(taken.read_text()))
        row = (form.format(figure) for form, figure in zip(("{:.1%}", "{:.2f}", "{:.3f}", "{:.2f}"), figures))
        print(f"| {name} | {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
