"""Ordinary use shows no warning: neither Python's nor one in the log of diffusers, at the defaults of both."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image


HELPERS = Path(__file__).parent / "helpers"
SAMPLING = """
import torch
from diffusers_adm import ClassifierGuidedPipeline, default_model
from diffusers_adm.solvers import SUPPORTED_SCHEDULERS

pipe = ClassifierGuidedPipeline.from_pretrained(default_model())
pipe.set_progress_bar_config(disable=True)
for scheduler in SUPPORTED_SCHEDULERS:
    settings = {"skip_prk_steps": True} if scheduler.__name__ == "PNDMScheduler" else {}
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **settings)
    pipe(class_labels=[3], num_inference_steps=6)
pipe.to(torch.bfloat16)(class_labels=[3], num_inference_steps=2)
pipe.unet.to(torch.float16)
pipe.save_pretrained("saved", variant="bf16")
ClassifierGuidedPipeline.from_pretrained("saved", variant="bf16", dtype=torch.bfloat16)
"""
TRAINING = """
from diffusers_adm.training.train_unet import main, parse_args

options = "--train_data_dir bars --resolution 16 --in_channels 1 --crop pad --model_channels 8 --channel_mult 1,2 --dropout 0.1"
options += " --layers_per_block 1 --attention_resolutions 8 --attention_head_dim 8 --norm_num_groups 4 --train_batch_size 4"
options += " --mixed_precision bf16 --max_train_steps 10 --ema_decay 0.5 --num_validation_images 2 --output_dir runs/unet"
main(parse_args(options.split()))
"""
EVALUATION = f"""
from diffusers_adm.cli import main

features = ["--feature_extractor", "mnist-digits", "--register", "{HELPERS / "digit_features.py"}"]
assert main("sample --output samples --num_samples 4 --num_inference_steps 2 --scheduler DDIM".split()) == 0
assert main(["make-reference", "samples/samples_4x32x32x1.npz", "reference.npz", *features]) == 0
assert main(["evaluate", "reference.npz", "samples/samples_4x32x32x1.npz", *features]) == 0
"""


def test_ordinary_use_shows_no_warning(tmp_path):
    for name, columns in (("left", slice(0, 8)), ("right", slice(8, 16))):
        (tmp_path / "bars" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.zeros((16, 16), dtype=np.uint8)
            pixels[:, columns] = 255 - number
            Image.fromarray(pixels).save(tmp_path / "bars" / name / f"{number}.png")
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONWARNINGS", "DIFFUSERS_VERBOSITY")
    }
    environment |= {"TQDM_DISABLE": "1", "PYTHONPATH": str(HELPERS), "CUDA_VISIBLE_DEVICES": ""}
    script = SAMPLING + TRAINING + EVALUATION
    finished = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr == ""
