"""Packaging of diffusers_adm: `pipelines/`, `training/` and `model_cards/` are subpackages that live at the top level."""

import re
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.sdist import sdist


ROOT = Path(__file__).parent
# What a source distribution holds beside the package.
SOURCES = ("docs", "spaces", "tests", "CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "Makefile")
VERSION = re.search(r'^__version__ = "(.+)"$', (ROOT / "diffusers_adm" / "__init__.py").read_text(), re.MULTILINE)[1]


def read_description() -> str:
    """Returns the README for a package index, without the picture and the links that only a checkout can show."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"!\[.*?\]\(.*?\)\n\n.*?\n\n", "", text, flags=re.DOTALL)  # a picture, and the paragraph about it
    return re.sub(r"\[([^]]*)\]\((?!https://).*?\)", r"\1", text)


def is_cache(part: str) -> bool:
    """Returns whether a part of a path is hidden, such as `.ruff_cache`, or a cache of Python."""
    return part.startswith(".") or part == "__pycache__"


class SourceDistribution(sdist):
    """Source distribution with tests and documentation."""

    def make_distribution(self) -> None:
        for source in SOURCES:
            paths = [ROOT / source, *(ROOT / source).rglob("*")]
            files = [path.relative_to(ROOT) for path in paths if path.is_file()]
            self.filelist.extend(str(file) for file in files if not any(map(is_cache, file.parts)))
        super().make_distribution()


setup(
    cmdclass={"sdist": SourceDistribution},
    name="diffusers-adm",
    version=VERSION,
    description="ADM and classifier guidance (Dhariwal & Nichol 2021) for diffusers",
    long_description=read_description(),
    long_description_content_type="text/markdown",
    author="The diffusers_adm authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    keywords=["diffusion models", "classifier guidance", "diffusers", "image generation", "guided-diffusion"],
    project_urls={
        "Paper": "https://arxiv.org/abs/2105.05233",
        "Original code": "https://github.com/openai/guided-diffusion",
        "diffusers": "https://github.com/huggingface/diffusers",
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Intended Audience :: Science/Research",
        "Operating System :: OS Independent",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Processing",
        "Typing :: Typed",
    ],
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
    package_data={
        "diffusers_adm": ["py.typed"],
        "diffusers_adm.model_cards": ["*/*", "*/*/*"],
        "diffusers_adm.training": ["presets/*.yaml"],
    },
    install_requires=[
        "accelerate>=1.10",
        "diffusers>=0.42.1",
        "huggingface_hub>=1.32",
        "numpy>=2.0",
        "Pillow>=10.1",
        "safetensors>=0.8",
        "torch>=2.6",
        "torchvision>=0.21",
    ],
    extras_require={
        "train": ["datasets>=4.0", "pyyaml>=6.0", "tensorboard>=2.18", "tqdm>=4.66.3"],
        "eval": ["datasets>=4.0", "matplotlib>=3.9", "torch-fidelity>=0.4", "tqdm>=4.66.3"],
        "export": ["onnx>=1.23", "onnxruntime>=1.32", "onnxscript>=0.7", "torch>=2.8"],
        "lora": ["peft>=0.18"],
        "page": ["fastapi>=0.165", "gradio>=6.31,<7"],
        "transformers": ["transformers>=5.6"],
        "notebooks": ["ipykernel>=6.29", "jupytext>=1.16.4", "matplotlib>=3.9"],
        "docs": [
            "jupytext>=1.16.4",
            "matplotlib>=3.9",
            "myst-nb>=1.4",
            "myst-parser>=5",
            "pydata-sphinx-theme>=0.17",
            "sphinx>=8.2",
            "sphinx-argparse-cli>=1.20",
            "sphinx-copybutton>=0.5.2",
        ],
        "test": [
            "deepinv>=0.5",
            "peft>=0.18",
            "pyright[nodejs]==1.1.414",
            "pytest>=8",
            "pytest-xdist>=3.5",
            "ruff==0.17.6",
            "setuptools>=77.0.1",
            "transformers>=5.6",
        ],
        "test-page": ["playwright>=1.49", "pytest>=8"],
    },
    entry_points={"console_scripts": ["diffusers-adm=diffusers_adm.cli:main"]},
)
