"""Every docstring and every help text begins with a noun or a verb, and no entry is a fragment of another sentence."""

import ast
import re
from pathlib import Path

import pytest


ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path for folder in ("diffusers_adm", "pipelines", "training") for path in (ROOT / folder).rglob("*.py")
)
# Files that are still to be rewritten.
PENDING = {
    "diffusers_adm/atomic_files.py",
    "diffusers_adm/checks.py",
    "diffusers_adm/cli.py",
    "diffusers_adm/data/datasets.py",
    "diffusers_adm/data/folders.py",
    "diffusers_adm/data/image_modes.py",
    "diffusers_adm/data/image_sets.py",
    "diffusers_adm/data/images.py",
    "diffusers_adm/data/labels.py",
    "diffusers_adm/data/npz.py",
    "diffusers_adm/data/npz_images.py",
    "diffusers_adm/data/streams.py",
    "diffusers_adm/demo.py",
    "diffusers_adm/diffusion.py",
    "diffusers_adm/evaluation/commands/evaluate.py",
    "diffusers_adm/evaluation/commands/make_reference.py",
    "diffusers_adm/evaluation/commands/nll.py",
    "diffusers_adm/evaluation/commands/sample.py",
    "diffusers_adm/evaluation/commands/sweep.py",
    "diffusers_adm/evaluation/feature_options.py",
    "diffusers_adm/evaluation/features.py",
    "diffusers_adm/evaluation/labels.py",
    "diffusers_adm/evaluation/likelihood.py",
    "diffusers_adm/evaluation/metrics.py",
    "diffusers_adm/evaluation/precision_recall.py",
    "diffusers_adm/evaluation/reference.py",
    "diffusers_adm/evaluation/report.py",
    "diffusers_adm/evaluation/sample_files.py",
    "diffusers_adm/evaluation/sampling.py",
    "diffusers_adm/evaluation/shards.py",
    "diffusers_adm/evaluation/statistics.py",
    "diffusers_adm/guidance/functions.py",
    "diffusers_adm/guidance/gradient.py",
    "diffusers_adm/guidance/guider.py",
    "diffusers_adm/guidance/options.py",
    "diffusers_adm/hub/bundle.py",
    "diffusers_adm/hub/download.py",
    "diffusers_adm/launch.py",
    "diffusers_adm/losses.py",
    "diffusers_adm/models/blocks.py",
    "diffusers_adm/models/class_names.py",
    "diffusers_adm/models/noisy_classifier.py",
    "diffusers_adm/models/preconditioning.py",
    "diffusers_adm/models/unet_adm.py",
    "diffusers_adm/models/weights.py",
    "diffusers_adm/openai/architecture.py",
    "diffusers_adm/openai/checkpoints.py",
    "diffusers_adm/openai/files.py",
    "diffusers_adm/openai/flags.py",
    "diffusers_adm/openai/released.py",
    "diffusers_adm/openai/released_rows.py",
    "diffusers_adm/openai/tensors.py",
    "diffusers_adm/options.py",
    "diffusers_adm/respacing.py",
    "diffusers_adm/solvers/algorithms.py",
    "diffusers_adm/solvers/karras.py",
    "diffusers_adm/solvers/schedulers.py",
    "pipelines/cascade.py",
    "pipelines/checks.py",
    "pipelines/class_labels.py",
    "pipelines/guided_sampling.py",
    "pipelines/options.py",
    "pipelines/pipeline_adm_upsample.py",
    "pipelines/pipeline_classifier_guided.py",
    "pipelines/saving.py",
    "pipelines/step_hooks.py",
    "training/averages.py",
    "training/calibration.py",
    "training/checkpoint_parts.py",
    "training/checkpointing.py",
    "training/configuration.py",
    "training/inspection.py",
    "training/objective.py",
    "training/options.py",
    "training/publishing.py",
    "training/setup.py",
    "training/train_classifier.py",
    "training/train_unet.py",
    "training/train_upsampler.py",
    "training/trainer.py",
}
# Words that continue a sentence which is not there.
FRAGMENTS = (
    "as",
    "at",
    "by",
    "for",
    "from",
    "how",
    "if",
    "in",
    "of",
    "on",
    "once",
    "such",
    "that",
    "those",
    "to",
    "what",
    "when",
    "where",
    "which",
    "with",
    "without",
)
AVOIDED = re.compile(r"\b(lest|to and fro|no more than|none of its own|not one)\b", re.IGNORECASE)
SECTION = re.compile(r"^(Args|Attributes|Raises|Returns|Yields):$", re.MULTILINE)
ENTRY = re.compile(r"^ {4}[\w*.`, ]+: (.+)$", re.MULTILINE)


def openings(docstring: str) -> list[str]:
    """Returns the first sentence of a docstring, and that of each entry of its sections."""
    beginning, *sections = SECTION.split(docstring)
    return [beginning.strip().split("\n")[0], *(entry for section in sections for entry in ENTRY.findall(section))]


def help_texts(tree: ast.AST) -> list[str]:
    """Returns the texts of `help=` arguments and of `"help"` entries of metadata."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.keyword) and node.arg == "help":
            found.append(node.value)
        if isinstance(node, ast.Dict):
            found += [value for key, value in zip(node.keys, node.values) if getattr(key, "value", None) == "help"]
    return [node.value for node in found if isinstance(node, ast.Constant) and isinstance(node.value, str)]


@pytest.mark.parametrize("path", [path for path in SOURCES if str(path.relative_to(ROOT)) not in PENDING], ids=str)
def test_sentences_begin_with_a_noun_or_a_verb(path):
    tree = ast.parse(path.read_text())
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = [ast.get_docstring(node) or "" for node in ast.walk(tree) if isinstance(node, documented)]
    texts = [text for docstring in docstrings for text in openings(docstring)] + help_texts(tree)
    fragments = [text for text in texts if re.split(r"\W", text, maxsplit=1)[0].lower() in FRAGMENTS]
    assert not fragments
    assert not [text for text in [*docstrings, *texts] if AVOIDED.search(text)]
