"""A published checkpoint computes each property once, and callers share the result."""

from collections import Counter

import pytest
import torch
from golden_cases import RELEASED, draw_weights, load_case, meta_state_dict, published_flags

from diffusers_adm import ADMUNet2DModel, ADMUpsamplePipeline, ClassifierGuidedPipeline
from diffusers_adm.cli import main
from diffusers_adm.openai import checkpoints, files
from diffusers_adm.openai.checkpoints import PublishedCheckpoint
from diffusers_adm.openai.released import RELEASED_CHECKPOINTS


@pytest.fixture
def calls(monkeypatch):
    """Counts how often each file was loaded, each string of flags parsed, and each config read."""
    counts = Counter()

    def count(module, name, key):
        function = getattr(module, name)

        def counted(*args, **kwargs):
            counts[key(*args)] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)

    count(files, "_load_file", lambda path: f"load {path.name}")
    count(checkpoints, "parse_flags", lambda flags: f"parse {flags}")
    count(checkpoints, "read_shapes", lambda state_dict: "shapes")
    count(checkpoints, "unet_config", lambda shapes, flags: "UNet's config")
    count(checkpoints, "classifier_config", lambda shapes, flags: "classifier's config")
    return counts


@pytest.fixture
def upsampler_file(tmp_path):
    description, _ = load_case("upsampler")
    torch.save(draw_weights(description), tmp_path / "upsampler.pt")
    return tmp_path / "upsampler.pt", f"{published_flags(description)} --small_size 8"


def test_upsampler_is_read_and_its_flags_are_parsed_once(upsampler_file, calls, tmp_path):
    file, flags = upsampler_file
    once = {"load upsampler.pt": 1, f"parse {flags}": 1, "shapes": 1, "UNet's config": 1}
    ADMUpsamplePipeline.from_openai(file, flags)
    assert calls == once
    calls.clear()
    assert main(["convert", "--unet", str(file), "--flags", flags, "--output", str(tmp_path / "out")]) == 0
    assert calls == once


def test_unet_and_classifier_are_read_once_and_share_their_flags(pipeline_files, calls, tmp_path):
    unet, classifier, flags = pipeline_files
    once = {
        "load unet.pt": 1,
        "load classifier.pt": 1,
        f"parse {flags}": 1,
        "shapes": 2,
        "UNet's config": 1,
        "classifier's config": 1,
    }
    ClassifierGuidedPipeline.from_openai(unet, classifier, flags)
    assert calls == once
    calls.clear()
    words = ["convert", "--unet", str(unet), "--classifier", str(classifier), "--flags", flags]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    assert calls == once


def test_flags_of_a_released_file_are_parsed_once(calls, tmp_path):
    file = "64_256_upsampler.pt"
    torch.save(meta_state_dict(file), tmp_path / file)
    ADMUpsamplePipeline.from_openai(tmp_path / file)
    assert calls == {
        f"load {file}": 1,
        f"parse {RELEASED_CHECKPOINTS[file].flags}": 1,
        "shapes": 1,
        "UNet's config": 1,
    }


@pytest.mark.parametrize("file", RELEASED)
def test_kind_is_that_of_the_table(file):
    assert PublishedCheckpoint(meta_state_dict(file), RELEASED[file]["flags"]).kind == RELEASED_CHECKPOINTS[file].kind


def test_object_is_taken_in_the_place_of_its_file(upsampler_file):
    file, flags = upsampler_file
    published = PublishedCheckpoint(file, flags)
    unet, pipeline = ADMUNet2DModel.from_openai(published), ADMUpsamplePipeline.from_openai(published)
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), pipeline.unet.parameters()))
    assert published.scheduler() is not published.scheduler()  # pipelines change theirs
    with pytest.raises(ValueError, match="`flags` must be None, because a PublishedCheckpoint has its own flags"):
        ADMUNet2DModel.from_openai(published, flags)
