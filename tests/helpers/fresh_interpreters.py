"""Code that runs in a fresh interpreter, with this package or without it."""

import os
import subprocess
import sys

import torch


# A user of diffusers alone: this package cannot be imported. Each prints what its image sums up to.
WITHOUT_PACKAGE = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "diffusers_adm":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch
from diffusers import DiffusionPipeline
"""
WITH_PACKAGE = """
import torch
from diffusers import DiffusionPipeline
from diffusers_adm import ADMUNet2DModel, ClassifierGuidedPipeline, NoisyClassifier
"""
DRAW = """
pipe.set_progress_bar_config(disable=True)
image = pipe([1, 2], num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent").images
print("drawn", image.double().sum().item().hex())
"""


def drawn(pipeline):
    generator = torch.Generator().manual_seed(0)
    image = pipeline([1, 2], num_inference_steps=3, generator=generator, output_type="latent").images
    return image.double().sum().item().hex()


def run(code, arguments=(), **environment):
    """Returns the value that a fresh interpreter draws, on as many threads as this process, or its error."""
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment}
    finished = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd="/", env=env, capture_output=True, text=True
    )
    if finished.returncode != 0:
        return finished.stderr.strip().splitlines()[-1]
    return finished.stdout.rsplit("drawn", 1)[1].strip()
