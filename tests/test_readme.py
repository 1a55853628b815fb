"""The code in README.md, the documentation and the cards of the default models runs, and their commands are accepted."""

import ast
import re
import shlex
import shutil
import subprocess
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from command_line import command_parsers, parser_of_module
from documents import DOCUMENTS, ROOT, blocks_with_reasons, code_blocks
from PIL import Image
from tiny_models import tiny_classifier, tiny_pipeline

from diffusers_adm import ADMUpsamplePipeline, ClassifierGuidedPipeline
from diffusers_adm.hub.cards import card_name
from diffusers_adm.openai.flags import parse_flags
from diffusers_adm.openai.released import RELEASED_BY_NAME, RELEASED_CHECKPOINTS


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


# Preparation of a block, which is known by some of its text.
SETUPS: dict[str, Callable[[], dict]] = {
    '"runs/unet/pipeline"': files_of_training,
    '"adm-256"': converted_folder,
    '"small.png"': small_picture,
}


@pytest.fixture
def few_steps(monkeypatch):
    """Pipelines that are loaded take few steps where a call does not say how many."""
    for cls in (ClassifierGuidedPipeline, ADMUpsamplePipeline):
        load = cls.from_pretrained

        def load_for_few_steps(*args, load=load, **kwargs):
            pipeline = load(*args, **kwargs)
            pipeline.register_to_config(num_inference_steps=min(8, pipeline.config.num_inference_steps or 8))
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


@pytest.mark.parametrize("document", WRITTEN)
def test_no_block_is_hidden_from_the_tests(document):
    text = WRITTEN[document].read_text(encoding="utf-8")
    assert not {"bash", "shell", "py"} & set(re.findall(r"^```(\w+)", text, re.MULTILINE))
    for language in ("python", "sh"):
        assert len(code_blocks(WRITTEN[document], language)) == len(
            re.findall(rf"^```{language}$", text, re.MULTILINE)
        )


def imports_of(block: str) -> str:
    return ast.unparse([line for line in ast.parse(block).body if isinstance(line, (ast.Import, ast.ImportFrom))])


PYTHON_BLOCKS = [
    pytest.param(code, reason, id=f"{document}-{number}")
    for document in documents_with("python")
    for number, (code, reason) in enumerate(blocks_with_reasons(ROOT / document, "python"), start=1)
]


@pytest.mark.parametrize(("block", "reason_not_to_run"), PYTHON_BLOCKS)
def test_python_block_runs_by_itself(block, reason_not_to_run, few_steps, tmp_path, monkeypatch):
    """Each block may be pasted into a fresh interpreter. Of blocks that are not run, the imports are."""
    if "onnxruntime" in block:
        pytest.importorskip("onnxruntime")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for text, setup in SETUPS.items():
        if text in block:
            names.update(setup())
    exec(compile(imports_of(block) if reason_not_to_run else block, "the block", "exec"), names)


# Programs whose options belong to others.
OTHER_PROGRAMS = ("export", "curl", "hf", "jupytext", "pip")

SHELLS = [shell for shell in ("bash", "zsh") if shutil.which(shell)]


@pytest.mark.parametrize("document", documents_with("sh"))
def test_shell_blocks_work_in_bash_and_zsh(document):
    for block in code_blocks(ROOT / document, "sh"):
        for shell in SHELLS:
            subprocess.run([shell, "-n"], input=block, text=True, check=True)
        # zsh stops at patterns that match no file, splits no variable into words, and reads no comments that are typed.
        unquoted = re.sub(r"\"[^\"]*\"|'[^']*'", "", block)
        assert not re.search(r"[*?#\[\]]", unquoted), block
        assert not re.search(r'^\w+="[^"]*\s', block, re.MULTILINE), block


def commands_of(block: str) -> list[list[str]]:
    """The commands of a shell block as words; of a loop, one round."""
    variables: dict[str, str] = {}
    commands = []
    for line in block.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["for"]:
            variables[words[1]] = words[3].rstrip(";")
        elif words and words[0] not in ("done", *OTHER_PROGRAMS):
            commands.append(shlex.split(re.sub(r"\$(\w+)", lambda match: variables[match[1]], line)))
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
OTHER_OPTIONS = {
    "--nproc_per_node", "--multi_gpu", "--cpu", "--standalone", "--num_machines", "--machine_rank", "--main_process_ip", "--help",
    "--rows", "--solvers", "--upsampler",
}  # fmt: skip


@pytest.mark.parametrize("document", WRITTEN)
def test_options_that_the_text_names_exist(document):
    recorded = yaml.safe_load((ROOT / "tests" / "public_api.yaml").read_text(encoding="utf-8"))["options"]
    options = {name for options in recorded.values() for names in options for name in names.split()}
    text = (ROOT / document).read_text(encoding="utf-8")
    named = {option for code in re.findall(r"`([^`\n]+)`", text) for option in re.findall(r"(?<!\S)--[\w-]+", code)}
    assert named - options - OTHER_OPTIONS == set()


@pytest.mark.parametrize("document", WRITTEN)
def test_links_and_pictures_exist(document):
    path = ROOT / document
    targets = re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text(encoding="utf-8"))
    missing = [target for target in targets if "://" not in target and not (path.parent / target).exists()]
    assert missing == []


def test_readme_counts_the_released_checkpoints():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    usable = [released for released in RELEASED_BY_NAME.values() if not released.unsupported]
    assert f"lists {len(RELEASED_BY_NAME)} checkpoints" in text
    assert f"| 15, and {len(usable) - 15} of its family |" in text


def test_every_extra_is_listed():
    declared = (ROOT / "setup.py").read_text(encoding="utf-8").partition("extras_require=")[2]
    extras = re.findall(r'^        "([\w-]+)": \[', declared, re.MULTILINE)
    listed = re.findall(
        r"^\| `\[([\w-]+)\]` \|", (ROOT / "docs" / "get_started.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert extras and set(extras) == set(listed)


def test_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= 7000
