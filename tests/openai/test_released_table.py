"""Table of the released checkpoints beyond those of the paper, against the recorded facts, and its names."""

import gzip
import json

import pytest
import torch
from golden_cases import GOLDEN, RELEASED

from diffusers_adm import ADMUNet2DModel
from diffusers_adm.openai.flags import parse_flags
from diffusers_adm.openai.released import (
    RELEASED_BY_NAME,
    find_released,
    guiding_classifier,
    register_released,
    released_checkpoint,
)
from diffusers_adm.openai.released_rows import ReleasedCheckpoint, tensor_layout


# Flags, addresses, hashes and tensors of the other repositories' checkpoints, recorded from their code.
RECORDED = RELEASED | json.loads(gzip.decompress((GOLDEN / "family.json.gz").read_bytes()))
# The only file whose recorded name has no folder, although other files are called the same.
FILES = {"ddpm_checkpoints/ffhq.pt": "ffhq.pt"}
SUPPORTED = [name for name, released in RELEASED_BY_NAME.items() if released.unsupported is None]
# One name per layout. `test_released.py` has those of the paper.
LAYOUTS = {RELEASED_BY_NAME[name].layout: name for name in SUPPORTED if RELEASED_BY_NAME[name].file not in RELEASED}


def recorded(name: str) -> dict:
    file = RELEASED_BY_NAME[name].file
    return RECORDED[FILES.get(file, file)]


def test_all_recorded_checkpoints_have_a_name():
    files = [FILES.get(released.file, released.file) for released in RELEASED_BY_NAME.values()]
    assert sorted(files) == sorted(RECORDED)


@pytest.mark.parametrize("name", RELEASED_BY_NAME)
def test_row_holds_the_recorded_facts(name):
    released, facts = RELEASED_BY_NAME[name], recorded(name)
    assert released.layout == tensor_layout(dict(facts["parameters"]))
    assert released.sha256 == facts.get("sha256")
    if "address" in facts:
        # A file of Google Drive is had at another address than that of its page.
        assert facts["address"].partition("?id=")[2] in released.url
        assert "drive.google" in facts["address"] or facts["address"] == released.url


@pytest.mark.parametrize("name", SUPPORTED)
def test_row_has_the_recorded_flags(name):
    flags = parse_flags(RELEASED_BY_NAME[name].flags)
    for flag, value in parse_flags(recorded(name)["flags"]).items():
        if (flag, flags["diffusion_steps"]) != ("rescale_timesteps", 1000):  # without effect
            assert flags[flag] == value, flag


@pytest.mark.parametrize("name", LAYOUTS.values())
def test_checkpoint_converts_completely_both_ways(name):
    published = {tensor: torch.empty(shape, device="meta") for tensor, shape in recorded(name)["parameters"]}
    back = ADMUNet2DModel.from_openai(published, RELEASED_BY_NAME[name].flags).to_openai_state_dict()
    assert {tensor: value.shape for tensor, value in back.items()} == {n: t.shape for n, t in published.items()}


@pytest.mark.parametrize(
    "asked, name",
    [
        ("imagenet-256", "imagenet-256"),
        ("ImageNet_256", "imagenet-256"),
        ("256x256_diffusion_uncond.pt", "imagenet-256-uncond"),
        ("64x64_classifier", "imagenet-64-classifier"),
        ("cifar10/ADM-IP.pt", "adm-ip-cifar10"),
        ("iddpm_ffhq256_ema750000.pth", "difface-ffhq-256"),
    ],
)
def test_names_are_found_as_they_are_written(asked, name):
    assert released_checkpoint(asked).name == name


def test_unknown_name_has_the_nearest_ones():
    with pytest.raises(ValueError, match="No released checkpoint is called 'imagnet-265'.*imagenet-256"):
        released_checkpoint("imagnet-265")
    for name in ("", "?" * 50, None, 3):
        with pytest.raises(ValueError):
            released_checkpoint(name)


def test_files_are_recognised_where_their_name_is_their_own():
    assert find_released("a/folder/celeba256_250000.pt").name == "repaint-celebahq"
    assert find_released("adm-cifar10.pt").name == "adm-cifar10"
    assert find_released("a/folder/cifar10/ADM-IP.pt").name == "adm-ip-cifar10"
    # Several files have these names.
    for file in ("ffhq.pt", "ADM.pt", "ADM-IP.pt", "a/folder/ADM.pt", "cifar10/folder/ADM.pt", "ffhq256.pt"):
        assert find_released(file) is None


@pytest.mark.parametrize("name", RELEASED_BY_NAME)
def test_file_is_recognised_by_its_published_path(name):
    row = RELEASED_BY_NAME[name]
    for file in (row.file, *row.aliases):
        assert find_released(f"folder/{file}") is row


def test_classifiers_that_guide_are_in_the_table():
    guided = {
        name: classifier.name
        for name in RELEASED_BY_NAME
        if (classifier := guiding_classifier(RELEASED_BY_NAME[name]))
    }
    assert guided == {
        "imagenet-64": "imagenet-64-classifier",
        "imagenet-128": "imagenet-128-classifier",
        "imagenet-256": "imagenet-256-classifier",
        "imagenet-256-uncond": "imagenet-256-classifier",
        "imagenet-512": "imagenet-512-classifier",
    }


@pytest.mark.parametrize(
    "columns, message",
    [
        ({"name": "../../evil"}, "`name` must be lower-case letters and digits.* '../../evil'"),
        ({"name": "Mine"}, "`name` must be lower-case"),
        (
            {"name": "imagenet-256"},
            "'imagenet-256' is already a name of the released checkpoint imagenet-256. Choose another",
        ),
        ({"name": "64x64-diffusion"}, "'64x64-diffusion' is already a name of the released checkpoint imagenet-64"),
        (
            {"file": "256x256_diffusion.pt"},
            "'256x256_diffusion.pt' is already a name of the released checkpoint imagenet-256",
        ),
        (
            {"aliases": ("ImageNet_64.pt",)},
            "'ImageNet_64.pt' is already a name of the released checkpoint imagenet-64",
        ),
        ({"name": None}, "`name` must be a string, but got None"),
        ({"aliases": "lsun.pt"}, "`aliases` must be .*, but got 'lsun.pt'"),
        ({"kind": "vae"}, "`kind` must be one of unet, upsampler, classifier, but got 'vae'"),
        ({"guided_by": "nobody"}, "`guided_by` must be the name of a released checkpoint, but got 'nobody'"),
        ({"flags": "--image_sise 64"}, "image_sise"),
    ],
)
def test_row_that_cannot_be_found_by_its_name_is_refused(columns, message):
    row = {"file": "mine.pt", "kind": "unet", "flags": "--image_size 64", "name": "mine", "trained_on": "mine"}
    before = dict(RELEASED_BY_NAME)
    with pytest.raises(ValueError, match=message):
        register_released(ReleasedCheckpoint(**{**row, **columns}))
    assert before == RELEASED_BY_NAME


def test_licenses_are_those_of_the_repositories():
    licenses = {
        "imagenet-64": "MIT (code), research only",
        "iddpm-cifar10": "MIT (code)",
        "cd-lsun-cat-l2": "MIT (code), research only",
        "repaint-places": "CC BY-NC-SA 4.0, non-commercial",
        "difface-ffhq-256": "S-Lab License 1.0, non-commercial",
        "p2-ffhq": "MIT (code)",
        "imagenet-512-uncond": "MIT",
        "portrait-512": "not stated",
    }
    assert {name: RELEASED_BY_NAME[name].license_terms for name in licenses} == licenses
