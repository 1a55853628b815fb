"""The code in README.md, training/README.md and the cards of the default models runs, and their commands are accepted."""

import ast
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import command_parsers, parser_of_module
from diffusers import DDPMScheduler
from documents import DOCUMENTS, ROOT, code_blocks
from PIL import Image
from tiny_models import images, tiny_classifier, tiny_pipeline, tiny_unet

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline
from diffusers_adm.hub.cards import card_name
from diffusers_adm.openai.flags import parse_flags
from diffusers_adm.openai.released import RELEASED_CHECKPOINTS


# Each block that cannot run here is known by some of its text, and says why.
NOT_RUN = {
    "README.md": {
        '"256x256_diffusion.pt"': "needs a released checkpoint and CUDA",
        '"64_256_upsampler.pt"': "needs a released checkpoint and CUDA",
        "CLIPModel.from_pretrained": "downloads weights, and needs CUDA",
        "FeatureExtractor()": "downloads the weights of Inception",
        "push_to_hub": "needs the Hub",
        "DiffusionPipeline.from_pretrained": "needs the Hub",
    },
    "training/README.md": {"push_to_hub": "needs the Hub"},
}


def files_of_training() -> dict:
    """The folders that the training scripts would have written."""
    tiny_pipeline(with_classifier=False).save_pretrained("runs/unet/pipeline")
    tiny_classifier().save_pretrained("runs/classifier/classifier")
    return {}


def converted_folder() -> dict:
    """The folder that `diffusers-adm convert` would have written."""
    tiny_pipeline().save_pretrained("adm-256")
    return {}


def small_picture() -> dict:
    Image.fromarray(np.zeros((16, 16), dtype="uint8")).save("small.png")
    return {}


def unconditional_pipeline() -> dict:
    """What the block that downloads weights has made: a pipeline, and a function that guides."""

    def classifier(x_t, timestep, x_0, class_labels):
        return -x_0.square().sum(dim=(1, 2, 3))

    pipeline = tiny_pipeline(tiny_unet(num_class_embeds=None), with_classifier=False)
    return {"unconditional": pipeline, "classifier": classifier}


def training_loop() -> dict:
    """One batch of a training loop."""
    scheduler, x_0 = DDPMScheduler(), images(seed=5)
    model = lambda x_t, timestep: tiny_unet(num_class_embeds=None)(x_t, timestep)  # noqa: E731
    timestep, noise = torch.tensor([3, 900]), images()
    return {"scheduler": scheduler, "x_0": x_0, "model": model, "timestep": timestep, "noise": noise, "device": "cpu"}


# Preparation of a block, which is known by some of its text.
SETUPS: dict[str, Callable[[], dict]] = {
    '"runs/unet/pipeline"': files_of_training,
    '"adm-256"': converted_folder,
    '"small.png"': small_picture,
    "unconditional.scheduler": unconditional_pipeline,
    "hybrid_loss(": training_loop,
}


@pytest.fixture
def few_steps(monkeypatch):
    """Pipelines that are loaded take few steps where a call does not say how many."""
    for cls in (ClassifierGuidedPipeline, ADMUpsamplePipeline):
        load = cls.from_pretrained

        def load_for_few_steps(*args, load=load, **kwargs):
            pipeline = load(*args, **kwargs)
            pipeline.register_to_config(num_inference_steps=8)
            pipeline.set_progress_bar_config(disable=True)
            return pipeline

        monkeypatch.setattr(cls, "from_pretrained", load_for_few_steps)


# The cards of released models are generated, and `tests/hub/test_cards.py` checks their commands.
WRITTEN = {
    str(path.relative_to(ROOT)): path
    for path in DOCUMENTS
    if path.parent.name not in map(card_name, RELEASED_CHECKPOINTS.values())
}


def documents_with(language: str) -> list[str]:
    return [name for name, path in WRITTEN.items() if code_blocks(path, language)]


def imports_of(block: str) -> str:
    return ast.unparse([line for line in ast.parse(block).body if isinstance(line, (ast.Import, ast.ImportFrom))])


@pytest.mark.parametrize("document", documents_with("python"))
def test_python_blocks_run(document, few_steps, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks, not_run = code_blocks(ROOT / document, "python"), NOT_RUN.get(document, {})
    for text in not_run:
        assert sum(text in block for block in blocks) == 1, f"{text!r} of NOT_RUN must name one block of {document}."
    names: dict = {}
    for number, block in enumerate(blocks, start=1):
        for text, setup in SETUPS.items():
            if text in block:
                names.update(setup())
        if any(text in block for text in not_run):
            block = imports_of(block)
        exec(compile(block, f"{document}, Python block {number}", "exec"), names)


def commands_of(block: str) -> list[list[str]]:
    """The commands of a shell block as words, with the variables that it sets."""
    variables: dict[str, str] = {}
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["for"]:  # one round of it
            words = [f"{words[1]}={words[3].rstrip(';')}"]
        if not words or words[0] in ("done", "export"):
            continue
        name, equals, value = words[0].partition("=")
        if equals and len(words) == 1:
            variables[name] = value
            continue
        line = re.sub(r"\$(\w+)", lambda match: variables.get(match[1], match[0]), line)
        commands.append(shlex.split(line, comments=True))
    return commands


def parser_for(words: list[str]) -> tuple[ArgumentParser, list[str]]:
    """The parser of a command, and the words that it is to parse."""
    if words[0] == "diffusers-adm" or "diffusers_adm.cli" in words:
        words = words[1:] if words[0] == "diffusers-adm" else words[words.index("diffusers_adm.cli") + 1 :]
        return command_parsers(words[0])[words[0]], words[1:]
    for number, word in enumerate(words):
        if word.startswith("training/"):
            return parser_of_module(f"diffusers_adm.training.{Path(word).stem}"), words[number + 1 :]
        if word.startswith("diffusers_adm."):
            return parser_of_module(word), words[number + 1 :]
    raise ValueError(f"No parser is known for {' '.join(words)!r}.")


@pytest.mark.parametrize("document", documents_with("sh"))
def test_commands_are_accepted(document):
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for block in code_blocks(ROOT / document, "sh"):
        for words in commands_of(block):
            if words[0] == "make":
                assert words[1] in targets, words
                continue
            parser, options = parser_for(words)
            parser.error = lambda message: pytest.fail(f"{document}: {' '.join(words)}: {message}", pytrace=False)
            parser.allow_abbrev = False
            parsed = parser.parse_args(options)
            if getattr(parsed, "flags", None):
                parse_flags(parsed.flags)


# Options of torchrun and accelerate, and of `tests/helpers/judge_digits.py`.
OTHER_OPTIONS = {"--nproc_per_node", "--cpu", "--standalone", "--rows", "--solvers", "--upsampler"}


@pytest.mark.parametrize("document", WRITTEN)
def test_options_that_the_text_names_exist(document):
    recorded = yaml.safe_load((ROOT / "tests" / "public_api.yaml").read_text(encoding="utf-8"))["options"]
    options = {name for options in recorded.values() for names in options for name in names.split()}
    text = (ROOT / document).read_text(encoding="utf-8")
    named = {option for code in re.findall(r"`([^`\n]+)`", text) for option in re.findall(r"(?<!\S)--[\w-]+", code)}
    assert named - options - OTHER_OPTIONS == set()
