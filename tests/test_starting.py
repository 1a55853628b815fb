"""Imports are late: help comes without torch, and still diffusers finds the models after `import diffusers_adm`."""

import pickle
import subprocess
import sys

import pytest
from documents import ROOT

import diffusers_adm
from diffusers_adm.cli import COMMANDS


SLOW = {"accelerate", "datasets", "diffusers", "numpy", "torch", "torchvision", "transformers"}
SCRIPTS = [f"diffusers_adm.training.train_{kind}" for kind in ("unet", "classifier", "upsampler")]
HELP = """
import runpy, sys
module, *sys.argv[1:] = sys.argv[1:]
try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
except SystemExit as exited:
    assert not exited.code
print("imported:", *(name for name in sys.modules if "." not in name))
"""


def run_python(code: str, *words: str) -> str:
    done = subprocess.run([sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "words",
    [
        ["diffusers_adm.cli", "--help"],
        *(["diffusers_adm.cli", command, "--help"] for command in COMMANDS),
        *([script, "--help"] for script in SCRIPTS),
    ],
    ids=" ".join,
)
def test_help_imports_no_slow_package(words):
    text, _, imported = run_python(HELP, *words).partition("imported:")
    assert text.startswith("usage: ") and not SLOW & set(imported.split())


def test_released_checkpoints_are_listed_without_a_slow_package():
    code = "import sys; from diffusers_adm.cli import main\nassert main(['released']) == 0\nprint('imported:', *sys.modules)"
    text, _, imported = run_python(code).partition("imported:")
    assert "imagenet-256" in text and not SLOW & set(imported.split())


def test_wrong_options_are_refused_before_anything_slow_is_imported():
    code = "import sys; from diffusers_adm.cli import main\nassert main(['convert', '--output', 'x']) == 2\nprint(*sys.modules)"
    assert not SLOW & set(run_python(code).split())


@pytest.mark.parametrize(
    "code",
    [
        # `inspect`, which torch itself uses while it is imported, looks at all modules.
        "import inspect, torch; inspect.getmodule(torch.nn.Linear); assert 'diffusers_adm.models' not in sys.modules",
        "assert sys.modules['diffusers_adm.models.unet_adm'].ADMUNet2DModel is diffusers_adm.ADMUNet2DModel",
        "import diffusers_adm.models.unet_adm as module; assert module is diffusers_adm.models.unet_adm",
        "assert 'ADMUNet2DModel' in dir(sys.modules['diffusers_adm.models.unet_adm'])",
        "assert diffusers_adm.guidance.GuidanceOptions().every == 1",
        "assert not hasattr(diffusers_adm, 'nothing') and not hasattr(diffusers_adm.models.unet_adm, 'nothing')",
        "assert sorted(diffusers_adm.__all__) == sorted(set(dir(diffusers_adm)) & set(diffusers_adm.__all__))",
        "from diffusers_adm import *; assert ClassifierGuidedPipeline.__module__.startswith('diffusers_adm.pipelines')",
        f"import pickle; assert pickle.loads({pickle.dumps(diffusers_adm.NoisyClassifier)!r}).__name__ == 'NoisyClassifier'",
        # Several threads that need a model at once, each in another way.
        "from concurrent.futures import ThreadPoolExecutor\n"
        "ways = [lambda: sys.modules['diffusers_adm.models.unet_adm'].ADMUNet2DModel, lambda: diffusers_adm.ADMUNet2DModel,\n"
        "        lambda: __import__('diffusers_adm.models.unet_adm').models.ADMUNet2DModel]\n"
        "with ThreadPoolExecutor(6) as pool:\n"
        "    assert len({future.result() for future in [pool.submit(way) for way in ways * 2]}) == 1",
    ],
)
def test_names_are_there_when_they_are_used(code):
    run_python(f"import sys, diffusers_adm\nassert 'torch' not in sys.modules\n{code}")
