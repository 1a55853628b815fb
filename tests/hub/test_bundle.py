"""Code files are made only from modules that obey the laws of bundling, and leave out the package's own code for loading."""

import importlib

import pytest

from diffusers_adm import ADMUNet2DModel, ADMUpsamplePipeline, ClassifierGuidedPipeline, NoisyClassifier
from diffusers_adm.hub.bundle import LEFT_OUT, single_file


@pytest.fixture
def define(tmp_path, monkeypatch):
    """Function that writes a module and returns its class `Model`."""
    monkeypatch.syspath_prepend(tmp_path)

    def define_module(name, text):
        (tmp_path / f"{name}.py").write_text(f"{text}\n\n\nclass Model:\n    pass\n")
        return importlib.import_module(name).Model

    return define_module


@pytest.mark.parametrize(
    "name, text, message",
    [
        (
            "lawless_block",
            "if True:\n    x = 1",
            "lawless_block must only define and import at top level, but line 1 does more",
        ),
        ("lawless_name", "from diffusers_adm.respacing import respaced_timesteps as r", "without `as`"),
        (
            "lawless_module",
            "import diffusers_adm.respacing",
            "must import names from diffusers_adm.respacing, but imports the module",
        ),
        (
            "lawless_double",
            "from diffusers_adm.respacing import respaced_timesteps\n\n\ndef respaced_timesteps():\n    pass",
            "respaced_timesteps must have one definition, but diffusers_adm.respacing and lawless_double define it",
        ),
    ],
)
def test_module_that_breaks_a_law_is_refused(name, text, message, define):
    with pytest.raises(ValueError, match=message):
        single_file(define(name, text))


@pytest.mark.parametrize(
    "cls",
    [ADMUNet2DModel, NoisyClassifier, ClassifierGuidedPipeline, ADMUpsamplePipeline],
    ids=lambda cls: cls.__name__,
)
def test_file_holds_no_method_that_is_left_out(cls):
    text = single_file(cls)
    assert f"class {cls.__name__}(" in text
    assert not [name for name in LEFT_OUT if f"def {name}(" in text]
    assert "PublishedCheckpoint" not in text
