"""Packaging of diffusers_adm: `pipelines/`, `training/` and `model_cards/` are subpackages that live at the top level."""

import re
from pathlib import Path

from setuptools import find_packages, setup


ROOT = Path(__file__).parent
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "diffusers_adm" / "__init__.py").read_text(), re.MULTILINE)[1]

setup(
    name="diffusers-adm",
    version=VERSION,
    description="ADM and classifier guidance (Dhariwal & Nichol 2021) for diffusers",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[
        *find_packages(include=["diffusers_adm*"]),
        "diffusers_adm.pipelines",
        "diffusers_adm.training",
        "diffusers_adm.model_cards",
    ],
    package_dir={
        "diffusers_adm": "diffusers_adm",
        "diffusers_adm.pipelines": "pipelines",
        "diffusers_adm.training": "training",
        "diffusers_adm.model_cards": "model_cards",
    },
    package_data={"diffusers_adm.model_cards": ["*/*", "*/*/*"], "diffusers_adm.training": ["presets/*.yaml"]},
    install_requires=[
        "accelerate>=1.0",
        "diffusers>=0.42.1",
        "huggingface_hub>=1.0",
        "numpy",
        "Pillow>=10.1",
        "safetensors",
        "torch>=2.6",
        "torchvision",
    ],
    extras_require={
        "train": ["datasets>=4.0", "pyyaml", "tensorboard", "tqdm"],
        "eval": ["datasets>=4.0", "matplotlib", "torch-fidelity>=0.4", "tqdm"],
        "transformers": ["transformers>=5"],
        "docs": [
            "myst-parser>=5",
            "pydata-sphinx-theme>=0.17",
            "sphinx>=8.2",
            "sphinx-argparse-cli>=1.20",
            "sphinx-copybutton>=0.5.2",
        ],
        "test": ["pytest>=8", "pytest-xdist", "ruff==0.17.6", "setuptools>=77", "transformers>=5"],
    },
    entry_points={"console_scripts": ["diffusers-adm=diffusers_adm.cli:main"]},
)
